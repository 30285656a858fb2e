// Softmax and top-k of several rows by one wave, over f32 keys: row_topk.h's rules and results, for K <= 32,
// E <= 1024 and renormalised weights, by a threshold and few candidates (best_keys.h).
//
// A group of kLanes lanes takes a row of logits of any type, f32 keys to the selection. The type is an argument
// of the kernel and not of the instance: it is asked for where logits are loaded, where they become keys,
// and where the key of a candidate is asked for again, and all instances are there for three types.
//
// Loads are of 16 bytes, where rows begin on such a boundary and end on one.
//
// Measured on an H100 (2026-11-26), us per call that overlaps with nothing, a step per winner -> keys:
//                          M = 1            8            64           256          1024
//   E=512 K=10, f32    3.34 -> 2.70   5.22 -> 3.85   7.16 -> 5.82   10.5 -> 7.69   26.7 -> 14.4
//   E=896 K=16, f32    5.93 -> 3.10   9.90 -> 4.80   13.0 -> 7.51   21.8 -> 11.0   64.3 -> 21.1
//   E=512 K=10, bf16   2.43 -> 2.69   3.67 -> 3.85   5.54 -> 5.77   7.75 -> 7.56   16.5 -> 13.8
//   E=896 K=16, bf16   3.45 -> 3.04   5.71 -> 4.77   8.52 -> 7.44   13.2 -> 10.6   31.3 -> 20.6
//   E=512 K=22, bf16   3.35 -> 3.37   5.13 -> 4.94   6.73 -> 6.47   9.74 -> 8.86           20.7
// Then code for one candidate a lane in front of that for three, counts by carries, and the sum unrolled; 16-bit logits
// with K > 8 whatever M is, where up to M = 128 they were selected by a step per winner (2026-11-28, one machine, bits
// unchanged; M = 1, 8, 16, 64, 256, 1024):
//   E=512 K=10, f32    2.93 4.13 4.83 5.33 6.57 8.91 -> 2.68 3.79 4.53 5.01 6.28 8.86
//   E=896 K=16, f32    3.34 5.15 5.96 7.03 9.08 11.6 -> 3.05 4.89 5.63 6.77 8.84 11.3
//   E=512 K=10, bf16   2.89 4.11 4.73 5.46 6.36 8.50 -> 2.70 3.74 4.47 4.99 6.12 8.42
//   E=896 K=16, bf16   3.36 5.01 6.02 6.85 8.73 11.9 -> 3.09 4.78 5.78 6.63 8.58 11.6
//   E=512 K=16, bf16   3.34 4.84 (M = 8) 6.06 (64)   -> 2.82 4.08 5.22
//   E=1024 K=10, bf16  3.02 4.73 (M = 8) 6.35 (64)   -> 2.49 4.43 6.11
// Rejected: groups of 16 lanes for more than 256 experts, which take a third less instructions a row but are no
// faster (E=512, K=10: 3.61 us for M=1 and 14.6 for 1024, when 32 lanes took 2.99 and 14.9); keys for E=128,
// K=4: 2.88 us for M=1 against 1.90.
#pragma once

#include "best_keys.h"

namespace aiter {

constexpr int kMaxKeyTopk = 32;

// Lanes of a group, registers of a lane and winners looked for, of the instances there are.
__host__ __device__ constexpr GroupShape key_group_shape(int num_experts, int topk) {
  if (topk > 16) return {32, 32, 32};
  if (num_experts > 512) return {32, 32, 16};
  return topk > 8 || num_experts > 256 ? GroupShape{32, 16, 16} : GroupShape{8, 32, 8};
}

// Whether rows are any of these instances'.
__host__ __device__ constexpr bool has_key_group(int num_experts, int topk) {
  const GroupShape group = key_group_shape(num_experts, topk);
  return topk <= kMaxKeyTopk && num_experts <= kMaxRowExperts &&
         num_experts >= least_keys(group.lanes, group.best);
}

// Threads of a workgroup that has rows of so many registers a lane. Of 16 values, they take 80: in a workgroup of 1,024 on
// an NVIDIA GPU they spill 48 bytes (E=512 K=10 f32, M = 1, 4, 16, 64, 256, 512, 1024 on an H200, 2026-11-27: 3.01 3.74 4.96
// 5.54 6.58 9.38 13.1 -> 2.80 3.66 4.80 5.38 6.34 9.09 13.6).
__host__ __device__ constexpr int max_key_threads(int values) {
  return values > 16 || kRegistersOfLargest < 80 ? 512 : 1024;
}

// Calls: use; load; when the logits are there, wave_topk.
template <int kLanes, int kValues, int kBest>
class KeyRows {
 public:
  using Item = unsigned char;
  using Keys = BestKeys<kLanes, kValues, kBest>;
  static constexpr bool kIsUsed = true;
  static constexpr int kMaxThreads = max_key_threads(kValues);
  static constexpr int kRowsPerWave = Keys::kRowsPerWave;
  static constexpr int kPlaces = kLanes * kValues;

  // Which of the wave's rows this lane works on.
  static __device__ __forceinline__ int row_in_wave() { return lane_idx() / kLanes; }

  // The wave's part of the LDS.
  __device__ __forceinline__ void use(void* lds) { lds_ = lds; }
  __device__ __forceinline__ void* lds() const { return lds_; }

  // `row` is the lane's.
  __device__ __forceinline__ void load(const unsigned char* row, int num_experts,
                                       RowFormat format) {
    num_experts = anew(num_experts);
    row_ = row;
    type_ = format.type;
    if (type_ == LogitType::f32) {
      load_words(reinterpret_cast<const uint32_t*>(row), num_experts, format.wide != 0);
    } else {
      load_halves(reinterpret_cast<const uint16_t*>(row), num_experts, format.wide != 0);
    }
  }

  // The loaded logits as f32, NaN where there is none.
  __device__ __forceinline__ void make_keys(float (&keys)[kValues]) const {
    if (type_ == LogitType::f32) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) keys[i] = bit_cast<float>(words_[i / 4].word[i % 4]);
    } else if (type_ == LogitType::bf16) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) keys[i] = to_float(Bf16{half(i)});
    } else {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) keys[i] = to_float(F16{half(i)});
    }
  }

  // A logit, read again.
  __device__ __forceinline__ float key_at(uint32_t expert_idx) const {
    if (type_ == LogitType::f32) return reinterpret_cast<const float*>(row_)[expert_idx];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(row_)[expert_idx];
    return type_ == LogitType::bf16 ? to_float(Bf16{bits}) : to_float(F16{bits});
  }

 private:
  static constexpr uint32_t kNoHalf = 0xffffu;       // NaN of either 16-bit type
  static constexpr uint32_t kNoLogit = 0xffffffffu;  // two of them, or one of f32

  __device__ __forceinline__ uint16_t half(int i) const {
    return static_cast<uint16_t>(words_[i / 8].word[i % 8 / 2] >> (i % 2 * 16));
  }

  __device__ __forceinline__ void load_words(const uint32_t* row, int num_experts, bool wide) {
    AITER_UNROLL
    for (int c = 0; c < kValues / 4; ++c) {
      const int first = Keys::expert_of_register(4 * c);
      words_[c] = {{kNoLogit, kNoLogit, kNoLogit, kNoLogit}};
      if (wide) {
        if (first < num_experts) words_[c] = *reinterpret_cast<const FourWords*>(row + first);
      } else {
        AITER_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (first + i < num_experts) words_[c].word[i] = row[first + i];
        }
      }
    }
  }

  __device__ __forceinline__ void load_halves(const uint16_t* row, int num_experts, bool wide) {
    AITER_UNROLL
    for (int c = 0; c < kValues / 8; ++c) {
      const int first = Keys::expert_of_register(8 * c);
      words_[c] = {{kNoLogit, kNoLogit, kNoLogit, kNoLogit}};
      if (wide) {
        if (first < num_experts) words_[c] = *reinterpret_cast<const FourWords*>(row + first);
      } else {
        const int last = num_experts - 1;
        AITER_UNROLL
        for (int w = 0; w < 4; ++w) {
          // NOTE: all lanes load, the last logit where there is none; in a branch, compilers for AMD GPUs make one
          // load of two neighbours, which need not begin on a boundary.
          const int low = first + 2 * w, high = low + 1;
          const uint32_t low_bits = row[low < last ? low : last];
          const uint32_t high_bits = row[high < last ? high : last];
          words_[c].word[w] =
              (high <= last ? high_bits : kNoHalf) << 16 | (low <= last ? low_bits : kNoHalf);
        }
      }
    }
  }

  const unsigned char* row_;
  void* lds_;
  LogitType type_;
  FourWords words_[kValues / 4];
};

// Whether waves need LDS for rows of a class: best_keys_lds_bytes() of each.
template <typename Rows>
constexpr bool kUsesLds = false;
template <int kLanes, int kValues, int kBest>
constexpr bool kUsesLds<KeyRows<kLanes, kValues, kBest>> = true;

// Runs the selection for the loaded rows, as row_topk.h does for one; sink and `valid` are the lane's
// row's.
template <int kLanes, int kValues, int kBest, typename Sink>
__device__ __forceinline__ void wave_topk(KeyRows<kLanes, kValues, kBest>& rows, int num_experts,
                                          int topk, bool, bool valid, Sink& sink) {
  using Keys = BestKeys<kLanes, kValues, kBest>;
  float keys[kValues];
  rows.make_keys(keys);
  const Winner mine = Keys::select(keys, anew(num_experts), topk, rows.lds(),
                                   [&](uint32_t expert_idx) { return rows.key_at(expert_idx); });
  const auto value = [](uint32_t key) { return bit_cast<float>(bits_of_key(key)); };
  const float numerator = softmax_numerator(value(mine.stored), value(Keys::best_key(rows.lds())));
  const float weight = numerator / Keys::sum_in_order(numerator, topk, rows.lds());
  const int k = Keys::lane_in_group();
  if (valid && k < topk) sink.put(k, mine.expert_idx, weight);
}

}  // namespace aiter
