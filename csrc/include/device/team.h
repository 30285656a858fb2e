// The first waves of a workgroup as a team with barriers of its own, so that its last wave can do something else.
//
//   Team{n}.sync()     a barrier of the threads below n, which are whole waves. Those from n on do not come to it, and
//                      leave when they are done
//
// On CUDA it is a barrier of its own, of n threads. Elsewhere the team waits until the others have left, as a barrier of the
// workgroup counts those that are there.
#pragma once

#include "device/platform.h"
#include "device/wave.h"

namespace aiter {

struct Team {
  int num_threads;

#if defined(AITER_TARGET_CUDA)
  __device__ __forceinline__ void sync() const {
    asm volatile("barrier.sync 1, %0;" ::"r"(num_threads) : "memory");
  }
#elif defined(AITER_TARGET_CPU)
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    __syncthreads(file, line);
  }
#else
  __device__ __forceinline__ void sync() const { __syncthreads(); }
#endif
};

}  // namespace aiter
