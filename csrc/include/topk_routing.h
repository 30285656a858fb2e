// Top-k of every row of the router logits by any rule: the first step of the separate chain, and by itself.
//
//   gating [M, E + Z (+ S)] f32/f16/bf16, inner stride 1, rows `row_bytes` apart
//   topk_weights f32 [M, K + S], topk_ids i32 [M, K + S], inner stride 1, any row stride
//
// A wave takes a row or two (rule_topk.h) at a time. Workgroups have rows and counts as in topk_softmax.h.
#pragma once

#include "device/cluster.h"
#include "rule_topk.h"
#include "tile_counts.h"

namespace aiter {

struct TopkRoutingParams {
  RowRule rule;
  float* topk_weights;
  int64_t weights_stride;  // in items
  int32_t* topk_ids;
  int64_t ids_stride;
  RowsOfBlock block;
};

struct TopkRoutingSink {
  const EntryCounts counts;
  int row;
  float* weights;  // of this row
  int32_t* ids;

  __device__ __forceinline__ void put(int k, int id, float weight) {
    weights[k] = weight;
    ids[k] = id;
    counts.add(row, static_cast<uint32_t>(id));
  }
  template <typename F>
  __device__ __forceinline__ void finish(int k, F f) {
    weights[k] = f(weights[k]);
  }
};

template <typename Rows>
__global__ void AITER_LAUNCH_BOUNDS(Rows::kMaxThreads)
    topk_routing_kernel(const unsigned char* gating, int64_t row_bytes, int num_tokens,
                        TopkRoutingParams p) {
  // Of the parameters, behind the arguments before them.
  constexpr size_t kOffset =
      argument_offset<TopkRoutingParams>(sizeof(gating) + sizeof(row_bytes) + sizeof(num_tokens));
  AITER_DYNAMIC_LDS(lds_base);
  const TileCounter counter(p.block.counts, lds_base + p.block.counts_offset);
  if (p.block.is_counting()) counter.begin();
  wait_for_earlier_launch();
  let_next_launch_begin();
  const TokenRange tokens = p.block.tokens(num_tokens);
  const int last = tokens.last - 1;
  Rows logits;
  logits.follow(p.rule, kOffset + offsetof(TopkRoutingParams, rule));
  if constexpr (kUsesLds<Rows>) {
    logits.use(lds_base + uniform_wave_idx() * best_keys_lds_bytes(kWaveSize));
  }
  TopkRoutingSink sink{EntryCounts(p.block, counter, num_tokens), 0, nullptr, nullptr};
  const int wave = uniform_wave_idx();
  const int num_waves = p.block.team().num_threads / kWaveSize;
  if (wave >= num_waves) {
    sink.counts.zero(p.block, counter, tokens);
    return;
  }
  const int begin = tokens.first + wave * Rows::kRowsPerWave;
  const int step = num_waves * Rows::kRowsPerWave;
  RowsAhead<Rows::kRowsPerWave> ahead;
  ahead.begin(gating, row_bytes, begin, step, last, p.block.ahead, lds_base, wave, num_waves);
  AITER_LOOP
  for (int first = begin; first < tokens.last; first += step) {
    const int row = first + Rows::row_in_wave();
    const bool valid = row <= last;
    sink.row = valid ? row : last;
    sink.weights = p.topk_weights + sink.row * p.weights_stride;
    sink.ids = p.topk_ids + sink.row * p.ids_stride;
    ahead.load(logits, gating + sink.row * row_bytes, 0, RowFormat{});
    wave_topk(logits, 0, 0, false, valid, sink);
    ahead.advance();
  }
  const RowsOfBlock& again = loaded_anew(p.block, kOffset + offsetof(TopkRoutingParams, block));
  if (again.is_counting()) {
    TileCounter(again.counts, lds_base + again.counts_offset).finish(again.team());
  }
}

}  // namespace aiter
