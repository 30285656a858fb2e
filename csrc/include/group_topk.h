// Softmax and top-k of several rows by one wave: row_topk.h's rules and results, for K <= 8, E <= 512 and
// renormalised weights, by merging lists instead of a step per winner.
//
// A group of kLanes lanes takes a row, so a wave of W takes W / kLanes of them. Lane l of a group holds
// the logits of 16 bytes, then of the 16 bytes kLanes * 16 further on and so on, kValues of them: loads of
// 16 bytes, where rows begin on such a boundary. A register is a logit's key above the complemented expert
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
// A 16-bit logit's key fits above the index; an f32 logit's loses its lowest 7 to 9 bits. What remains decides
// unless two keys differ in those bits alone. So a row of f32 logits is also asked whether any of them has such
// bits at all (one that was 16 bits wide has none); and if so, whether two of its kBest winners agree in the rest:
// then the winners, whose logits are read again anyway, are put in order by whole keys; and whether winner K - 1
// and a logit that did not win do: then the row is selected again, by a step per winner over whole keys in
// memory. That takes several times as long and is so for one row of some thousand, if logits are random; so
// lists are for few tokens of many f32 logits only (sort_launch.h).
//
// Measured on an H100 (2026-11-23), 1024 rows of bf16 routed by 8 workgroups, a step per winner -> merging:
//   E=128 K=4    11.9 -> 7.1 us
//   E=256 K=8    18.6 -> 13.9 us
// What counts there is the number of integer instructions, of which a scheduler does one in two cycles.
// Rejected: lists of 16 for K up to 16, 29 -> 33 us for E=512, K=10 and 56 -> 50 us for E=896, K=16, by
// instances that take the longest to compile. Rejected for f32: lists of (key, expert) pairs, where a comparator
// is six instructions instead of two.
//
// Measured on an H100 (2026-11-26), us per call that overlaps with nothing, f32, a step per winner -> lists:
//                          M = 1            8            16           64           1024
//   E=128 K=4          1.91 -> 1.90   2.47 -> 2.31   3.23 -> 2.46   3.46 -> 3.37   8.19 -> 6.62
//   E=256 K=8          2.52 -> 2.14   3.53 -> 2.75   4.16 -> 3.46   4.81 -> 4.12
// (where rows in another order were selected again, too; bf16: 1.70 2.11 2.23 3.08 5.62, 1.93 2.49 3.16 3.75 8.14).
#pragma once

#include "row_topk.h"

namespace aiter {

constexpr int kMaxGroupExperts = 512;
constexpr int kMaxGroupTopk = 8;
constexpr int kFewTokens = 512;

// How a register of a group of `kRowItems` experts stores a logit; 0 stands for no logit.
template <typename T, int kRowItems>
struct GroupLogit : Logit<T> {
  static constexpr bool kIsWhole = true;
  static __device__ __forceinline__ uint32_t store(const FourWords& words, int i, int expert_idx,
                                                   uint32_t&) {
    const uint32_t word = words.word[i / 2];
    const uint32_t high = i % 2 == 0 ? word << 16 : word & 0xffff0000u;
    return Logit<T>::store_high(high, static_cast<uint32_t>(expert_idx));
  }
};

template <int kRowItems>
struct GroupLogit<float, kRowItems> {
  static constexpr bool kIsWhole = false;
  static constexpr uint32_t kIndexBits = kRowItems - 1;
  static_assert((kRowItems & (kRowItems - 1)) == 0 && kRowItems <= 1024, "bits of an index");
  // `lost` collects bits that are not stored.
  static __device__ __forceinline__ uint32_t store(const FourWords& words, int i, int expert_idx,
                                                   uint32_t& lost) {
    const uint32_t bits = ordinary_bits(words.word[i]);
    lost |= bits & kIndexBits;
    return (ordered_key(bits) & ~kIndexBits) | (kIndexBits - static_cast<uint32_t>(expert_idx));
  }
  static __device__ __forceinline__ uint32_t expert(uint32_t stored) {
    return kIndexBits - (stored & kIndexBits);
  }
};

// Registers of a lane for `values` logits: where bits are lost, they are kept beside the lists.
template <typename T>
__host__ __device__ constexpr int list_registers(int values) {
  return sizeof(T) == sizeof(float) ? 2 * values : values;
}

// The largest over each kSize lanes.
template <int kSize>
__device__ __forceinline__ uint32_t group_max(uint32_t x) {
  if constexpr (kSize == 1) {
    return x;
  } else {
    x = group_max<kSize / 2>(x);
    const uint32_t y = wave_exchange<kSize - 1>(x);
    return x > y ? x : y;
  }
}

// Whether a flag is set in any lane of the lane's group.
template <int kLanes>
__device__ __forceinline__ bool group_any(WaveMask flags) {
  constexpr uint32_t kAll = static_cast<uint32_t>((uint64_t{1} << kLanes) - 1);
  return (static_cast<uint32_t>(flags >> (lane_idx() / kLanes * kLanes)) & kAll) != 0;
}

// Lanes of a group for a row of E logits, registers of a lane for them, and the winners looked for, K or
// more: of the instances there are, the one that suffices. Fewer lanes with more registers each take fewer
// instructions a row, but more time for the first.
struct GroupShape {
  int lanes, values, best;
};

__host__ __device__ constexpr GroupShape group_shape(int num_tokens, int num_experts, int topk) {
  if (num_experts > 256) return {32, 16, 8};
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
  static constexpr int kMaxThreads = max_row_threads(list_registers<T>(kValues));
  static constexpr int kRowsPerWave = kWaveSize / kLanes;
  static constexpr int kPlaces = kLanes * kValues;

  // Which of the wave's rows this lane works on.
  static __device__ __forceinline__ int row_in_wave() { return lane_idx() / kLanes; }

  // `row` is the lane's.
  __device__ __forceinline__ void load(const T* row, int num_experts, RowFormat format) {
    num_experts = anew(num_experts);
    row_ = row;
    AITER_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      const int first = first_expert(c);
      if (format.wide != 0) {
        chunk_[c] = FourWords{};
        if (first < num_experts) chunk_[c] = *reinterpret_cast<const FourWords*>(row + first);
      } else {
        const int last = num_experts - 1;
        AITER_UNROLL
        for (int w = 0; w < 4; ++w) {
          if constexpr (sizeof(T) == sizeof(float)) {
            chunk_[c].word[w] = Logit<float>::bits(row[first + w < last ? first + w : last]);
            continue;
          }
          const int low = first + 2 * w < last ? first + 2 * w : last;
          const int high = first + 2 * w < last ? first + 2 * w + 1 : last;
          chunk_[c].word[w] = Logit<T>::bits(row[high]) << 16 | Logit<T>::bits(row[low]);
        }
      }
    }
  }

  // Leaves the rows' winners in every lane of their groups.
  __device__ __forceinline__ void select(int num_experts) {
    lost_ = encode(num_experts);
    if constexpr (!Stored::kIsWhole) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) all_[i] = stored_[i];
    }
    select_in_lane();
    merge_lanes<1>();
  }

  // Behind select(), what bits that are not stored may change about the `topk` best of the lane's row: their order,
  // and which they are. The same for all lanes of a group.
  struct Doubt {
    bool order, winners;
  };
  __device__ __forceinline__ Doubt doubt(int topk) const {
    constexpr uint32_t kIndexBits = Stored::kIndexBits;
    bool meets = false, meets_other = false;
    AITER_UNROLL
    for (int i = 0; i + 1 < kBest; ++i) meets |= (stored_[i] ^ stored_[i + 1]) <= kIndexBits;
    const uint32_t last = winner(topk - 1);
    const uint32_t from = last & ~kIndexBits;
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) meets_other |= all_[i] - from < last - from;
    const WaveMask meeting = wave_ballot(meets), meeting_other = wave_ballot(meets_other);
    const bool loses = group_any<kLanes>(wave_ballot(lost_ != 0));
    return {loses && group_any<kLanes>(meeting), loses && group_any<kLanes>(meeting_other)};
  }

  __device__ __forceinline__ const T* row() const { return row_; }

  // Winner k < kBest, as Logit<T> stores it.
  __device__ __forceinline__ uint32_t winner(int k) const {
    uint32_t found = stored_[0];
    AITER_UNROLL
    for (int i = 1; i < kBest; ++i) found = k == i ? stored_[i] : found;
    return found;
  }

 private:
  using Stored = GroupLogit<T, kLanes * kValues>;
  static constexpr int kChunkItems = sizeof(FourWords) / sizeof(T);
  static constexpr int kChunks = kValues / kChunkItems;

  static __device__ __forceinline__ int first_expert(int chunk) {
    return (chunk * kLanes + lane_idx() % kLanes) * kChunkItems;
  }

  __device__ __forceinline__ uint32_t encode(int num_experts) {
    num_experts = anew(num_experts);
    uint32_t lost = 0;
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const int expert_idx = first_expert(i / kChunkItems) + i % kChunkItems;
      stored_[i] = Stored::store(chunk_[i / kChunkItems], i % kChunkItems, expert_idx, lost);
    }
    if (num_experts == kLanes * kValues) return lost;
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const int expert_idx = first_expert(i / kChunkItems) + i % kChunkItems;
      stored_[i] = expert_idx < num_experts ? stored_[i] : 0;
    }
    return lost;
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

  const T* row_;
  FourWords chunk_[kChunks];
  uint32_t stored_[kValues];
  uint32_t all_[kValues];  // as stored, where bits are lost
  uint32_t lost_;
};

// The `topk` best experts of each group's row in memory, by a step per winner: winner k in lane k, and in `first`
// winner 0.
template <int kLanes>
__device__ __forceinline__ uint32_t select_by_steps(const float* row, int num_experts, int topk,
                                                    uint32_t& first) {
  uint32_t mine = 0;
  uint64_t last = ~uint64_t{0};
  AITER_LOOP
  for (int k = 0; k < topk; ++k) {
    uint64_t best = 0;
    AITER_LOOP
    for (int e = lane_idx() % kLanes; e < num_experts; e += kLanes) {
      const uint32_t key = Logit<float>::store(Logit<float>::bits(row[e]), 0);
      const uint64_t candidate = static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(e);
      if (candidate < last && candidate > best) best = candidate;
    }
    const uint32_t key = group_max<kLanes>(static_cast<uint32_t>(best >> 32));
    const bool is_best = static_cast<uint32_t>(best >> 32) == key;
    const uint32_t complement = group_max<kLanes>(is_best ? static_cast<uint32_t>(best) : 0);
    last = static_cast<uint64_t>(key) << 32 | complement;
    if (k == 0) first = ~complement;
    if (k == lane_idx() % kLanes) mine = ~complement;
  }
  return mine;
}

// Puts the values of each eight lanes in descending order.
template <int kMask, int kBit>
__device__ __forceinline__ uint64_t ordered_lanes(uint64_t x) {
  const uint64_t high = wave_exchange<kMask>(static_cast<uint32_t>(x >> 32));
  const uint64_t y = high << 32 | wave_exchange<kMask>(static_cast<uint32_t>(x));
  return (x > y) == ((lane_idx() & kBit) == 0) ? x : y;
}
__device__ __forceinline__ uint64_t sorted_eight(uint64_t x) {
  x = ordered_lanes<1, 1>(x);
  x = ordered_lanes<1, 1>(ordered_lanes<3, 2>(x));
  return ordered_lanes<1, 1>(ordered_lanes<2, 2>(ordered_lanes<7, 4>(x)));
}

// Runs the selection for the loaded rows, as row_topk.h does for one; sink and `valid` are the lane's
// row's.
template <typename T, int kLanes, int kValues, int kBest, typename Sink>
__device__ __forceinline__ void wave_topk(GroupRows<T, kLanes, kValues, kBest>& rows,
                                          int num_experts, int topk, bool, bool valid, Sink& sink) {
  using Stored = GroupLogit<T, kLanes * kValues>;
  rows.select(num_experts);
  const int k = lane_idx() % kLanes;
  uint32_t expert_idx = Stored::expert(rows.winner(k));
  float max, logit;
  if constexpr (Stored::kIsWhole) {
    max = Stored::value(Stored::key(rows.winner(0)));
    logit = Stored::value(Stored::key(rows.winner(k)));
  } else {
    uint32_t first = Stored::expert(rows.winner(0));
    if (k >= topk) expert_idx = first;
    uint32_t first_bits = Logit<float>::bits(rows.row()[first]);
    uint32_t own_bits = Logit<float>::bits(rows.row()[expert_idx]);
    const auto doubt = rows.doubt(topk);  // while these come
    if (wave_ballot(doubt.winners) != 0) {
      const uint32_t exact = select_by_steps<kLanes>(rows.row(), num_experts, topk, first);
      if (doubt.winners) {
        expert_idx = exact;
        first_bits = Logit<float>::bits(rows.row()[first]);
        own_bits = Logit<float>::bits(rows.row()[expert_idx]);
      }
    }
    if (wave_ballot(doubt.order) != 0) {  // others are in order, and stay so
      const uint64_t own =
          static_cast<uint64_t>(Logit<float>::store(own_bits, 0)) << 32 | ~expert_idx;
      const uint64_t winner = sorted_eight(k < topk ? own : 0);
      const uint32_t key = static_cast<uint32_t>(winner >> 32);
      expert_idx = ~static_cast<uint32_t>(winner);
      first_bits = bits_of_key(group_max<kLanes>(key));
      own_bits = bits_of_key(key);
    }
    max = bit_cast<float>(ordinary_bits(first_bits));
    logit = bit_cast<float>(ordinary_bits(own_bits));
  }
  const float numerator = softmax_numerator(logit, max);
  const float weight = numerator / wave_sum_in_groups<kLanes>(numerator, topk);
  if (valid && k < topk) sink.put(k, expert_idx, weight);
}

}  // namespace aiter
