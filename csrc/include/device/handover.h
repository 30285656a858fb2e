// Work that goes from several workgroups of a launch to the one of them that is done last, through memory.
//
//   release_to_device()      by all threads, before a barrier: what they stored so far is there for the workgroup
//                            that comes after
//   arrive(ticket, n)        by one thread of each of n workgroups, behind that barrier: whether this is the last
//   acquire_from_device()    by all threads of that one, behind a barrier that follows: what the others stored
//                            before they arrived is seen by what is loaded from here on
//
// Nobody waits for anybody, so it does not matter how many of the workgroups run at the same time, or in which
// order they start. A ticket is a word of device memory that is zero before a launch and, as it counts from
// n - 1 to 0, again behind it: nothing has to be reset, and if two launches ever shared one, it would be zero
// again all the same. Whose it is decides the host (ticket_for): a launch needs one that no other has that may
// run at the same time.
//
//   called for a stream       the stream's own, since its launches run one after the other
//   recorded into a graph     a new one, which stays with the record: two graphs that are replayed at the same
//                             time have two, and one is not replayed beside itself
//   cpu                       the calling thread's own
//
// Streams and records are counted for the life of the process; tickets that lie in static memory of the module,
// zero when it is loaded, last for kNumTickets of them, and then it is an error. A launch that a GPU aborts
// takes its context and with that the tickets along; on the CPU forget_arrivals() sets one back.
//
//                         rocm                          cuda             cpu
//   release_to_device     fence, release, agent         __threadfence    fence, release
//   arrive                atomic_inc, relaxed, agent    atomicInc        atomic add, relaxed
//   acquire_from_device   fence, acquire, agent         __threadfence    fence, acquire
//
// On gfx942 and gfx950, whose dies have a level 2 cache each, the fences are a write-back and an invalidation
// of it (op_tests/rocm/test_memory_scopes.py). All threads make them: within a compute unit, a barrier alone
// does not promise that stores of other waves have reached that cache.
//
// Rejected: tickets in memory of the call, such as the ends of its outputs, as nobody has cleared that, and of
// workgroups that start with unknown words none can be told from a leftover; tickets by the address of the
// outputs in a table, which is exclusive to a launch but takes waiting for others where two addresses meet in
// the table; counts that each workgroup sends to all others, which would divide the sort as well, but waits
// for workgroups that may not have started.
#pragma once

#include <cstdint>

#include "device/platform.h"

#if !defined(AITER_TARGET_CPU)
#include <mutex>
#include <thread>
#include <unordered_map>
#endif

namespace aiter {

#if defined(AITER_TARGET_CPU)

inline void release_to_device() { hip_cpu::fence(hip_cpu::Fence::release, hip_cpu::Scope::device); }
inline void acquire_from_device() {
  hip_cpu::fence(hip_cpu::Fence::acquire, hip_cpu::Scope::device);
}
inline bool arrive(uint32_t* ticket, uint32_t num_workgroups) {
  return hip_cpu::arrive(ticket, num_workgroups);
}

inline uint32_t* ticket_for(int, hipStream_t) {
  static thread_local uint32_t ticket = 0;
  return &ticket;
}
inline void forget_arrivals(uint32_t* ticket) { *ticket = 0; }

#else

#if defined(AITER_TARGET_ROCM)
__device__ __forceinline__ void release_to_device() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");
}
__device__ __forceinline__ void acquire_from_device() {
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent");
}
__device__ __forceinline__ bool arrive(uint32_t* ticket, uint32_t num_workgroups) {
  const auto in_memory = (__attribute__((address_space(1))) uint32_t*)ticket;
  return __builtin_amdgcn_atomic_inc32(in_memory, num_workgroups - 1, __ATOMIC_RELAXED, "agent") ==
         num_workgroups - 1;
}
#else
__device__ __forceinline__ void release_to_device() { __threadfence(); }
__device__ __forceinline__ void acquire_from_device() { __threadfence(); }
__device__ __forceinline__ bool arrive(uint32_t* ticket, uint32_t num_workgroups) {
  return atomicInc(ticket, num_workgroups - 1) == num_workgroups - 1;
}
#endif

constexpr uint32_t kNumTickets = 1 << 18;
static __device__ uint32_t handover_tickets[kNumTickets];

// Tickets of one device that have been given out.
class Tickets {
 public:
  explicit Tickets(int device) {
    const DeviceGuard guard(device);
    void* address = nullptr;
    check_runtime(hipGetSymbolAddress(&address, HIP_SYMBOL(handover_tickets)),
                  "asking for the tickets of a hand-over");
    first_ = static_cast<uint32_t*>(address);
  }

  uint32_t* of(hipStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (is_recorded(stream)) return next();
    // NOTE: the handle 2 is another stream in each thread of the host.
    const bool is_of_thread = reinterpret_cast<uintptr_t>(stream) == 2;
    const size_t thread =
        is_of_thread ? std::hash<std::thread::id>()(std::this_thread::get_id()) : 0;
    uint32_t*& ticket = by_stream_[{stream, thread}];
    if (ticket == nullptr) ticket = next();
    return ticket;
  }

 private:
  struct Key {
    hipStream_t stream;
    size_t thread;
    bool operator==(const Key& other) const {
      return stream == other.stream && thread == other.thread;
    }
  };
  struct Hash {
    size_t operator()(const Key& key) const {
      return std::hash<void*>()(static_cast<void*>(key.stream)) ^ key.thread;
    }
  };

  static bool is_recorded(hipStream_t stream) {
    hipStreamCaptureStatus status = hipStreamCaptureStatusNone;
    check_runtime(hipStreamIsCapturing(stream, &status), "asking whether a stream is captured");
    return status != hipStreamCaptureStatusNone;
  }

  uint32_t* next() {
    if (used_ == kNumTickets) {
      throw std::runtime_error("hand-over: expected at most " + std::to_string(kNumTickets) +
                               " streams and recorded calls in a process, got one more; pass"
                               " handover_size=1");
    }
    return first_ + used_++;
  }

  std::mutex mutex_;
  std::unordered_map<Key, uint32_t*, Hash> by_stream_;
  uint32_t* first_;
  uint32_t used_ = 0;
};

inline uint32_t* ticket_for(int device, hipStream_t stream) {
  // NOTE: never destroyed, as launches may be made while static objects are.
  static std::mutex mutex;
  static auto& by_device = *new std::unordered_map<int, Tickets*>;
  Tickets* tickets = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    Tickets*& entry = by_device[device];
    if (entry == nullptr) entry = new Tickets(device);
    tickets = entry;
  }
  return tickets->of(stream);
}

// A launch that failed has not started.
inline void forget_arrivals(uint32_t*) {}

#endif

}  // namespace aiter
