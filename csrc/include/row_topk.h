// Softmax and top-k of one row of logits by one wave: what topk_softmax and the fused launch share.
//
//   x_e     logit of expert e as f32, NaN read as -inf
//   winners the K largest (x_e, -e) in descending order
//   w_k     exp(x_k - x_0) / Z;  Z = sum over the winners in slot order (need_renorm), or over all E
//
// Lane l of a wave of W holds the logits of experts l, W + l, 2W + l, ... in kValues registers.
// A step of the selection takes the best candidate below the last winner in every lane, then the
// maximum over the wave; "below the last winner" needs no removal from the registers, and cannot
// pick an expert twice. Lane k keeps winner k, so exp and the division are done once for all
// winners and not once for each. With kValues = 0 the row stays in memory and is read again in
// every step: any E, slowly.
//
// Z over all E is summed by halves of the index range (wave_sum_by_halves, and the same over the
// registers), so that its last bit does not depend on the wave width nor on kValues > 0.
#pragma once

#include "device/numeric.h"
#include "device/wave.h"

namespace aiter {

// kValues registers of a lane, as launchers choose them: the smallest that holds a row.
constexpr int kMaxRowValues = 32;

inline int row_values(int num_experts, int wave_size) {
  for (int values = 2; values <= kMaxRowValues; values *= 2) {
    if (values * wave_size >= num_experts) return values;
  }
  return 0;
}

// ((x_0 + x_n/2) + ...): first and second half are added, then the same with the n/2 sums.
template <int n>
__device__ __forceinline__ float sum_by_halves(const float (&x)[n]) {
  if constexpr (n == 1) {
    return x[0];
  } else {
    float sum[n / 2];
    AITER_UNROLL
    for (int i = 0; i < n / 2; ++i) sum[i] = x[i] + x[i + n / 2];
    return sum_by_halves(sum);
  }
}

template <typename T, int kValues>
class WaveRow {
 public:
  using Candidate = typename Logit<T>::Candidate;

  __device__ __forceinline__ WaveRow(const T* row, int num_experts) {
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const int expert_idx = i * kWaveSize + lane_idx();
      stored_[i] = expert_idx < num_experts ? Logit<T>::store(row[expert_idx], expert_idx) : 0;
    }
  }

  __device__ __forceinline__ Candidate best_below(Candidate last) const {
    Candidate best = 0;
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const Candidate c = Logit<T>::candidate(stored_[i], i * kWaveSize + lane_idx());
      if (c < last && c > best) best = c;
    }
    return best;
  }

  __device__ __forceinline__ float sum_numerators(float max) const {
    float term[kValues];
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      term[i] = stored_[i] == 0 ? 0.0f : softmax_numerator(Logit<T>::value(stored_[i]), max);
    }
    return wave_sum_by_halves(sum_by_halves(term));
  }

 private:
  typename Logit<T>::Stored stored_[kValues];
};

template <typename T>
class WaveRow<T, 0> {
 public:
  using Candidate = typename Logit<T>::Candidate;

  __device__ __forceinline__ WaveRow(const T* row, int num_experts)
      : row_(row), num_experts_(num_experts) {}

  __device__ __forceinline__ Candidate best_below(Candidate last) const {
    Candidate best = 0;
    for (int e = lane_idx(); e < num_experts_; e += kWaveSize) {
      const Candidate c = Logit<T>::candidate(Logit<T>::store(row_[e], e), e);
      if (c < last && c > best) best = c;
    }
    return best;
  }

  __device__ __forceinline__ float sum_numerators(float max) const {
    float sum = 0.0f;
    for (int e = lane_idx(); e < num_experts_; e += kWaveSize) {
      sum += softmax_numerator(Logit<T>::value(Logit<T>::store(row_[e], e)), max);
    }
    return wave_sum_by_halves(sum);
  }

 private:
  const T* row_;
  int num_experts_;
};

// Runs the selection for one row. Sink: put(k, expert_idx, weight) is called once per slot, each
// by one lane; when K exceeds the wave, weights arrive undivided and divide(k, Z) follows, called
// by the same lane.
template <typename T, int kValues, typename Sink>
__device__ __forceinline__ void wave_topk(const T* row, int num_experts, int topk,
                                          bool need_renorm, Sink& sink) {
  using Candidate = typename Logit<T>::Candidate;
  const WaveRow<T, kValues> values(row, num_experts);
  const bool one_pass = topk <= kWaveSize;
  Candidate last = ~Candidate{0};
  float max = 0.0f;
  float denominator = 0.0f;
  for (int first = 0; first < topk; first += kWaveSize) {
    const int num_winners = topk - first < kWaveSize ? topk - first : kWaveSize;
    Candidate mine = 0;
    for (int k = 0; k < num_winners; ++k) {
      last = wave_max(values.best_below(last));
      if (k == lane_idx()) mine = last;
      if (first + k == 0) {
        max = Logit<T>::candidate_value(last);
      }
    }
    if (first == 0 && !need_renorm) denominator = values.sum_numerators(max);
    float weight = softmax_numerator(Logit<T>::candidate_value(mine), max);
    if (need_renorm) denominator = wave_sum_in_order(weight, num_winners, denominator);
    if (one_pass) weight = weight / denominator;
    if (lane_idx() < num_winners) {
      sink.put(first + lane_idx(), Logit<T>::candidate_expert(mine), weight);
    }
  }
  if (one_pass) return;
  for (int k = lane_idx(); k < topk; k += kWaveSize) sink.divide(k, denominator);
}

}  // namespace aiter
