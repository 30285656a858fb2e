// The scheduler behind device/hip_cpu.h: stacks, switches, workgroups, OS threads.
//
// Long because the switch, the lanes and the workgroup are one state machine; apart, each part would
// have to show the others its insides.
#include "device/hip_cpu.h"

#include "address_check.h"
#include "fiber.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize( \
    "O3")  // host code is compiled at -O1, and every switch of lanes goes through here
#endif

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace hip_cpu {

thread_local Lane* current_lane = nullptr;
thread_local Workgroup* current_workgroup = nullptr;
const Observer* observer = nullptr;

namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kStackBytes = 8 * address_check::kStackFactor * kPageBytes;  // lowest page: spare
constexpr size_t kUsableStackBytes = kStackBytes - 2 * kPageBytes;            // below any colour
constexpr size_t kLdsGuardBytes = 4096;
constexpr unsigned char kLdsPoison = 0xA5;
// Lanes run in lockstep and touch the same depth of their stacks. Equal distances between stacks
// would put these into the same few cache sets: a call of M=64, E=128, K=4 then takes 1.5x as long.
constexpr size_t kColourBytes = 320;
// So the spare page of one lane in a wave, that with the least room, is enough as a guard. One of every
// lane would split the stacks into more mappings than Linux gives a process, from 32 cores on.
constexpr unsigned kGuardedLane = 12;
static_assert(kGuardedLane * kColourBytes < kPageBytes && kGuardedLane < kWaveSize,
              "lanes up to the guarded one have ever less room");

void lane_main();

std::string describe(const Site& site) {
  return std::string(site.operation) + " (" + site.file + ":" + std::to_string(site.line) + ")";
}

std::string describe(LaneMask lanes) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(lanes));
  return text;
}

// One launch, shared by the OS threads that work on it.
struct Launch {
  Launch(unsigned grid_, unsigned block_, size_t lds_bytes_, unsigned cluster_, BodyFn body_,
         const void* closure_)
      : grid(grid_),
        block(block_),
        lds_bytes(lds_bytes_),
        cluster(cluster_),
        body(body_),
        closure(closure_) {}

  unsigned grid, block;
  size_t lds_bytes;
  unsigned cluster;
  BodyFn body;
  const void* closure;
  std::atomic<unsigned> next_cluster{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string error;

  void record_error(const std::string& text) {
    std::lock_guard<std::mutex> lock(mutex);
    if (error.empty()) error = text;
    failed = true;
  }
};

// Stacks and bookkeeping of one cluster; every OS thread that runs workgroups owns one.
class Machine {
 public:
  ~Machine() { release_stacks(); }

  void run(Launch& launch) {
    launch_ = &launch;
    reserve(launch.cluster * launch.block);
    forbid_behind_lds(true);
    while (!launch.failed) {
      const unsigned cluster = launch.next_cluster.fetch_add(1, std::memory_order_relaxed);
      if (cluster >= launch.grid / launch.cluster) break;
      for (unsigned rank = 0; rank < launch.cluster; ++rank) {
        Workgroup& workgroup = workgroups_[rank];
        workgroup = {cluster * launch.cluster + rank,
                     launch.block,
                     launch.grid,
                     lds_[rank],
                     launch.lds_bytes,
                     rank,
                     0,
                     0};
        std::memset(workgroup.lds, kLdsPoison, launch.lds_bytes);
        if (observer != nullptr) observer->workgroup_begins(workgroup);
        prepare_lanes(workgroup);
      }
      run_cluster();
    }
    forbid_behind_lds(false);
    current_workgroup = nullptr;
    current_lane = nullptr;
  }

  void call_body() { launch_->body(launch_->closure); }

  void finish_lane(Lane& lane) {
    Wave& wave = *lane.wave;
    wave.live &= ~bit(lane.index);
    wave.ready &= ~bit(lane.index);
    // Those that wait at a wave operation wait only for the lanes that are still there.
    if (wave.arrived != 0 && wave.arrived == wave.live) complete_collective(wave);
    yield_lane();
  }

  bool owns(const void* address) const {
    const char* byte = static_cast<const char*>(address);
    const auto within = [&](const void* begin, size_t size) {
      return byte >= static_cast<const char*>(begin) &&
             byte < static_cast<const char*>(begin) + size;
    };
    return within(stacks_, num_stacks_ * kStackBytes) ||
           within(lanes_.data(), lanes_.size() * sizeof(Lane)) ||
           within(waves_.data(), waves_.size() * sizeof(Wave));
  }

  // From the running stack to that of the lane `to`, to the scheduler's for null.
  void switch_to(void** save, const Lane* to) {
    void* fake_stack = nullptr;
    address_check::before_switch(&fake_stack, to == nullptr ? own_stack_ : lane_stack(*to));
    switch_fiber(save, to == nullptr ? scheduler_ : to->stack_pointer);
    address_check::after_switch(fake_stack);
  }

  char* lds(unsigned rank) { return rank < launch_->cluster ? lds_[rank] : nullptr; }

  const Workgroup* owner_of_lds(const void* address) const {
    const auto offset = static_cast<const char*>(address) - &lds_[0][0];
    if (offset < 0 || offset >= static_cast<ptrdiff_t>(launch_->cluster * sizeof(lds_[0]))) {
      return nullptr;
    }
    return &workgroups_[offset / sizeof(lds_[0])];
  }

  [[noreturn]] void abandon(const std::string& error) {
    launch_->record_error(error);
    void* never;
    switch_to(&never, nullptr);
    __builtin_unreachable();
  }

 private:
  address_check::Stack lane_stack(const Lane& lane) const {
    const auto index = static_cast<size_t>(&lane - lanes_.data());
    return {stacks_ + index * kStackBytes + kPageBytes, kStackBytes - kPageBytes};
  }

  void forbid_behind_lds(bool forbids) {
    for (unsigned rank = 0; rank < launch_->cluster; ++rank) {
      char* const behind = lds_[rank] + launch_->lds_bytes;
      const size_t size = sizeof(lds_[rank]) - launch_->lds_bytes;
      forbids ? address_check::forbid(behind, size) : address_check::allow(behind, size);
    }
  }

  void release_stacks() {
    if (stacks_ == nullptr) return;
    address_check::allow(stacks_, num_stacks_ * kStackBytes);
    munmap(stacks_, num_stacks_ * kStackBytes);
    stacks_ = nullptr;
    num_stacks_ = 0;
  }

  void reserve(unsigned num_lanes) {
    if (num_lanes <= num_stacks_) return;
    release_stacks();
    void* memory = mmap(nullptr, num_lanes * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks_ = static_cast<char*>(memory);
    num_stacks_ = num_lanes;
    // NOTE: where pages are larger, a guard would take in the next lane's stack.
    if (static_cast<size_t>(sysconf(_SC_PAGESIZE)) == kPageBytes) {
      for (unsigned i = kGuardedLane; i < num_lanes; i += kWaveSize) {
        mprotect(stacks_ + i * kStackBytes, kPageBytes, PROT_NONE);
      }
    }
    lanes_.resize(num_lanes);
    fibers_.resize(num_lanes);
    waves_.resize(num_lanes);  // a workgroup's last wave may have as few as one lane
  }

  unsigned waves_per_workgroup() const { return (launch_->block + kWaveSize - 1) / kWaveSize; }
  Wave* waves_of(const Workgroup& workgroup) {
    return &waves_[workgroup.rank * waves_per_workgroup()];
  }

  void prepare_lanes(Workgroup& workgroup) {
    const unsigned block = launch_->block;
    Lane* const lanes = &lanes_[workgroup.rank * block];
    for (unsigned t = 0; t < block; ++t) {
      Lane& lane = lanes[t];
      lane.wave = &waves_of(workgroup)[t / kWaveSize];
      lane.index = t % kWaveSize;
      lane.thread_idx = t;
      const address_check::Stack stack = lane_stack(lane);
      address_check::allow(stack.bottom, stack.size);
      const size_t colour = (lane.index * kColourBytes) % kPageBytes & ~size_t{63};
      const auto index = static_cast<size_t>(&lane - lanes_.data());
      char* const stack_top = stacks_ + (index + 1) * kStackBytes - colour;
      lane.stack_pointer = prepare_fiber(fibers_[index], lane_main, stack_top, kUsableStackBytes);
    }
    for (unsigned w = 0; w < waves_per_workgroup(); ++w) {
      Wave& wave = waves_of(workgroup)[w];
      const unsigned num_lanes = std::min<unsigned>(kWaveSize, block - w * kWaveSize);
      wave.live = num_lanes == 64 ? ~LaneMask{0} : bit(num_lanes) - 1;
      wave.ready = wave.live;
      wave.arrived = wave.at_barrier = 0;
      wave.generation = 0;
      wave.syncs = 0;
      wave.lanes = lanes + w * kWaveSize;
      wave.workgroup = &workgroup;
    }
  }

  void run_cluster() {
    while (true) {
      bool any_passed = false;
      for (unsigned rank = 0; rank < launch_->cluster; ++rank) {
        Workgroup& workgroup = workgroups_[rank];
        for (unsigned w = 0; w < waves_per_workgroup(); ++w) {
          if (waves_of(workgroup)[w].ready != 0) run_wave(waves_of(workgroup)[w]);
          if (launch_->failed) return;
        }
        const Wave* const waiting = check_waiting(workgroup);
        if (launch_->failed) return;
        if (waiting == nullptr || waiting->waits_for_cluster) continue;
        ++workgroup.barriers_passed;
        make_ready(workgroup);
        any_passed = true;
      }
      if (!any_passed && !release_cluster()) return;
    }
  }

  void run_wave(Wave& wave) {
    current_workgroup = wave.workgroup;
    current_lane = &wave.lanes[__builtin_ctzll(wave.ready)];
    switch_to(&scheduler_, current_lane);
  }

  void make_ready(Workgroup& workgroup) {
    for (unsigned w = 0; w < waves_per_workgroup(); ++w) {
      Wave& wave = waves_of(workgroup)[w];
      wave.ready = wave.live;
      wave.at_barrier = 0;
    }
  }

  // Every wave of the workgroup is blocked or done: one that waits at its barrier, null if none does.
  const Wave* check_waiting(Workgroup& workgroup) {
    const Wave* waiting = nullptr;
    for (unsigned w = 0; w < waves_per_workgroup(); ++w) {
      const Wave& wave = waves_of(workgroup)[w];
      if (wave.arrived != 0) {
        launch_->record_error("lanes " + describe(wave.arrived) + " of wave " + std::to_string(w) +
                              " wait at " + describe(wave.site) + " for lanes " +
                              describe(wave.live & ~wave.arrived) + ", which wait at " +
                              describe(wave.barrier_site));
        return nullptr;
      }
      if (wave.live == 0) continue;
      if (waiting == nullptr) waiting = &wave;
      if (!(wave.barrier_site == waiting->barrier_site)) {
        launch_->record_error("waves of one workgroup wait at different barriers: " +
                              describe(waiting->barrier_site) + " and " +
                              describe(wave.barrier_site));
        return nullptr;
      }
    }
    return waiting;
  }

  // Every workgroup waits for the cluster or is done: lets them pass. False: nobody is left.
  bool release_cluster() {
    const Wave* first = nullptr;
    for (unsigned rank = 0; rank < launch_->cluster; ++rank) {
      const Wave* const waiting = check_waiting(workgroups_[rank]);
      if (waiting == nullptr) continue;
      if (first == nullptr) first = waiting;
      if (!(waiting->barrier_site == first->barrier_site)) {
        launch_->record_error("workgroups of one cluster wait at different barriers: " +
                              describe(first->barrier_site) + " and " +
                              describe(waiting->barrier_site));
        return false;
      }
    }
    if (first == nullptr) return false;
    for (unsigned rank = 0; rank < launch_->cluster; ++rank) {
      ++workgroups_[rank].cluster_barriers_passed;
      make_ready(workgroups_[rank]);
    }
    return true;
  }

  Launch* launch_ = nullptr;
  void* scheduler_ = nullptr;
  address_check::Stack own_stack_ = address_check::thread_stack();
  char* stacks_ = nullptr;
  size_t num_stacks_ = 0;
  std::vector<Lane> lanes_;
  std::vector<FiberContext> fibers_;
  std::vector<Wave> waves_;
  Workgroup workgroups_[kMaxClusterSize];
  alignas(64) char lds_[kMaxClusterSize][kLdsBytesPerBlock + kLdsGuardBytes];
};

Machine& this_machine() {
  static thread_local std::unique_ptr<Machine> machine;
  if (!machine) machine = std::make_unique<Machine>();
  return *machine;
}

void lane_main() {
  address_check::after_switch(nullptr);
  Machine& machine = this_machine();
  machine.call_body();
  machine.finish_lane(*current_lane);
  __builtin_unreachable();  // a lane that has left is never resumed
}

// The OS threads that help the caller. They sleep between launches; a forked child, which has
// none of its parent's threads, starts its own.
class Helpers {
 public:
  // Runs `launch` on the caller and up to `count` helpers. A helper that wakes up after the caller
  // has done all the work is not waited for: on busy cores that would cost milliseconds.
  void run(Launch& launch, unsigned count) {
    std::lock_guard<std::mutex> one_launch_at_a_time(launch_mutex_);
    while (threads_ < count) {
      std::thread([this, id = threads_] { loop(id); }).detach();
      ++threads_;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      launch_ = &launch;
      wanted_ = count;
      ++generation_;
    }
    wake_.notify_all();
    run_here(launch);
    std::unique_lock<std::mutex> lock(mutex_);
    launch_ = nullptr;
    done_.wait(lock, [this] { return running_ == 0; });
  }

  // Keeps every other launch of the process out as long as the lock is held.
  std::unique_lock<std::mutex> alone() { return std::unique_lock<std::mutex>(launch_mutex_); }

  static void run_here(Launch& launch) {
    try {
      this_machine().run(launch);
    } catch (const std::exception& error) {
      launch.record_error(error.what());
    }
  }

 private:
  void loop(unsigned id) {
    unsigned seen = 0;
    while (true) {
      Launch* launch;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (id >= wanted_ || launch_ == nullptr) continue;
        launch = launch_;
        ++running_;
      }
      run_here(*launch);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex launch_mutex_, mutex_;
  std::condition_variable wake_, done_;
  Launch* launch_ = nullptr;
  unsigned threads_ = 0, wanted_ = 0, running_ = 0, generation_ = 0;
};

// Never destroyed: its threads outlive static destructors, and a child's copy is unusable.
std::atomic<Helpers*> helpers{nullptr};

Helpers& the_helpers() {
  static const bool registered = [] {
    helpers = new Helpers;
    pthread_atfork(nullptr, nullptr, [] { helpers = new Helpers; });
    return true;
  }();
  (void)registered;
  return *helpers;
}

}  // namespace

void yield_lane() {
  Lane* lane = current_lane;
  const Wave& wave = *lane->wave;
  if (wave.ready == 0) {
    this_machine().switch_to(&lane->stack_pointer, nullptr);
    return;
  }
  const LaneMask behind = wave.ready & ~(bit(lane->index) | (bit(lane->index) - 1));
  Lane* next = &wave.lanes[__builtin_ctzll(behind != 0 ? behind : wave.ready)];
  current_lane = next;
#if defined(AITER_ADDRESS_CHECK)
  this_machine().switch_to(&lane->stack_pointer, next);
#else
  switch_fiber(&lane->stack_pointer, next->stack_pointer);
#endif
}

void complete_collective(Wave& wave) {
  const unsigned parity = wave.generation & 1;
  wave.participants[parity] = wave.live;
  if (wave.combine != nullptr) wave.combine(wave, parity, wave.live);
  wave.ready |= wave.live;
  wave.arrived = 0;
  ++wave.generation;
}

namespace {

void wait_at_barrier(const Site& site, bool waits_for_cluster) {
  Lane* lane = current_lane;
  Wave& wave = *lane->wave;
  if (wave.at_barrier == 0) {
    wave.barrier_site = site;
    wave.waits_for_cluster = waits_for_cluster;
  } else if (!(wave.barrier_site == site)) {
    fail(site, "lanes of one wave wait at different barriers");
  }
  wave.at_barrier |= bit(lane->index);
  wave.ready &= ~bit(lane->index);
  yield_lane();
}

}  // namespace

void barrier(const Site& site) { wait_at_barrier(site, false); }
void cluster_barrier(const Site& site) { wait_at_barrier(site, true); }

void* in_workgroup(void* address, int rank, const Site& site) {
  char* const lds = this_machine().lds(rank);
  if (lds == nullptr) fail(site, "reaches for a workgroup outside the cluster");
  if (lds != current_workgroup->lds && current_workgroup->cluster_barriers_passed == 0) {
    fail(site, "reaches for a workgroup that may not have started");
  }
  return lds + (static_cast<char*>(address) - current_workgroup->lds);
}

bool is_internal(const void* address) { return this_machine().owns(address); }

const Workgroup* owner_of_lds(const void* address) { return this_machine().owner_of_lds(address); }

void fail(const std::string& error) { this_machine().abandon(error); }

void fail(const Site& site, const char* what) {
  const Lane& lane = *current_lane;
  const bool at_barrier = lane.wave->at_barrier != 0;
  fail(std::string(what) + ": thread " + std::to_string(lane.thread_idx) + " of workgroup " +
       std::to_string(current_workgroup->block_idx) + " at " + describe(site) +
       ", an earlier one at " + describe(at_barrier ? lane.wave->barrier_site : lane.wave->site));
}

void fence(Fence kind, Scope scope) {
  if (observer != nullptr) observer->fence(kind, scope);
  if (scope == Scope::workgroup) return;  // which one OS thread runs
  std::atomic_thread_fence(kind == Fence::release ? std::memory_order_release
                                                  : std::memory_order_acquire);
}

uint32_t arrive(uint32_t* ticket, uint32_t num_workgroups) {
  if (observer != nullptr) observer->arrives(ticket);
  const uint32_t last = num_workgroups - 1;
  uint32_t old = __atomic_load_n(ticket, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(ticket, &old, old >= last ? 0 : old + 1, true,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

unsigned num_cores() {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return CPU_COUNT(&cores);
  return std::max(1u, std::thread::hardware_concurrency());
}

void launch(unsigned grid, unsigned block, size_t lds_bytes, unsigned cluster, BodyFn body,
            const void* closure) {
  if (block == 0 || block > kMaxThreadsPerBlock || lds_bytes > kLdsBytesPerBlock) {
    throw std::runtime_error("hip_cpu: a launch of " + std::to_string(block) + " threads with " +
                             std::to_string(lds_bytes) + " bytes of LDS is out of range");
  }
  if (cluster == 0 || cluster > kMaxClusterSize || grid % cluster != 0) {
    throw std::runtime_error("hip_cpu: a launch of " + std::to_string(grid) +
                             " workgroups in clusters of " + std::to_string(cluster) +
                             " is out of range");
  }
  Launch state(grid, block, lds_bytes, cluster, body, closure);
  const unsigned workers = observer != nullptr ? 1 : std::min(grid / cluster, num_cores());
  std::unique_lock<std::mutex> alone;  // what an observer remembers is of one launch
  if (observer != nullptr) {
    alone = the_helpers().alone();
    observer->launch_begins();
  }
  if (workers <= 1) {
    Helpers::run_here(state);
  } else {
    the_helpers().run(state, workers - 1);
  }
  if (!state.failed && observer != nullptr) {
    const std::string error = observer->launch_ends();
    if (!error.empty()) state.record_error(error);
  }
  if (state.failed) throw std::runtime_error("hip_cpu: " + state.error);
}

}  // namespace hip_cpu
