// Softmax and top-k of every row of the router logits: the first step of the separate chain.
//
//   gating [M, E] f32/f16/bf16, inner stride 1, rows `row_stride` items apart
//   topk_weights f32 [M, K], topk_indices i32 [M, K], token_expert_indices i32 [M, K] = k*M + row
//
// A wave takes one row (row_topk.h) or several (group_topk.h, key_topk.h), kWavesPerBlock waves form a
// workgroup; they share nothing, so there is no barrier, and LDS is a wave's own.
#pragma once

#include "device/cluster.h"
#include "key_topk.h"

namespace aiter {

constexpr int kWavesPerBlock = 4;

struct TopkSoftmaxParams {
  const void* gating;
  int64_t row_stride;  // in items of the class of rows
  int num_tokens, num_experts, topk;
  bool need_renorm;
  RowFormat row_format;
  float* topk_weights;
  int32_t* topk_indices;
  int32_t* token_expert_indices;
};

struct TopkSoftmaxSink {
  const TopkSoftmaxParams& p;
  int64_t row;

  __device__ __forceinline__ void put(int k, uint32_t expert_idx, float weight) {
    const int64_t i = row * p.topk + k;
    p.topk_weights[i] = weight;
    p.topk_indices[i] = static_cast<int32_t>(expert_idx);
    p.token_expert_indices[i] = static_cast<int32_t>(k * static_cast<int64_t>(p.num_tokens) + row);
  }
  __device__ __forceinline__ void divide(int k, float denominator) {
    p.topk_weights[row * p.topk + k] /= denominator;
  }
};

template <typename Rows>
__global__ void AITER_LAUNCH_BOUNDS(kWavesPerBlock* kMaxWaveSize)
    topk_softmax_kernel(TopkSoftmaxParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  wait_for_earlier_launch();
  let_next_launch_begin();
  if constexpr (Rows::kIsUsed) {
    const int64_t wave = static_cast<int64_t>(blockIdx.x) * kWavesPerBlock + uniform_wave_idx();
    const int64_t first = wave * Rows::kRowsPerWave;
    if (first >= p.num_tokens) return;
    const int64_t row = first + Rows::row_in_wave();
    const bool valid = row < p.num_tokens;
    Rows logits;
    if constexpr (kUsesLds<Rows>) {
      logits.use(lds_base + uniform_wave_idx() * best_keys_lds_bytes(kWaveSize));
    } else {
      (void)lds_base;
    }
    logits.load(static_cast<const typename Rows::Item*>(p.gating) +
                    (valid ? row : p.num_tokens - 1) * p.row_stride,
                p.num_experts, p.row_format);
    TopkSoftmaxSink sink{p, row};
    wave_topk(logits, p.num_experts, p.topk, p.need_renorm, valid, sink);
  }
}

}  // namespace aiter
