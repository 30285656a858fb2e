// The fused launch by any rule, in any id format, and with its top-k as outputs of their own.
//
// All of fused_topk_moe_sorting.h, with rows of rule_topk.h. These are kernels of their own, in a translation unit
// of their own, so that those of plain softmax have neither more registers nor more instructions, and that both
// compile at the same time.
//
//   topk_weights f32 [M, K + S], topk_ids i32 [M, K + S]   as topk_routing writes them; null for none
//
// The sort sees E + S + Z experts and K + S slots. In the slot format zero experts are left out like those that
// expert_mask leaves out, and the mask has E + S entries.
#pragma once

#include "fused_topk_moe_sorting.h"
#include "rule_topk.h"

namespace aiter {

struct RuleSink : FusedSink {
  float* out_weights;  // of the workgroup's first row; null for none
  int32_t* out_ids;
  int64_t weights_stride, ids_stride;

  __device__ __forceinline__ void put(int k, int id, float weight) {
    FusedSink::put(k, static_cast<uint32_t>(id), weight);
    if (out_weights == nullptr) return;
    out_weights[row * weights_stride + k] = weight;
    out_ids[row * ids_stride + k] = id;
  }
  template <typename F>
  __device__ __forceinline__ void finish(int k, F f) {
    const float weight = f(weights[k]);
    weights[k] = weight;
    if (out_weights != nullptr) out_weights[row * weights_stride + k] = weight;
  }
};

// What these kernels have beside FusedParams.
struct FusedRule {
  static constexpr bool kAnySort = true;
  // Behind the first argument of a kernel that has FusedFirst and FusedParams in front.
  static constexpr size_t kOffset =
      argument_offset<RowRule>(sizeof(FusedFirst) + sizeof(FusedParams));
  using Sink = RuleSink;

  RowRule row;
  float* topk_weights;  // null for none
  int32_t* topk_ids;
  int64_t weights_stride, ids_stride;  // in items

  template <typename Rows>
  __device__ __forceinline__ void set(Rows& rows) const {
    rows.follow(row, kOffset + offsetof(FusedRule, row));
  }
  __device__ __forceinline__ Sink sink(const FusedSink& of_rows, int first_token) const {
    Sink sink{of_rows, nullptr, nullptr, weights_stride, ids_stride};
    if (topk_weights != nullptr) {
      sink.out_weights = topk_weights + first_token * weights_stride;
      sink.out_ids = topk_ids + first_token * ids_stride;
    }
    return sink;
  }
};

template <typename Rows>
__global__ void AITER_LAUNCH_BOUNDS(Rows::kMaxThreads)
    fused_topk_moe_sorting_rules_kernel(const void* gating, int64_t row_stride,
                                        const int32_t* num_local_tokens, const int32_t* expert_mask,
                                        int num_tokens, int num_experts, int topk,
                                        int tokens_per_block, int num_threads, uint32_t flags,
                                        FusedParams p, FusedRule rule) {
  AITER_DYNAMIC_LDS(lds_base);
  const FusedFirst first{gating,      row_stride, num_local_tokens, expert_mask, num_tokens,
                         num_experts, topk,       tokens_per_block, num_threads, flags};
  if (AITER_UNLIKELY(blockIdx.x >= static_cast<unsigned>(first.num_routing()))) {
    return zero_rows(first, p);
  }
  route<Rows>(first, p, rule, static_cast<int>(blockIdx.x), lds_base);
}

// The kernel for rows of this rule (kernels/fused_topk_moe_sorting_rules.cu).
// NOTE: spelled out, as nvcc would want an instance that decltype names defined in the launcher's unit.
using FusedRulesKernel = void (*)(const void*, int64_t, const int32_t*, const int32_t*, int, int,
                                  int, int, int, uint32_t, FusedParams, FusedRule);
FusedRulesKernel fused_rules_kernel(const RowRule& row);

}  // namespace aiter
