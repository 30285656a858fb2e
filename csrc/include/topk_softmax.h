// Softmax and top-k of every row of the router logits: the first step of the separate chain.
//
//   gating [M, E] f32/f16/bf16, inner stride 1, rows `row_stride` items apart
//   topk_weights f32 [M, K], topk_indices i32 [M, K], token_expert_indices i32 [M, K] = k*M + row
//
// A wave takes one row (row_topk.h) or several (group_topk.h, key_topk.h) at a time. Workgroups have so many rows that
// their waves take them at once, or, where they count the entries per expert for a sort that follows, a tile
// (tile_counts.h); without counts they share nothing, there is no barrier, and LDS is a wave's own.
//
// What the first load of logits needs are arguments of their own and the first ones, 8 words, so that they can be
// there when the kernel begins (aiter/jit/rocm_flags.py) or come by one load.
#pragma once

#include "device/cluster.h"
#include "key_topk.h"
#include "tile_counts.h"

namespace aiter {

struct TopkSoftmaxOutputs {
  float* topk_weights;
  int32_t* topk_indices;
  int32_t* token_expert_indices;  // may be null
};

// Of how rows are read and weighed, in one word: bit 0 renormalised, bit 1 RowFormat::wide, then its type.
struct TopkSoftmaxFlags {
  uint32_t word;

  static TopkSoftmaxFlags of(bool need_renorm, RowFormat format) {
    return {static_cast<uint32_t>(need_renorm) | format.wide << 1 |
            static_cast<uint32_t>(format.type) << 2};
  }
  __device__ __forceinline__ bool need_renorm() const { return (word & 1) != 0; }
  __device__ __forceinline__ RowFormat row_format() const {
    return {word >> 1 & 1, static_cast<LogitType>(word >> 2)};
  }
};

struct TopkSoftmaxSink {
  const EntryCounts counts;
  const TopkSoftmaxOutputs& out;
  int topk, num_tokens;
  int64_t row;

  __device__ __forceinline__ void put(int k, uint32_t expert_idx, float weight) {
    const int64_t i = row * topk + k;
    out.topk_weights[i] = weight;
    out.topk_indices[i] = static_cast<int32_t>(expert_idx);
    if (out.token_expert_indices != nullptr) {
      out.token_expert_indices[i] =
          static_cast<int32_t>(k * static_cast<int64_t>(num_tokens) + row);
    }
    counts.add(row, expert_idx);
  }
  __device__ __forceinline__ void divide(int k, float denominator) {
    out.topk_weights[row * topk + k] /= denominator;
  }
};

template <typename Rows>
__global__ void AITER_LAUNCH_BOUNDS(kCountingThreads)
    topk_softmax_kernel(const void* gating, int64_t row_stride, int num_tokens, int num_experts,
                        int topk, TopkSoftmaxFlags flags, TopkSoftmaxOutputs out,
                        RowsOfBlock block) {
  // Of the last argument, behind all others.
  constexpr size_t kBlockOffset = argument_offset<RowsOfBlock>(
      sizeof(gating) + sizeof(row_stride) + 3 * sizeof(int) + sizeof(flags) + sizeof(out));
  AITER_DYNAMIC_LDS(lds_base);
  const TileCounter counter(block.counts, lds_base + block.counts_offset);
  if (block.is_counting()) counter.begin();
  wait_for_earlier_launch();
  let_next_launch_begin();
  if constexpr (Rows::kIsUsed) {
    using Item = typename Rows::Item;
    const TokenRange tokens = block.tokens(num_tokens);
    const int last = tokens.last - 1;
    Rows logits;
    if constexpr (kUsesLds<Rows>) {
      logits.use(lds_base + uniform_wave_idx() * best_keys_lds_bytes(kWaveSize));
    } else {
      (void)lds_base;
    }
    TopkSoftmaxSink sink{EntryCounts(block, counter, num_tokens), out, topk, num_tokens, 0};
    const int wave = uniform_wave_idx();
    const int num_waves = block.team().num_threads / kWaveSize;
    if (wave >= num_waves) {
      sink.counts.zero(block, counter, tokens);
      return;
    }
    const int begin = tokens.first + wave * Rows::kRowsPerWave;
    const int step = num_waves * Rows::kRowsPerWave;
    RowsAhead<Rows::kRowsPerWave> ahead;
    ahead.begin(gating, row_stride * sizeof(Item), begin, step, last, block.ahead, lds_base, wave,
                num_waves);
    AITER_LOOP
    for (int first = begin; first < tokens.last; first += step) {
      const int row = first + Rows::row_in_wave();
      const bool valid = row <= last;
      sink.row = valid ? row : last;
      const Item* const in_memory = static_cast<const Item*>(gating) + sink.row * row_stride;
      ahead.load(logits, in_memory, num_experts, flags.row_format());
      wave_topk(logits, num_experts, topk, flags.need_renorm(), valid, sink);
      ahead.advance();
    }
  }
  const RowsOfBlock& again = loaded_anew(block, kBlockOffset);
  if (again.is_counting()) {
    TileCounter(again.counts, lds_base + again.counts_offset).finish(again.team());
  }
}

}  // namespace aiter
