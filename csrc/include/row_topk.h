// Softmax and top-k of one row of logits by one wave: what topk_softmax and the fused launch share.
//
//   x_e     logit of expert e as f32, NaN read as -inf
//   winners the K largest (x_e, -e) in descending order
//   w_k     exp(x_k - x_0) / Z;  Z = sum over winners in slot order (need_renorm), or over all E
//
// Lane l of a wave of W holds the logits of experts l, W + l, 2W + l, ... in kValues registers.
//
// 16-bit logits carry the complemented expert index in the low half of the register: all registers of
// the row differ, one reduction finds logit and index, and the winner is known by its value. So the
// registers are sorted first, in groups of up to four; a step of the selection takes the maximum over
// the groups' heads, then over the wave, and shifts the one group whose head has won.
// f32 logits fill their registers: a step takes the maximum over all of them, then over the wave,
// asks for the lowest index among the equal by a second reduction, and zeroes the winner's register.
//
// Lane k keeps winner k, so exp and the division are done once for all winners and not once for each.
// With kValues = 0 the row stays in memory and is read again in every step, below the last winner: any
// E, slowly.
//
// Z over all E is summed by halves of the index range (wave_sum_by_halves, and the same over the
// registers), so that its last bit does not depend on the wave width nor on kValues > 0; in memory, by as many
// lanes as the narrowest wave has.
//
// Rejected: 64-bit (key, index) candidates for f32 in registers: with kValues = 32 they spilled 94
// VGPRs on gfx942, and all kValues >= 16 instances spilled scalar registers. Rejected: unsorted
// registers for 16-bit logits: a step looked at every register twice.
#pragma once

#include "device/numeric.h"
#include "device/wave.h"

namespace aiter {

constexpr int kMaxRowValues = 32;     // registers of a lane
constexpr int kMaxRowExperts = 1024;  // longer rows are read from memory

// Threads of a workgroup that keeps rows in registers: long rows want more registers than a lane of the
// largest workgroup gets.
__host__ __device__ constexpr int max_row_threads(int row_values) {
  return row_values > 16 ? 512 : 1024;
}

// Experts that a row has place for, where it stays in memory.
constexpr int kAnyPlaces = 0x7fffffff;

// Registers of a lane that hold a row, as launchers choose them: the least power of two from 2 on that
// suffices; 0 for memory.
__host__ __device__ constexpr int row_values(int num_experts, int wave_size) {
  if (num_experts > kMaxRowExperts) return 0;
  int values = 2;
  while (values * wave_size < num_experts) values *= 2;
  return values;
}

// Puts the larger of two registers first.
template <int kCount>
__device__ __forceinline__ void order(uint32_t (&values)[kCount], int i, int j) {
  const uint32_t x = values[i], y = values[j];
  values[i] = x > y ? x : y;
  values[j] = x > y ? y : x;
}

// Puts four registers in descending order.
template <int kCount>
__device__ __forceinline__ void sort_four(uint32_t (&values)[kCount], int first) {
  order(values, first, first + 1);
  order(values, first + 2, first + 3);
  order(values, first, first + 2);
  order(values, first + 1, first + 3);
  order(values, first + 1, first + 2);
}

// What load() has to know of rows. Whole words, which kernels for AMD GPUs load as scalars.
enum class LogitType : uint32_t { f32, f16, bf16 };
struct RowFormat {
  uint32_t wide;   // 1 if rows begin, and end, on 16-byte boundaries
  LogitType type;  // for classes of rows that are not instances for one
};

struct Winner {
  uint32_t stored;      // as Logit<T> stores it
  uint32_t expert_idx;  // where `stored` does not tell
};

template <typename T>
__device__ __forceinline__ uint32_t expert_of(const Winner& winner) {
  if constexpr (Logit<T>::kHoldsExpert) {
    return Logit<T>::expert(winner.stored);
  } else {
    return winner.expert_idx;
  }
}

template <typename T>
__device__ __forceinline__ float logit_of(const Winner& winner) {
  return Logit<T>::value(Logit<T>::key(winner.stored));
}

// Calls: load and, when the logits are there, encode; max and sum_numerators if they are needed; then
// prepare, and best and take by turns.
template <typename T, int kValues>
class WaveRow {
 public:
  using Item = T;
  // Whether launchers ever choose kValues on this target; other instances are compiled empty.
  static constexpr bool kIsUsed = kValues * kWaveSize <= kMaxRowExperts;
  static constexpr int kMaxThreads = max_row_threads(kValues);
  static constexpr int kRowsPerWave = 1;
  static constexpr int kPlaces = kValues * kWaveSize;

  static __device__ __forceinline__ int row_in_wave() { return 0; }

  __device__ __forceinline__ void load(const T* row, int num_experts, RowFormat) {
    num_experts = anew(num_experts);
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const uint32_t expert_idx = i * kWaveSize + lane_idx();
      const uint32_t last = num_experts - 1;
      // NOTE: all lanes load, the last logit where there is none; a branch per register costs more.
      const bool exists = always_exists(i) || expert_idx < last;
      stored_[i] = Logit<T>::bits(row[exists ? expert_idx : last]);
    }
  }

  __device__ __forceinline__ void encode(int num_experts) {
    num_experts = anew(num_experts);
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const int expert_idx = i * kWaveSize + lane_idx();
      const uint32_t stored = Logit<T>::store(stored_[i], expert_idx);
      stored_[i] = always_exists(i) || expert_idx < num_experts ? stored : 0;
    }
  }

  __device__ __forceinline__ void prepare() {
    if constexpr (Logit<T>::kHoldsExpert) {
      AITER_UNROLL
      for (int first = 0; first < kValues; first += kGroup) {
        if constexpr (kGroup == 4) {
          sort_four(stored_, first);
        } else {
          order(stored_, first, first + 1);
        }
      }
    }
  }

  // The best candidate that was not taken yet, the same in every lane.
  __device__ __forceinline__ Winner best() const {
    if constexpr (Logit<T>::kHoldsExpert) {
      return {wave_max(max_over<0, kValues / kGroup, kGroup>()), 0};
    } else {
      const uint32_t stored = wave_max(max_over<0, kValues, 1>());
      uint32_t complement = 0;  // of the lane's lowest index with this key; 0 for none
      AITER_UNROLL
      for (int i = kValues - 1; i >= 0; --i) {
        if (stored_[i] == stored) complement = ~static_cast<uint32_t>(i * kWaveSize + lane_idx());
      }
      return {stored, ~wave_max(complement)};
    }
  }

  __device__ __forceinline__ void take(const Winner& winner) {
    if constexpr (Logit<T>::kHoldsExpert) {
      AITER_UNROLL
      for (int first = 0; first < kValues; first += kGroup) {
        const bool taken = stored_[first] == winner.stored;
        AITER_UNROLL
        for (int i = first; i < first + kGroup - 1; ++i) {
          stored_[i] = taken ? stored_[i + 1] : stored_[i];
        }
        stored_[first + kGroup - 1] = taken ? 0 : stored_[first + kGroup - 1];
      }
    } else {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) {
        const bool taken = static_cast<int>(winner.expert_idx) - i * kWaveSize == lane_idx();
        stored_[i] = taken ? 0 : stored_[i];
      }
    }
  }

  // Before prepare().
  __device__ __forceinline__ float max() const {
    return Logit<T>::value(Logit<T>::key(wave_max(max_over<0, kValues, 1>())));
  }

  // Sum of exp(x - max) over the row, before prepare().
  __device__ __forceinline__ float sum_numerators(float max) const {
    return wave_sum_by_halves(sum_by_halves<0, 1>(max));
  }

 private:
  static constexpr int kGroup = kValues < 4 ? kValues : 4;

  // Whether register i holds a logit in every lane: row_values() leaves less than half of them empty.
  static __device__ constexpr bool always_exists(int i) { return kValues > 2 && i < kValues / 2; }

  // Over the kCount registers kFirst, kFirst + kStep, ...
  template <int kFirst, int kCount, int kStep>
  __device__ __forceinline__ uint32_t max_over() const {
    if constexpr (kCount == 1) {
      return stored_[kFirst];
    } else {
      const uint32_t x = max_over<kFirst, kCount / 2, kStep>();
      const uint32_t y = max_over<kFirst + kCount / 2 * kStep, kCount / 2, kStep>();
      return x > y ? x : y;
    }
  }

  // Over the registers kFirst, kFirst + kStep, ...: the halves of the range are summed first.
  template <int kFirst, int kStep>
  __device__ __forceinline__ float sum_by_halves(float max) const {
    if constexpr (kStep == kValues) {
      const uint32_t stored = stored_[kFirst];
      return stored == 0 ? 0.0f : softmax_numerator(Logit<T>::value(Logit<T>::key(stored)), max);
    } else {
      return sum_by_halves<kFirst, 2 * kStep>(max) + sum_by_halves<kFirst + kStep, 2 * kStep>(max);
    }
  }

  uint32_t stored_[kValues];
};

template <typename T>
class WaveRow<T, 0> {
 public:
  using Item = T;
  static constexpr bool kIsUsed = true;
  static constexpr int kMaxThreads = max_row_threads(0);
  static constexpr int kRowsPerWave = 1;
  static constexpr int kPlaces = kAnyPlaces;

  static __device__ __forceinline__ int row_in_wave() { return 0; }

  __device__ __forceinline__ void load(const T* row, int num_experts, RowFormat) {
    row_ = row;
    num_experts_ = num_experts;
  }

  __device__ __forceinline__ void encode(int) {}

  __device__ __forceinline__ void prepare() { last_ = ~uint64_t{0}; }

  __device__ __forceinline__ Winner best() const {
    uint64_t best = 0;
    for (int e = lane_idx(); e < num_experts_; e += kWaveSize) {
      const uint64_t candidate = ordered(stored(e), e);
      if (candidate < last_ && candidate > best) best = candidate;
    }
    best = wave_max(best);
    const uint32_t expert_idx = ~static_cast<uint32_t>(best);
    return {stored(expert_idx), expert_idx};
  }

  __device__ __forceinline__ void take(const Winner& winner) {
    last_ = ordered(winner.stored, winner.expert_idx);
  }

  __device__ __forceinline__ float max() const {
    uint32_t best = 0;
    for (int e = lane_idx(); e < num_experts_; e += kWaveSize) {
      const uint32_t key = Logit<T>::key(stored(e));
      best = key > best ? key : best;
    }
    return Logit<T>::value(wave_max(best));
  }

  __device__ __forceinline__ float sum_numerators(float max) const {
    float sum = 0.0f;
    const int first = lane_idx() < kMinWaveSize ? lane_idx() : num_experts_;
    for (int e = first; e < num_experts_; e += kMinWaveSize) {
      sum += softmax_numerator(Logit<T>::value(Logit<T>::key(stored(e))), max);
    }
    return wave_sum_by_halves(sum);
  }

 private:
  __device__ __forceinline__ uint32_t stored(uint32_t expert_idx) const {
    return Logit<T>::store(Logit<T>::bits(row_[expert_idx]), expert_idx);
  }
  static __device__ __forceinline__ uint64_t ordered(uint32_t stored, uint32_t expert_idx) {
    return static_cast<uint64_t>(Logit<T>::key(stored)) << 32 | static_cast<uint32_t>(~expert_idx);
  }

  const T* row_;
  int num_experts_;
  uint64_t last_;
};

// Runs the selection for a loaded row, which is valid. Sink: put(k, expert_idx, weight) is called once per slot, each
// by one lane; when K exceeds the wave, weights arrive undivided and divide(k, Z) follows, called
// by the same lane.
template <typename T, int kValues, typename Sink>
__device__ __forceinline__ void wave_topk(WaveRow<T, kValues>& row, int num_experts, int topk,
                                          bool need_renorm, bool, Sink& sink) {
  const bool one_pass = topk <= kWaveSize;
  float max = 0.0f;
  float denominator = 0.0f;
  row.encode(num_experts);
  if (!need_renorm) {
    max = row.max();
    denominator = row.sum_numerators(max);
  }
  row.prepare();
  AITER_LOOP
  for (int first = 0; first < topk; first += kWaveSize) {
    const int num_winners = topk - first < kWaveSize ? topk - first : kWaveSize;
    Winner mine{};
    AITER_LOOP
    for (int k = 0; k < num_winners; ++k) {
      const Winner winner = row.best();
      row.take(winner);
      if (k == lane_idx()) mine = winner;
    }
    const bool has_winner = lane_idx() < num_winners;
    const float logit = logit_of<T>(mine);
    if (first == 0) max = wave_read_lane(logit, 0);
    // Lanes without a winner have NaN, for which a division takes steps of its own, and the wave with it.
    float weight = has_winner ? softmax_numerator(logit, max) : 1.0f;
    if (need_renorm) denominator = wave_sum_in_order(weight, num_winners, denominator);
    if (one_pass) weight = weight / denominator;
    if (has_winner) sink.put(first + lane_idx(), expert_of<T>(mine), weight);
  }
  if (one_pass) return;
  AITER_LOOP
  for (int k = lane_idx(); k < topk; k += kWaveSize) sink.divide(k, denominator);
}

}  // namespace aiter
