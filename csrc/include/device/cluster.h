// What the workgroups of a launch, and the launches of a stream, have to do with each other.
//
//   kMaxClusterSize              workgroups that can form a cluster; 1: the target has none
//   cluster_arrive(), _wait()    a barrier over the cluster in two halves; what the cluster's lanes
//                                wrote before the first half is visible behind the second
//   cluster_store(word, rank, x) stores x into the LDS of the cluster's workgroup `rank`, at the place
//                                that `word` has in the own one; visible behind the next barrier
//   wait_for_earlier_launch()    before the first access to memory that earlier launches use
//   let_next_launch_begin()      the next launch of the stream may start up, and then wait
//
// A cluster's workgroups run at the same time on neighbouring compute units, which makes waiting for
// each other safe; workgroup b of the grid has rank b % size. A workgroup's LDS may be written to
// once all workgroups of its cluster have started, that is, behind a first barrier.
//
//                            sm_90                                       cpu        rocm, older cuda
//   cluster_arrive, _wait    barrier.cluster.arrive / .wait              1 switch   nothing
//   cluster_store            mapa + st.shared::cluster                   a store    not called
//   wait_for_earlier_launch  griddepcontrol.wait                         nothing    nothing
//   let_next_launch_begin    griddepcontrol.launch_dependents            nothing    nothing
//
// Rejected, as what several workgroups of one launch may share: a ticket in global memory that lets
// the last workgroup do the rest. The hand-over is four trips to memory one after the other, and the
// ticket has to be zero before the launch and must not be shared by streams or graphs that run at
// the same time. LDS belongs to the launch.
#pragma once

#include <cstdint>

#include "device/platform.h"

namespace aiter {

#if defined(AITER_TARGET_CPU)

constexpr int kMaxClusterSize = hip_cpu::kMaxClusterSize;

inline void cluster_arrive() {}  // what is visible behind a barrier is so behind its second half

inline void cluster_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  hip_cpu::cluster_barrier(hip_cpu::Site{"cluster_wait", file, line});
}

inline void cluster_store(uint32_t* word, int rank, uint32_t x, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  const hip_cpu::Site site{"cluster_store", file, line};
  *static_cast<uint32_t*>(hip_cpu::in_workgroup(word, rank, site)) = x;
}

inline void wait_for_earlier_launch() {}
inline void let_next_launch_begin() {}

#elif defined(AITER_TARGET_CUDA) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900)

constexpr int kMaxClusterSize = 8;

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_store(uint32_t* word, int rank, uint32_t x) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.u32 [remote], %2;\n"
      "}" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(word))),
      "r"(rank), "r"(x)
      : "memory");
}

__device__ __forceinline__ void wait_for_earlier_launch() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void let_next_launch_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

#else

constexpr int kMaxClusterSize = 1;

__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void cluster_store(uint32_t*, int, uint32_t) {}
__device__ __forceinline__ void wait_for_earlier_launch() {}
__device__ __forceinline__ void let_next_launch_begin() {}

#endif

}  // namespace aiter
