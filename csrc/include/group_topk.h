// Softmax and top-k of several rows of 16-bit logits by one wave: row_topk.h's rules and results, for
// K <= 8, E <= 256 and renormalised weights, by merging lists instead of a step per winner.
//
// A group of kLanes lanes takes a row, so a wave of W takes W / kLanes of them. Lane l of a group holds
// the logits 8l ... 8l + 7, 8(kLanes + l) ... + 7 and so on, kValues of them: loads of 16 bytes, where rows
// begin on such a boundary. As in row_topk.h a register is the logit's key above the complemented expert
// index, so that all registers of a row differ and the order is that of the registers.
//
//   lane    sorts its registers in lists of kBest (sorting networks) and merges these: of two
//           descending lists, the maxima of a_i and b_(kBest-1-i) are the best kBest of both, as a
//           bitonic sequence, which log2(kBest) rounds of comparators put in order
//   group   does the same with lane l ^ 1, l ^ 2, ... : log2(kLanes) swaps of kBest registers
//
// Then all lanes of the group hold the row's winners, lane k takes winner k, and exp, the sum in slot
// order and the division are done once for all rows of the wave.
//
// Measured on an H100 (2026-11-23), 1024 rows routed by 8 workgroups, a step per winner -> merging:
//   E=128 K=4    11.9 -> 7.1 us
//   E=256 K=8    18.6 -> 13.9 us
// What counts there is the number of integer instructions, of which a scheduler does one in two cycles.
// Rejected: lists of 16 for K up to 16, 29 -> 33 us for E=512, K=10 and 56 -> 50 us for E=896, K=16, by
// instances that take the longest to compile. f32 logits would need pairs of registers.
#pragma once

#include "row_topk.h"

namespace aiter {

constexpr int kMaxGroupExperts = 256;
constexpr int kMaxGroupTopk = 8;
constexpr int kFewTokens = 512;

// Lanes of a group for a row of E logits, registers of a lane for them, and the winners looked for, K or
// more: of the instances there are, the one that suffices. Fewer lanes with more registers each take fewer
// instructions a row, but more time for the first.
struct GroupShape {
  int lanes, values, best;
};

__host__ __device__ constexpr GroupShape group_shape(int num_tokens, int num_experts, int topk) {
  if (num_experts > 128)
    return num_tokens > kFewTokens ? GroupShape{8, 32, 8} : GroupShape{16, 16, 8};
  return {8, 16, topk > 4 ? 8 : 4};
}

// Calls: load; when the logits are there, select; winner.
template <typename T, int kLanes, int kValues, int kBest>
class GroupRows {
 public:
  using Item = T;
  static constexpr bool kIsUsed = true;
  static constexpr int kMaxThreads = max_row_threads(kValues);
  static constexpr int kRowsPerWave = kWaveSize / kLanes;

  // Which of the wave's rows this lane works on.
  static __device__ __forceinline__ int row_in_wave() { return lane_idx() / kLanes; }

  // `row` is the lane's.
  __device__ __forceinline__ void load(const T* row, int num_experts, RowFormat format) {
    num_experts = anew(num_experts);
    AITER_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      const int first = first_expert(c);
      if (format.wide) {
        chunk_[c] = FourWords{};
        if (first < num_experts) chunk_[c] = *reinterpret_cast<const FourWords*>(row + first);
      } else {
        AITER_UNROLL
        for (int w = 0; w < 4; ++w) {
          const int last = num_experts - 1;
          const int low = first + 2 * w < last ? first + 2 * w : last;
          const int high = first + 2 * w < last ? first + 2 * w + 1 : last;
          chunk_[c].word[w] = static_cast<uint32_t>(row[high].bits) << 16 | row[low].bits;
        }
      }
    }
  }

  // Leaves the rows' winners in every lane of their groups.
  __device__ __forceinline__ void select(int num_experts) {
    encode(num_experts);
    select_in_lane();
    merge_lanes<1>();
  }

  // Winner k < kBest, as Logit<T> stores it.
  __device__ __forceinline__ uint32_t winner(int k) const {
    uint32_t found = stored_[0];
    AITER_UNROLL
    for (int i = 1; i < kBest; ++i) found = k == i ? stored_[i] : found;
    return found;
  }

 private:
  static constexpr int kChunkItems = sizeof(FourWords) / sizeof(T);
  static constexpr int kChunks = kValues / kChunkItems;

  static __device__ __forceinline__ int first_expert(int chunk) {
    return (chunk * kLanes + lane_idx() % kLanes) * kChunkItems;
  }

  __device__ __forceinline__ void encode(int num_experts) {
    num_experts = anew(num_experts);
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const uint32_t word = chunk_[i / kChunkItems].word[i % kChunkItems / 2];
      const uint32_t high = i % 2 == 0 ? word << 16 : word & 0xffff0000u;
      const int expert_idx = first_expert(i / kChunkItems) + i % kChunkItems;
      stored_[i] = Logit<T>::store_high(high, static_cast<uint32_t>(expert_idx));
    }
    if (num_experts == kLanes * kValues) return;
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const int expert_idx = first_expert(i / kChunkItems) + i % kChunkItems;
      stored_[i] = expert_idx < num_experts ? stored_[i] : 0;
    }
  }

  // Batcher's odd-even merge of two lists of four.
  __device__ __forceinline__ void sort_eight(int first) {
    sort_four(stored_, first);
    sort_four(stored_, first + 4);
    AITER_UNROLL
    for (int i = 0; i < 4; ++i) order(stored_, first + i, first + 4 + i);
    order(stored_, first + 2, first + 4);
    order(stored_, first + 3, first + 5);
    AITER_UNROLL
    for (int i = 1; i < 7; i += 2) order(stored_, first + i, first + i + 1);
  }

  // Puts a bitonic list of kBest in descending order.
  __device__ __forceinline__ void order_bitonic(int first) {
    AITER_UNROLL
    for (int half = kBest / 2; half > 0; half /= 2) {
      AITER_UNROLL
      for (int i = 0; i < kBest; ++i) {
        if ((i & half) == 0) order(stored_, first + i, first + i + half);
      }
    }
  }

  __device__ __forceinline__ void merge_lists(int first, int other) {
    AITER_UNROLL
    for (int i = 0; i < kBest; ++i) {
      const uint32_t x = stored_[first + i], y = stored_[other + kBest - 1 - i];
      stored_[first + i] = x > y ? x : y;
    }
    order_bitonic(first);
  }

  // Leaves the lane's best kBest in the registers 0 ... kBest - 1.
  __device__ __forceinline__ void select_in_lane() {
    AITER_UNROLL
    for (int first = 0; first < kValues; first += kBest) {
      if constexpr (kBest == 4) {
        sort_four(stored_, first);
      } else {
        sort_eight(first);
      }
    }
    AITER_UNROLL
    for (int distance = kBest; distance < kValues; distance *= 2) {
      AITER_UNROLL
      for (int first = 0; first < kValues; first += 2 * distance) {
        merge_lists(first, first + distance);
      }
    }
  }

  template <int kDistance>
  __device__ __forceinline__ void merge_lanes() {
    if constexpr (kDistance < kLanes) {
      uint32_t theirs[kBest];
      AITER_UNROLL
      for (int i = 0; i < kBest; ++i) theirs[i] = wave_swap<kDistance>(stored_[i]);
      AITER_UNROLL
      for (int i = 0; i < kBest; ++i) {
        const uint32_t x = stored_[i], y = theirs[kBest - 1 - i];
        stored_[i] = x > y ? x : y;
      }
      order_bitonic(0);
      merge_lanes<2 * kDistance>();
    }
  }

  FourWords chunk_[kChunks];
  uint32_t stored_[kValues];
};

// Runs the selection for the loaded rows, as row_topk.h does for one; sink and `valid` are the lane's
// row's.
template <typename T, int kLanes, int kValues, int kBest, typename Sink>
__device__ __forceinline__ void wave_topk(GroupRows<T, kLanes, kValues, kBest>& rows,
                                          int num_experts, int topk, bool, bool valid, Sink& sink) {
  rows.select(num_experts);
  const int k = lane_idx() % kLanes;
  const uint32_t mine = rows.winner(k);
  const float max = Logit<T>::value(Logit<T>::key(rows.winner(0)));
  const float numerator = softmax_numerator(Logit<T>::value(Logit<T>::key(mine)), max);
  const float weight = numerator / wave_sum_in_groups<kLanes>(numerator, topk);
  if (valid && k < topk) sink.put(k, Logit<T>::expert(mine), weight);
}

}  // namespace aiter
