// Work that goes from several workgroups of a launch to the one of them that is done last, through memory.
//
//   release_to_device()      by all threads, before a barrier: what they stored so far is there for the workgroup
//                            that comes after
//   arrive(ticket, n)        by one thread of each of n workgroups, behind that barrier: how many came before, so
//                            n - 1 in the last
//   acquire_from_device()    by all threads of that one, behind a barrier that follows: what the others stored
//                            before they arrived is seen by what is loaded from here on
//
// Nobody waits for anybody, so it does not matter how many of the workgroups run at the same time, or in which
// order they start. A ticket is a word of device memory that is zero before a launch and, as it counts from
// n - 1 to 0, again behind it, so nothing has to be reset. It is one that no other launch has that may run at the
// same time (handover_tickets.h): two that shared one would take each other's arrivals for their own.
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

namespace aiter {

#if defined(AITER_TARGET_CPU)

inline void release_to_device() { hip_cpu::fence(hip_cpu::Fence::release, hip_cpu::Scope::device); }
inline void acquire_from_device() {
  hip_cpu::fence(hip_cpu::Fence::acquire, hip_cpu::Scope::device);
}
inline uint32_t arrive(uint32_t* ticket, uint32_t num_workgroups) {
  return hip_cpu::arrive(ticket, num_workgroups);
}

#else

#if defined(AITER_TARGET_ROCM)
__device__ __forceinline__ void release_to_device() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");
}
__device__ __forceinline__ void acquire_from_device() {
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent");
}
__device__ __forceinline__ uint32_t arrive(uint32_t* ticket, uint32_t num_workgroups) {
  const auto in_memory = (__attribute__((address_space(1))) uint32_t*)ticket;
  return __builtin_amdgcn_atomic_inc32(in_memory, num_workgroups - 1, __ATOMIC_RELAXED, "agent");
}
#else
__device__ __forceinline__ void release_to_device() { __threadfence(); }
__device__ __forceinline__ void acquire_from_device() { __threadfence(); }
__device__ __forceinline__ uint32_t arrive(uint32_t* ticket, uint32_t num_workgroups) {
  return atomicInc(ticket, num_workgroups - 1);
}
#endif

#endif

}  // namespace aiter
