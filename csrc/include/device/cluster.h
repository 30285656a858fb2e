// What the workgroups of a launch, and the launches of a stream, have to do with each other.
//
//   kMaxClusterSize              workgroups that can form a cluster; 1: the target has none
//   kLaunchesOverlap             a launch may start up while the one before it still runs
//   kCanHandOver                 kernels have what it takes to hand over through memory (handover.h); not where
//                                there are clusters, as it is 350 to 400 of a kernel's 2,300 to 3,200
//                                instructions there (sm_90)
//   cluster_arrive(), _wait()    a barrier over the cluster in two halves, for "all have started": what
//                                was written before the first half need not be visible behind the second
//   open_inbox(inbox)            by one thread before cluster_arrive(): the workgroup can be sent to
//   expect_bytes(inbox, n)       by one thread, a __syncthreads() behind open_inbox() and one before
//                                wait_for_inbox(): n bytes will have come, at least one
//   cluster_send(to, inbox, rank, x)  by any thread behind cluster_wait(): stores x into the LDS of the
//                                cluster's workgroup `rank`, at the place that `to` has in the own one
//   wait_for_inbox(inbox)        by all threads: everything has come, and is visible
//   wait_for_earlier_launch()    before the first access to memory that earlier launches use
//   let_next_launch_begin()      the next launch of the stream may start up, and then wait
//
// A cluster's workgroups run at the same time on neighbouring compute units, which makes waiting for
// each other safe; workgroup b of the grid has rank b % size. A workgroup's LDS may be written to
// once all workgroups of its cluster have started, and only while it waits for its inbox or has not
// got there: one that has left is not waited for.
//
//                            sm_90                                       cpu        rocm, older cuda
//   cluster_arrive, _wait    barrier.cluster.arrive.relaxed / .wait      1 switch   nothing
//   open_inbox               mbarrier.init                               nothing    nothing
//   expect_bytes             mbarrier.arrive.expect_tx                   nothing    nothing
//   cluster_send             mapa + st.async.v4                          a store    not called
//   wait_for_inbox           mbarrier.try_wait                           1 switch   not called
//   wait_for_earlier_launch  griddepcontrol.wait                         nothing    nothing
//   let_next_launch_begin    griddepcontrol.launch_dependents            nothing    nothing
//   prefetch_early           cp.async.bulk.prefetch.L2                   nothing    nothing
//
// prefetch_early(address, n) alone may come before the wait for the earlier launch: n bytes, as far as whole 16 go, come to
// the level 2 cache and no further. All compute units share it, so a load behind the wait sees what the earlier launch
// wrote. `address` is on a 16-byte boundary.
//
// AITER_WITHOUT_CLUSTERS has a GPU that has clusters run the kernels of those that have none, for tests of the
// hand-over (`pytest --without-clusters`).
//
// Rejected, as what the workgroups of a cluster may share: a ticket in global memory that lets
// the last workgroup do the rest. The hand-over is four trips to memory one after the other, and the
// ticket has to be zero before the launch and must not be shared by streams or graphs that run at
// the same time. LDS belongs to the launch. Rejected as well: st.shared::cluster between two barriers of
// the cluster with release and acquire. Each of these is a MEMBAR.ALL.GPU of every thread, 770 cycles
// with 128 threads and 1,400 with 1,024, where relaxed it takes 80 and 150 (H100, 2026-11-23).
#pragma once

#include <cstdint>

#include "device/platform.h"

namespace aiter {

// Counts what the cluster's workgroups send, in LDS on an 8-byte boundary.
using Inbox = uint64_t;

#if defined(AITER_TARGET_CPU)

constexpr int kMaxClusterSize = hip_cpu::kMaxClusterSize;
constexpr bool kLaunchesOverlap = false;
constexpr bool kCanHandOver = true;

inline void cluster_arrive() {}

inline void cluster_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  hip_cpu::cluster_barrier(hip_cpu::Site{"cluster_wait", file, line});
}

inline void open_inbox(Inbox*) {}
inline void expect_bytes(Inbox*, uint32_t) {}

inline void cluster_send(FourWords* to, Inbox*, int rank, const FourWords& x,
                         const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const hip_cpu::Site site{"cluster_send", file, line};
  *static_cast<FourWords*>(hip_cpu::in_workgroup(to, rank, site)) = x;
}

inline void wait_for_inbox(Inbox*, const char* file = __builtin_FILE(),
                           int line = __builtin_LINE()) {
  hip_cpu::cluster_barrier(hip_cpu::Site{"wait_for_inbox", file, line});
}

inline void wait_for_earlier_launch() {}
inline void let_next_launch_begin() {}
inline void prefetch_early(const void*, uint32_t) {}

#elif defined(AITER_TARGET_CUDA) && !defined(AITER_WITHOUT_CLUSTERS) && \
    (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900)

constexpr int kMaxClusterSize = 16;
constexpr bool kLaunchesOverlap = true;
constexpr bool kCanHandOver = false;

__device__ __forceinline__ uint32_t lds_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void open_inbox(Inbox* inbox) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n"
      "fence.mbarrier_init.release.cluster;" ::"r"(lds_address(inbox))
      : "memory");
}

__device__ __forceinline__ void expect_bytes(Inbox* inbox, uint32_t num_bytes) {
  asm volatile(
      "{\n"
      ".reg .b64 state;\n"
      "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 state, [%0], %1;\n"
      "}" ::"r"(lds_address(inbox)),
      "r"(num_bytes)
      : "memory");
}

__device__ __forceinline__ void cluster_send(FourWords* to, Inbox* inbox, int rank,
                                             const FourWords& x) {
  asm volatile(
      "{\n"
      ".reg .b32 remote, remote_inbox;\n"
      "mapa.shared::cluster.u32 remote, %0, %2;\n"
      "mapa.shared::cluster.u32 remote_inbox, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
      "[remote], {%3, %4, %5, %6}, [remote_inbox];\n"
      "}" ::"r"(lds_address(to)),
      "r"(lds_address(inbox)), "r"(rank), "r"(x.word[0]), "r"(x.word[1]), "r"(x.word[2]),
      "r"(x.word[3])
      : "memory");
}

__device__ __forceinline__ void wait_for_inbox(Inbox* inbox) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%0], 0;\n"
      "@!complete bra again;\n"
      "}" ::"r"(lds_address(inbox))
      : "memory");
}

__device__ __forceinline__ void wait_for_earlier_launch() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void let_next_launch_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ void prefetch_early(const void* address, uint32_t num_bytes) {
  const uint32_t whole = num_bytes / 16 * 16;
  if (whole == 0) return;
  asm volatile(
      "cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(address)),
      "r"(whole)
      : "memory");
}

#else

constexpr int kMaxClusterSize = 1;
constexpr bool kLaunchesOverlap = false;
constexpr bool kCanHandOver = true;

__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void open_inbox(Inbox*) {}
__device__ __forceinline__ void expect_bytes(Inbox*, uint32_t) {}
__device__ __forceinline__ void cluster_send(FourWords*, Inbox*, int, const FourWords&) {}
__device__ __forceinline__ void wait_for_inbox(Inbox*) {}
__device__ __forceinline__ void wait_for_earlier_launch() {}
__device__ __forceinline__ void let_next_launch_begin() {}
__device__ __forceinline__ void prefetch_early(const void*, uint32_t) {}

#endif

}  // namespace aiter
