// Top-k of every row of the router logits by any rule: the first step of the separate chain, and by itself.
//
//   gating [M, E + Z (+ S)] f32/f16/bf16, inner stride 1, rows `row_bytes` apart
//   topk_weights f32 [M, K + S], topk_ids i32 [M, K + S], inner stride 1, any row stride
//
// A wave takes a row or two (rule_topk.h), kRoutingWaves waves form a workgroup; they share nothing, so there is no
// barrier, and LDS is a wave's own.
#pragma once

#include "device/cluster.h"
#include "rule_topk.h"

namespace aiter {

constexpr int kRoutingWaves = 4;

struct TopkRoutingParams {
  RowRule rule;
  float* topk_weights;
  int64_t weights_stride;  // in items
  int32_t* topk_ids;
  int64_t ids_stride;
};

struct TopkRoutingSink {
  float* weights;  // of this row
  int32_t* ids;

  __device__ __forceinline__ void put(int k, int id, float weight) {
    weights[k] = weight;
    ids[k] = id;
  }
  template <typename F>
  __device__ __forceinline__ void finish(int k, F f) {
    weights[k] = f(weights[k]);
  }
};

template <typename Rows>
__global__ void AITER_LAUNCH_BOUNDS(kRoutingWaves* kMaxWaveSize)
    topk_routing_kernel(const unsigned char* gating, int64_t row_bytes, int num_tokens,
                        TopkRoutingParams p) {
  // Of the parameters, behind the arguments before them.
  constexpr size_t kOffset =
      argument_offset<TopkRoutingParams>(sizeof(gating) + sizeof(row_bytes) + sizeof(num_tokens));
  AITER_DYNAMIC_LDS(lds_base);
  wait_for_earlier_launch();
  let_next_launch_begin();
  const int64_t wave = static_cast<int64_t>(blockIdx.x) * kRoutingWaves + uniform_wave_idx();
  const int64_t first = wave * Rows::kRowsPerWave;
  if (first >= num_tokens) return;
  const bool valid = first + Rows::row_in_wave() < num_tokens;
  const int64_t row = valid ? first + Rows::row_in_wave() : num_tokens - 1;
  Rows logits;
  logits.follow(p.rule, kOffset + offsetof(TopkRoutingParams, rule));
  if constexpr (kUsesLds<Rows>) {
    logits.use(lds_base + uniform_wave_idx() * best_keys_lds_bytes(kWaveSize));
  } else {
    (void)lds_base;
  }
  logits.load(gating + row * row_bytes, 0, RowFormat{});
  TopkRoutingSink sink{p.topk_weights + row * p.weights_stride, p.topk_ids + row * p.ids_stride};
  wave_topk(logits, 0, 0, false, valid, sink);
}

}  // namespace aiter
