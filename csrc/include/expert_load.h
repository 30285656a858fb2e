// How many tokens every expert got: load[e] = number of entries of topk_ids that are e.
//
//   topk_ids i32 [M, K], contiguous; ids outside [0, E) are not counted
//   load i32 [E]
//
// One workgroup: all threads clear E counters in LDS, count their share of the entries with LDS
// atomics, and write the counters out; a barrier between the phases. It is the smallest op that has
// everything an op has, and the example of docs/adding_an_op.md.
#pragma once

#include "device/wave.h"

namespace aiter {

constexpr int kExpertLoadThreads = 256;

struct ExpertLoadParams {
  const int32_t* topk_ids;
  uint32_t num_entries;
  int num_experts;
  int32_t* load;
};

__global__ void __launch_bounds__(kExpertLoadThreads) expert_load_kernel(ExpertLoadParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  uint32_t* const lds_counts = reinterpret_cast<uint32_t*>(lds_base);
  for (int e = threadIdx.x; e < p.num_experts; e += blockDim.x) lds_counts[e] = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < p.num_entries; i += blockDim.x) {
    const uint32_t expert_idx = static_cast<uint32_t>(p.topk_ids[i]);
    if (expert_idx < static_cast<uint32_t>(p.num_experts)) atomicAdd(&lds_counts[expert_idx], 1u);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.num_experts; e += blockDim.x) {
    p.load[e] = static_cast<int32_t>(lds_counts[e]);
  }
}

}  // namespace aiter
