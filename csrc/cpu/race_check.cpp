// Data races of a kernel, found while it runs on the CPU.
//
// A module built for this has its kernels compiled with -fsanitize=thread, which makes the compiler
// call a function before every access; the functions are ours, not the sanitizer's runtime, as they
// have to know about lanes, waves and workgroups. Two accesses to one byte by different lanes, one
// of them a write, at most one of them atomic, are a race unless they are ordered:
//
//   lanes of different clusters     by a hand-over (device/handover.h): a release fence of the device's scope behind
//                                   the first access, an arrival at a ticket behind that, a later arrival at
//                                   the same one, an acquire fence behind that, and the second access; a
//                                   barrier where the next step is another lane's
//   workgroups of one cluster       by a barrier of the cluster between them
//   waves of one workgroup          by a barrier between them
//   lanes of one wave               by a barrier or wave_sync() between them; other wave operations bring lanes
//                                   together, but no GPU's manual says that they order memory
//
// The check does not depend on the order in which the scheduler happens to run the lanes: what a
// real GPU may do in any order is reported in every run that gets there. For every byte the last
// write and the last two reads of different lanes are remembered; a third reader could hide a race
// of a lane with itself only. A ticket that is not zero behind a launch is reported, too: the next launch would
// find it so.
//
// LDS holds garbage when a workgroup starts, so a read of a byte that nobody wrote is reported too.
//
// Shadows lie in pages that are found by a hash and kept from launch to launch; one hash table entry
// per byte took 4 times as long (M=64, E=128, K=4, D=2880).
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "device/hip_cpu.h"

namespace hip_cpu {
namespace {

enum class Kind : uint16_t { none, plain, atomic };

struct Access {
  Kind kind = Kind::none;
  uint16_t thread = 0;
  unsigned block = 0, cluster = 0, barriers = 0, cluster_barriers = 0, wave_syncs = 0;
  unsigned releases = 0;  // that the lane had made before
  const void* pc = nullptr;
};
static_assert(kMaxThreadsPerBlock <= 1 << 16, "a thread index fits");

struct Shadow {
  Access write, reads[2];
};

// By byte: of LDS from its start, of all other memory by address.
Shadow lds_shadow[kMaxClusterSize][kLdsBytesPerBlock];

class GlobalShadow {
 public:
  void forget() { ++launch_; }

  Shadow& at(uintptr_t address) {
    const uintptr_t number = address / kPageBytes;
    if (last_ == nullptr || number != last_number_ || last_->launch != launch_) {
      std::unique_ptr<Page>& page = pages_[number];
      if (page == nullptr) page = std::make_unique<Page>();
      if (page->launch != launch_) {
        std::fill(page->bytes, page->bytes + kPageBytes, Shadow{});
        page->launch = launch_;
      }
      last_ = page.get();
      last_number_ = number;
    }
    return last_->bytes[address % kPageBytes];
  }

 private:
  static constexpr uintptr_t kPageBytes = 256;
  struct Page {
    unsigned launch = 0;
    Shadow bytes[kPageBytes];
  };

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  Page* last_ = nullptr;
  uintptr_t last_number_ = 0;
  unsigned launch_ = 0;
};

GlobalShadow global_shadow;

// By block: of each thread, the number of releases that made its earlier accesses known.
using Known = std::unordered_map<unsigned, std::vector<unsigned>>;

// How far a running workgroup is with handing over and taking over.
struct Handover {
  std::vector<unsigned> releases,
      released_at;  // by thread: how many, and barriers passed at the last
  Known offered;    // what its arrival found at the ticket
  unsigned arrived_thread = 0, arrived_at = 0;
  std::vector<bool> has_acquired;  // by thread
  unsigned acquired_at = ~0u;      // barriers passed at the first acquisition
};
Handover handovers[kMaxClusterSize];
std::unordered_map<const uint32_t*, Known> tickets;

void note_fence(Fence kind, Scope scope) {
  if (scope != Scope::device) return;
  Handover& handover = handovers[current_workgroup->rank];
  const unsigned thread = current_lane->thread_idx, barriers = current_workgroup->barriers_passed;
  if (kind == Fence::release) {
    ++handover.releases[thread];
    handover.released_at[thread] = barriers;
  } else if (!handover.offered.empty() &&
             (thread == handover.arrived_thread || handover.arrived_at < barriers)) {
    handover.has_acquired[thread] = true;
    handover.acquired_at = std::min(handover.acquired_at, barriers);
  }
}

void note_arrival(const uint32_t* ticket) {
  Handover& handover = handovers[current_workgroup->rank];
  const unsigned thread = current_lane->thread_idx, barriers = current_workgroup->barriers_passed;
  std::vector<unsigned> known = handover.releases;
  for (unsigned t = 0; t < known.size(); ++t) {
    if (t != thread && known[t] > 0 && handover.released_at[t] == barriers) --known[t];
  }
  tickets[ticket][current_workgroup->block_idx] = std::move(known);
  handover.offered = tickets[ticket];
  handover.arrived_thread = thread;
  handover.arrived_at = barriers;
}

std::string check_tickets() {
  for (const auto& entry : tickets) {
    if (*entry.first != 0) {
      return "a ticket is left at " + std::to_string(*entry.first) +
             " behind a launch: expected 0, which the next one starts from";
    }
  }
  return "";
}

// Whether the running lane has taken over what lies before an access of another cluster.
bool is_handed_over(const Access& earlier) {
  const Handover& handover = handovers[current_workgroup->rank];
  if (!handover.has_acquired[current_lane->thread_idx] &&
      handover.acquired_at >= current_workgroup->barriers_passed) {
    return false;
  }
  const auto known = handover.offered.find(earlier.block);
  return known != handover.offered.end() && known->second[earlier.thread] > earlier.releases;
}

bool same_lane(const Access& a, const Access& b) {
  return a.block == b.block && a.thread == b.thread;
}

bool ordered(const Access& earlier, const Access& later) {
  if (same_lane(earlier, later)) return true;
  if (earlier.cluster != later.cluster) return is_handed_over(earlier);
  if (earlier.cluster_barriers != later.cluster_barriers) return true;
  if (earlier.block != later.block) return false;
  if (earlier.barriers != later.barriers) return true;
  const bool same_wave = earlier.thread / kWaveSize == later.thread / kWaveSize;
  return same_wave && earlier.wave_syncs != later.wave_syncs;
}

bool races(const Access& earlier, const Access& later) {
  if (earlier.kind == Kind::none) return false;
  if (earlier.kind == Kind::atomic && later.kind == Kind::atomic) return false;
  return !ordered(earlier, later);
}

// Function and line of a program address, innermost inlined frame first.
std::string source_of(const void* pc) {
  Dl_info info;
  if (dladdr(pc, &info) == 0) return "an unknown place";
  char command[1024];
  std::snprintf(command, sizeof(command), "addr2line -f -C -i -s -e '%s' 0x%zx 2>/dev/null",
                info.dli_fname,
                static_cast<size_t>(static_cast<const char*>(pc) -
                                    static_cast<const char*>(info.dli_fbase) - 1));
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    char line[512];
    for (int i = 0; std::fgets(line, sizeof(line), pipe) != nullptr; ++i) {
      line[std::strcspn(line, "\n")] = 0;
      text += i == 0 ? line : (i % 2 ? " (" + std::string(line) + ")" : " in " + std::string(line));
    }
    pclose(pipe);
  }
  return text.empty() ? "an unknown place" : text;
}

std::string describe(const Access& access, const char* action) {
  return std::string(access.kind == Kind::atomic ? "atomic " : "") + action + " by thread " +
         std::to_string(access.thread) + " of workgroup " + std::to_string(access.block) + " at " +
         source_of(access.pc);
}

void report(uintptr_t address, const char* space, const Access& earlier, const char* earlier_action,
            const Access& later, const char* later_action) {
  char where[64];
  std::snprintf(where, sizeof(where), "%s 0x%zx", space, static_cast<size_t>(address));
  fail(std::string("data race on ") + where + ": " + describe(later, later_action) +
       " is not ordered after " + describe(earlier, earlier_action));
}

void check(const void* pointer, size_t size, bool is_write, Kind kind, const void* pc) {
  if (current_lane == nullptr || is_internal(pointer)) return;
  const Lane& lane = *current_lane;
  const Workgroup& workgroup = *current_workgroup;
  const Access access{kind,
                      static_cast<uint16_t>(lane.thread_idx),
                      workgroup.block_idx,
                      workgroup.block_idx - workgroup.rank,
                      workgroup.barriers_passed,
                      workgroup.cluster_barriers_passed,
                      lane.wave->syncs,
                      handovers[workgroup.rank].releases[lane.thread_idx],
                      pc};
  const uintptr_t first = reinterpret_cast<uintptr_t>(pointer);
  const Workgroup* const owner = owner_of_lds(pointer);
  const bool in_lds = owner != nullptr;
  const uintptr_t lds = in_lds ? reinterpret_cast<uintptr_t>(owner->lds) : 0;
  if (in_lds && first + size > lds + owner->lds_bytes) {
    fail("access behind the " + std::to_string(owner->lds_bytes) + " bytes of LDS: offset " +
         std::to_string(first - lds) + ", " + describe(access, is_write ? "write" : "read"));
  }
  for (uintptr_t address = first; address < first + size; ++address) {
    const uintptr_t shown = address - lds;
    Shadow& shadow = in_lds ? lds_shadow[owner->rank][shown] : global_shadow.at(address);
    const char* space = in_lds ? "LDS offset" : "address";
    const char* action = is_write ? "write" : "read";
    if (in_lds && !is_write && shadow.write.kind == Kind::none) {
      fail("read of LDS that nobody wrote: offset " + std::to_string(shown) + ", " +
           describe(access, action));
    }
    if (races(shadow.write, access)) report(shown, space, shadow.write, "write", access, action);
    if (is_write) {
      for (const Access& read : shadow.reads) {
        if (races(read, access)) report(shown, space, read, "read", access, action);
      }
      shadow.write = access;
    } else {
      if (!same_lane(shadow.reads[0], access)) shadow.reads[1] = shadow.reads[0];
      shadow.reads[0] = access;
    }
  }
}

const Observer kObserver = {
    [] {
      global_shadow.forget();
      tickets.clear();
    },
    [](const Workgroup& workgroup) {
      Shadow* const shadow = lds_shadow[workgroup.rank];
      std::fill(shadow, shadow + workgroup.lds_bytes, Shadow{});
      Handover& handover = handovers[workgroup.rank];
      handover = Handover{};
      handover.releases.resize(workgroup.block_dim);
      handover.released_at.resize(workgroup.block_dim);
      handover.has_acquired.resize(workgroup.block_dim);
    },
    note_fence,
    note_arrival,
    check_tickets,
};

const bool registered = [] {
  observer = &kObserver;
  return true;
}();

}  // namespace
}  // namespace hip_cpu

// What -fsanitize=thread calls. Names and signatures are the compilers'.
#define AITER_PC __builtin_return_address(0)
#define AITER_PLAIN(size)                                           \
  void __tsan_read##size(void* p) {                                 \
    hip_cpu::check(p, size, false, hip_cpu::Kind::plain, AITER_PC); \
  }                                                                 \
  void __tsan_write##size(void* p) {                                \
    hip_cpu::check(p, size, true, hip_cpu::Kind::plain, AITER_PC);  \
  }                                                                 \
  void __tsan_unaligned_read##size(void* p) {                       \
    hip_cpu::check(p, size, false, hip_cpu::Kind::plain, AITER_PC); \
  }                                                                 \
  void __tsan_unaligned_write##size(void* p) {                      \
    hip_cpu::check(p, size, true, hip_cpu::Kind::plain, AITER_PC);  \
  }
#define AITER_ATOMIC(bits, type)                                             \
  type __tsan_atomic##bits##_load(const type* p, int) {                      \
    hip_cpu::check(p, sizeof(type), false, hip_cpu::Kind::atomic, AITER_PC); \
    return *p;                                                               \
  }                                                                          \
  void __tsan_atomic##bits##_store(type* p, type value, int) {               \
    hip_cpu::check(p, sizeof(type), true, hip_cpu::Kind::atomic, AITER_PC);  \
    *p = value;                                                              \
  }                                                                          \
  type __tsan_atomic##bits##_fetch_add(type* p, type value, int) {           \
    hip_cpu::check(p, sizeof(type), true, hip_cpu::Kind::atomic, AITER_PC);  \
    const type old = *p;                                                     \
    *p = static_cast<type>(old + value);                                     \
    return old;                                                              \
  }                                                                          \
  type __tsan_atomic##bits##_fetch_or(type* p, type value, int) {            \
    hip_cpu::check(p, sizeof(type), true, hip_cpu::Kind::atomic, AITER_PC);  \
    const type old = *p;                                                     \
    *p = static_cast<type>(old | value);                                     \
    return old;                                                              \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
AITER_PLAIN(1)
AITER_PLAIN(2)
AITER_PLAIN(4)
AITER_PLAIN(8)
AITER_PLAIN(16)
void __tsan_read_range(void* p, unsigned long size) {
  hip_cpu::check(p, size, false, hip_cpu::Kind::plain, AITER_PC);
}
void __tsan_write_range(void* p, unsigned long size) {
  hip_cpu::check(p, size, true, hip_cpu::Kind::plain, AITER_PC);
}
AITER_ATOMIC(32, uint32_t)
AITER_ATOMIC(64, uint64_t)
}
