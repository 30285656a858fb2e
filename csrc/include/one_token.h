// The sort of a single token without an expert mask: decode at batch 1.
//
// Then only K slots depend on the logits. Each winner has a block of its own, so the blocks are the first K, each
// one entry and B - 1 slots of padding, and a winner's block is the number of winners with a lower expert
// index. The first wave, which found the winners and has them in its lanes, writes the entries; the other waves
// have written the padding meanwhile. No two of them store to the same place, so there is no barrier.
#pragma once

#include "expert_sort.h"

namespace aiter {

// Whether it is this case, as far as the host knows: num_local_tokens may still say 0.
inline bool is_one_token(const SortShape& shape, const SortParams& out) {
  return shape.num_tokens == 1 && shape.topk <= kMinWaveSize && out.expert_mask == nullptr &&
         shape.num_real == shape.num_experts;
}

// Pads all slots of the first K blocks but the first of each, worker `worker` of `num_workers`.
template <bool kAny>
__device__ __forceinline__ void pad_behind_entries(const SortShape& shape, const SortParams& out,
                                                   uint32_t worker, uint32_t num_workers) {
  const uint32_t id = padding_id<kAny>(shape, 1);
  const uint32_t num_slots = shape.topk * shape.block_size;
  const uint32_t width = shape.wide_stores ? 4 : 1;
  AITER_LOOP
  for (uint32_t slot = worker * width; slot < num_slots; slot += num_workers * width) {
    const bool is_entry = shape.by_block_size.quotient(slot) * shape.block_size == slot;
    if (shape.wide_stores) {
      if (is_entry) {
        pad_rest(out, slot + 1, id);
      } else {
        pad_four(out, slot, id);
      }
    } else if (!is_entry) {
      out.sorted_ids[slot] = static_cast<int32_t>(id);
      out.sorted_weights[slot] = 0.0f;
    }
  }
}

// The whole sort. `winner` is that of the lane, k its lane, in the workgroup's first wave; there are others.
template <bool kAny = false>
__device__ __forceinline__ void write_one_token(const SortShape& shape, int num_local, int wave,
                                                int num_threads, const SortParams& out,
                                                const Entry& winner) {
  // Not by the first wave, which the launch waits for.
  if (threadIdx.x == kWaveSize) write_num_valid_ids(shape, out, num_local * shape.topk, num_local);
  if (num_local == 0) return;
  if (wave != 0) {
    pad_behind_entries<kAny>(shape, out, threadIdx.x - kWaveSize, num_threads - kWaveSize);
    return;
  }
  const bool is_winner = lane_idx() < shape.topk;
  const uint32_t expert_idx = is_winner ? winner.expert_idx : ~0u;
  constexpr int kAtOnce = 4;  // divides what a wave has
  uint32_t block = 0;
  AITER_LOOP
  for (int first = 0; first < shape.topk; first += kAtOnce) {
    uint32_t is_lower[kAtOnce];
    AITER_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      is_lower[i] = wave_read_lane(expert_idx, first + i) < expert_idx ? 1 : 0;
    }
    block += (is_lower[0] + is_lower[1]) + (is_lower[2] + is_lower[3]);
  }
  if (is_winner) {
    write_entry<kAny>(shape, out, block * shape.block_size,
                      {expert_idx, 0, lane_idx(), winner.weight});
    out.sorted_expert_ids[block] = static_cast<int32_t>(expert_idx);
  }
}

}  // namespace aiter
