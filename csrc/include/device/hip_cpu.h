// HIP on the CPU: how a kernel's threads are executed when there is no GPU.
//
// A kernel compiled for the cpu target is the same source as for rocm and cuda. Each GPU thread
// ("lane") is a fiber with its own stack; the lanes of one workgroup share one OS thread, and the
// workgroups of a launch are spread over the cores. Nothing is approximated: a lane really stops at
// a wave operation until every live lane of its wave has arrived, and at __syncthreads() until every
// live lane of the workgroup has, LDS really is private to a workgroup and holds garbage at its start.
//
//   launch(grid, block, lds_bytes, cluster, body)
//     OS threads   take clusters from a shared counter, one at a time
//     workgroup    runs its waves in turn, each until all its lanes are blocked or done
//     wave         a ring of lanes; a lane that blocks switches straight to the next ready lane
//
// A wave operation (`collective`) costs one stack switch per lane, whatever it computes: the lane
// posts a word, and the last one to arrive combines all words and goes on without waiting. So a
// reduction is one switch and not log2(wave) of them, which is why wave.h asks for whole reductions
// and scans instead of building them from shuffles. Two sets of slots alternate: a lane can be at
// most one operation ahead of its wave.
//
// What is an error on a GPU, or hangs it, raises here with the kernel's file and line: lanes of a
// wave that wait at different wave operations, lanes that wait for others that are at a barrier or
// have left, a barrier that not all lanes reach, a shuffle from a lane that has left. Data races are
// found by the same means when a module is compiled for it (cpu/race_check.cpp).
//
// Rejected: one OS thread per lane (a barrier costs tens of microseconds); running the lanes of a
// wave as vector code (needs another kernel source, or a compiler of our own); ucontext where there
// is a hand-written switch (it makes two system calls per switch).
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#ifndef AITER_WAVE_SIZE
#error "the cpu target needs -DAITER_WAVE_SIZE=32 or 64"
#endif

#define __global__
#define __device__
#define __host__
#undef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace hip_cpu {

constexpr int kWaveSize = AITER_WAVE_SIZE;
static_assert(kWaveSize == 32 || kWaveSize == 64, "wave width is 32 or 64");
constexpr int kMaxThreadsPerBlock = 1024;
constexpr int kLdsBytesPerBlock = 64 * 1024;  // what gfx90a and gfx942 give a workgroup
constexpr int kMaxClusterSize = 16;           // workgroups, as on sm_90

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Where in the kernel's source an operation stands; compared by value.
struct Site {
  const char* operation;
  const char* file;
  int line;
  bool operator==(const Site& other) const {
    return line == other.line && operation == other.operation && file == other.file;
  }
};

using LaneMask = uint64_t;

struct Wave;
// Combines the posted words of `lanes` into wave.result[parity].
using CombineFn = void (*)(Wave& wave, unsigned parity, LaneMask lanes);

struct Lane {
  void* stack_pointer;
  Wave* wave;
  unsigned index;  // in the wave
  unsigned thread_idx;
};

struct Workgroup;

struct Wave {
  LaneMask live;        // lanes that have not returned from the kernel
  LaneMask ready;       // live lanes that can run
  LaneMask arrived;     // lanes that wait at the current wave operation
  LaneMask at_barrier;  // lanes that wait at __syncthreads, or at a barrier of the cluster
  unsigned generation;  // wave operations completed
  unsigned syncs;       // of these, the ones that order memory
  CombineFn combine;
  Site site;
  Site barrier_site;
  bool waits_for_cluster;  // at its barrier
  Lane* lanes;
  Workgroup* workgroup;
  LaneMask participants[2];
  uint64_t result[2];
  alignas(64) uint64_t slot[2][kWaveSize];
};

struct Workgroup {
  unsigned block_idx, block_dim, grid_dim;
  char* lds;
  size_t lds_bytes;
  unsigned rank;  // in its cluster
  unsigned barriers_passed, cluster_barriers_passed;
};

// The running lane and its workgroup. initial-exec: one load, no call into the dynamic linker.
extern thread_local Lane* current_lane __attribute__((tls_model("initial-exec")));
extern thread_local Workgroup* current_workgroup __attribute__((tls_model("initial-exec")));

// Blocks the running lane and runs the next ready one of its wave (or the scheduler).
void yield_lane();
// Ends the launch with an error; never returns to the lane.
[[noreturn]] void fail(const Site& site, const char* what);
void complete_collective(Wave& wave);
void barrier(const Site& site);
void cluster_barrier(const Site& site);
// The place in the LDS of the cluster's workgroup `rank` that `address` is in the running one's.
void* in_workgroup(void* address, int rank, const Site& site);

inline LaneMask bit(unsigned lane) { return LaneMask{1} << lane; }

// Posts `word`, waits for the wave; returns which half of the slots holds this operation.
inline unsigned collective(uint64_t word, CombineFn combine, const Site& site) {
  Lane* lane = current_lane;
  Wave& wave = *lane->wave;
  const unsigned parity = wave.generation & 1;
  wave.slot[parity][lane->index] = word;
  if (wave.arrived == 0) {
    wave.site = site;
    wave.combine = combine;
  } else if (!(wave.site == site)) {
    fail(site, "lanes of one wave wait at different wave operations");
  }
  wave.arrived |= bit(lane->index);
  if (wave.arrived == wave.live) {
    complete_collective(wave);
  } else {
    wave.ready &= ~bit(lane->index);
    yield_lane();
  }
  return parity;
}

template <typename T>
inline uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "at most 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}

template <typename T>
inline T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

struct ThreadIdx {
  struct X {
    operator unsigned() const { return current_lane->thread_idx; }
  } x;
};
struct BlockIdx {
  struct X {
    operator unsigned() const { return current_workgroup->block_idx; }
  } x;
};
struct BlockDim {
  struct X {
    operator unsigned() const { return current_workgroup->block_dim; }
  } x;
};
struct GridDim {
  struct X {
    operator unsigned() const { return current_workgroup->grid_dim; }
  } x;
};

using BodyFn = void (*)(const void* closure);

// Runs `grid` workgroups of `block` lanes, `cluster` of them at a time, to the end; throws
// std::runtime_error on a kernel's fault.
void launch(unsigned grid, unsigned block, size_t lds_bytes, unsigned cluster, BodyFn body,
            const void* closure);

// What a fence orders, and for whom.
enum class Fence { release, acquire };
enum class Scope { workgroup, device };

// What a checker of memory accesses is told; see cpu/race_check.cpp. With one, a launch stays on the
// calling thread.
struct Observer {
  void (*launch_begins)();
  void (*workgroup_begins)(const Workgroup& workgroup);
  void (*fence)(Fence kind, Scope scope);
  void (*arrives)(const uint32_t* ticket);
  std::string (*launch_ends)();  // what is wrong; empty for nothing
};
extern const Observer* observer;  // null, or set before the first launch

// Whether an address belongs to the execution layer itself: lanes' stacks and bookkeeping.
bool is_internal(const void* address);
// The workgroup of the running cluster whose LDS the address lies in; null for other memory.
const Workgroup* owner_of_lds(const void* address);
[[noreturn]] void fail(const std::string& error);

void fence(Fence kind, Scope scope);
// Adds one to a ticket, or sets it from num_workgroups - 1 to 0; returns what it was.
uint32_t arrive(uint32_t* ticket, uint32_t num_workgroups);

// Number of OS threads that a launch may use: the cores this process may run on.
unsigned num_cores();

}  // namespace hip_cpu

inline constexpr hip_cpu::ThreadIdx threadIdx{};
inline constexpr hip_cpu::BlockIdx blockIdx{};
inline constexpr hip_cpu::BlockDim blockDim{};
inline constexpr hip_cpu::GridDim gridDim{};

#define AITER_SITE(operation) (hip_cpu::Site{operation, __builtin_FILE(), __builtin_LINE()})

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  hip_cpu::barrier(hip_cpu::Site{"__syncthreads", file, line});
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }

template <typename T>
inline T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <typename T>
inline T atomicOr(T* address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
