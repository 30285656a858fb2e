// What a launch knows of its rule, and the steps from a logit to a key and from a score to a weight that rows in
// registers and in memory share (rule_rows.h, memory_rule_row.h).
#pragma once

#include "row_topk.h"
#include "rule_scores.h"

namespace aiter {

enum class FloatKind { f32, f16, bf16, none };  // of logits or bias

// What the selection of a row goes by. NOTE: flags are words, which AMD GPUs load with scalar loads; of neighbouring
// bytes compilers make vector loads, and not even aligned ones.
struct RowRule {
  RoutingRule rule;
  const void* bias;  // [E + Z]
  FloatKind logit_kind, bias_kind;
  uint32_t wide_logits, wide_bias;        // chunks lie on 16-byte boundaries, whole
  int num_candidates, num_experts, topk;  // E + Z, E, K
  int group_width;
  int log2_group_places;   // of RuleRows
  uint32_t in_memory;      // for MemoryRuleRow, whatever RuleRows may hold
  uint32_t top2;           // a group is worth the sum of its two largest keys
  uint32_t key_is_logit;   // else s, and the bias
  uint32_t shares_chosen;  // softmax over the chosen alone: docs/contract.md ("softmax")
  uint32_t is_common;      // for the instances of most models' rules, see rule_rows.h
  uint32_t shares_none;    // softmax that gives all the same where none is above -inf: the same
};

// In two steps, so that what is loaded can be waited for late.
__device__ __forceinline__ uint32_t load_float_bits(const void* items, FloatKind kind, int i) {
  return kind == FloatKind::f32 ? static_cast<const uint32_t*>(items)[i]
                                : static_cast<const uint16_t*>(items)[i];
}
__device__ __forceinline__ float float_of_bits(uint32_t bits, FloatKind kind) {
  if (kind == FloatKind::f32) return bit_cast<float>(bits);
  const auto half = static_cast<uint16_t>(bits);
  return kind == FloatKind::bf16 ? to_float(Bf16{half}) : to_float(F16{half});
}
__device__ __forceinline__ float load_float(const void* items, FloatKind kind, int i) {
  if (kind == FloatKind::f32) return static_cast<const float*>(items)[i];
  return float_of_bits(static_cast<const uint16_t*>(items)[i], kind);
}

__device__ __forceinline__ uint32_t all_ones_if_nan(float x) {
  constexpr uint32_t kInf = 0x7f800000u;
  return all_ones_if_negative(kInf - (bit_cast<uint32_t>(x) & 0x7fffffffu));
}

// The row's maximum, and the sum of exp(x - maximum).
struct RowSoftmax {
  float max = 0.0f, total = 1.0f;
};

// A score of softmax, from exp(x - maximum).
__device__ __forceinline__ float share_of(const RowRule& r, const RowSoftmax& softmax,
                                          float numerator) {
  const bool none = !r.shares_none && softmax.max == -__builtin_inff();
  return none ? 0.0f : numerator / softmax.total;
}

__device__ __forceinline__ float score_of(const RowRule& r, const RowSoftmax& softmax, float x) {
  if (r.rule.scoring_func == kSigmoid) return sigmoid(x);
  if (r.rule.scoring_func == kSqrtSoftplus) return sqrtsoftplus(x);
  return share_of(r, softmax, softmax_numerator(without_nan(x), softmax.max));
}

// The key as best_keys.h takes it: NaN for a candidate that its logit or its key rules out.
__device__ __forceinline__ float eligible_key(float logit, float key) {
  constexpr float kLowest = -__builtin_inff();
  return logit == logit && key > kLowest ? key : __builtin_nanf("");
}

// The key of a candidate, from memory.
__device__ __forceinline__ float key_in_memory(const RowRule& r, const unsigned char* row,
                                               const RowSoftmax& softmax, int candidate) {
  const float logit = load_float(row, r.logit_kind, candidate);
  const float x = scaled_logit(r.rule, logit);
  float key = r.key_is_logit ? x : score_of(r, softmax, x);
  if (r.bias_kind != FloatKind::none) key += load_float(r.bias, r.bias_kind, candidate);
  return eligible_key(logit, key);
}

// NaN counts as -inf.
__device__ __forceinline__ uint32_t ordered_float(float x) {
  return ordered_key(ordinary_bits(bit_cast<uint32_t>(x)));
}

constexpr uint32_t kNotEligible = 0x007fffffu;  // ordered_float() of NaN

// The two largest keys of a group; -inf is none, as is a key that is NaN.
struct BestTwo {
  float first, second;

  static __device__ __forceinline__ BestTwo none() {
    return {-__builtin_inff(), -__builtin_inff()};
  }
  static __device__ __forceinline__ BestTwo of(float x, float y) {
    x = without_nan(x);
    y = without_nan(y);
    return {max_but_nan(x, y), smaller_of(x, y)};
  }
  __device__ __forceinline__ BestTwo with(const BestTwo& other) const {
    const float lower = smaller_of(first, other.first);
    return {max_but_nan(first, other.first), max_but_nan(lower, max_but_nan(second, other.second))};
  }
  // With those of the lanes that differ in the bits kMask, each half of which agree.
  template <int kMask>
  __device__ __forceinline__ void merge() {
    const float theirs = bit_cast<float>(wave_exchange<kMask>(bit_cast<uint32_t>(first)));
    const float their_second = bit_cast<float>(wave_exchange<kMask>(bit_cast<uint32_t>(second)));
    *this = with({theirs, their_second});
  }
  // What the group is worth.
  __device__ __forceinline__ float value(const RowRule& r) const {
    return r.top2 && r.group_width > 1 ? without_nan(first + second) : first;
  }
};

__device__ __forceinline__ float weight_of_x(const RowRule& r, const RowSoftmax& softmax, float x) {
  if (r.shares_chosen) return softmax_numerator(without_nan(x), softmax.max);
  return score_of(r, softmax, x);
}

// The last steps to a weight, once the sum over the chosen is known.
__device__ __forceinline__ float final_weight(const RowRule& r, float weight, float sum) {
  if (r.rule.need_renorm) {
    if (!r.shares_chosen) {
      sum = (sum > r.rule.renorm_min ? sum : r.rule.renorm_min) + r.rule.renorm_eps;
    }
    weight = sum == 0.0f ? 0.0f : weight / sum;
  }
  return weight * r.rule.routed_scaling_factor;
}

// The id of a candidate: zero experts come behind the shared ones.
__device__ __forceinline__ int id_of(const RowRule& r, uint32_t candidate) {
  const int id = static_cast<int>(candidate);
  return id < r.num_experts ? id : id + r.rule.num_shared_experts;
}

}  // namespace aiter
