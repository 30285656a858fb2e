// Top-k of one row of logits by one wave, by any rule (routing_rule.h): what topk_routing and the fused launch
// share, beside row_topk.h and group_topk.h for softmax alone.
//
//   candidates  E experts and Z zero experts, logits 0 .. E + Z - 1; the logits of shared experts follow
//   stored      of a candidate: its key as an integer that orders like it, 1 if it is not eligible; 0 for none.
//               So what fills a row up, the lowest candidates that are left, comes last by itself
//   winners     the K largest (stored, -candidate) in descending order
//
// A group of experts owns W / G neighbouring lanes of the wave of W, all of them where there are no groups:
// with L = W / G, lane l of a group holds its members l, L + l, 2L + l, ... in kValues registers, and a
// group's value is what its lanes find out by swapping their two largest keys.
//
//   1 x and s of all registers; for a softmax the row's maximum and sum before. The key of a register
//   2 groups: value, and how many groups are better; members of groups that do not stay are not eligible
//   3 a step per winner: maximum over the registers, over the wave; the lanes that have it are seen at once,
//     so that the lowest candidate has to be looked for only where keys of several lanes are equal
//   4 lane k weighs winner k: it reads the logit once more, from a cache, and takes the same way to s. Where s
//     is the key there is nothing to read
//
// Sums over all candidates of a softmax are those of row_topk.h, in the same order of indices, so that a plain
// softmax has the same bits here. Where groups have their members elsewhere, logits are read in that order.
//
// The dtypes of logits and bias are asked for at run time: an instance for each, and for each scoring function,
// would be nine times as many to compile, for a uniform branch less per row.
//
// With kValues = 0 the row stays in memory, for E + Z > kMaxRowExperts and for groups that are no power of two
// or more than kMaxLaneGroups: a lane takes whole groups, and every step looks at all keys anew. Slowly.
//
// Rejected: carrying s beside the key through the selection, as many registers again; carrying s - key,
// which loses bits when the bias is large.
#pragma once

#include "row_topk.h"
#include "rule_scores.h"

namespace aiter {

constexpr int kMaxLaneGroups = 32;

enum class FloatKind { f32, f16, bf16, none };  // of logits or bias

// What the selection of a row goes by.
struct RowRule {
  RoutingRule rule;
  const void* bias;  // [E + Z]
  FloatKind logit_kind, bias_kind;
  int num_candidates, num_experts, topk;  // E + Z, E, K
  int group_width, log2_groups;           // the latter where groups are kept in lanes
  bool top2;                              // a group is worth the sum of its two largest keys
  bool key_is_logit;                      // else s, and the bias
  bool shares_chosen;                     // softmax over the chosen alone: section 2
  bool
      counts_infinite;  // softmax that gives every candidate the same where none is above -inf: section 2
};

// Registers of a lane, of either wave width: the least instance that holds a group in its lanes.
__host__ __device__ constexpr int rule_row_values(int num_candidates, int num_groups,
                                                  int wave_size) {
  const bool in_lanes = num_candidates <= kMaxRowExperts && num_groups <= kMaxLaneGroups &&
                        (num_groups & (num_groups - 1)) == 0;
  if (!in_lanes) return 0;
  int values = 4;
  while (values * wave_size < num_candidates) values *= 2;
  return values;
}

__host__ __device__ constexpr int log2_of(int power_of_two) {
  int exponent = 0;
  while ((1 << exponent) < power_of_two) ++exponent;
  return exponent;
}

__device__ __forceinline__ float load_float(const void* items, FloatKind kind, int i) {
  if (kind == FloatKind::f32) return static_cast<const float*>(items)[i];
  const uint16_t bits = static_cast<const uint16_t*>(items)[i];
  return kind == FloatKind::bf16 ? to_float(Bf16{bits}) : to_float(F16{bits});
}

// The row's maximum, and the sum of exp(x - maximum).
struct RowSoftmax {
  float max = 0.0f, total = 1.0f;
};

__device__ __forceinline__ float score_of(const RowRule& r, const RowSoftmax& softmax, float x) {
  if (r.rule.scoring_func == kSigmoid) return sigmoid(x);
  if (r.rule.scoring_func == kSqrtSoftplus) return sqrtsoftplus(x);
  x = without_nan(x);
  if (!r.counts_infinite && softmax.max == -__builtin_inff()) return 0.0f;
  return softmax_numerator(x, softmax.max) / softmax.total;
}

constexpr uint32_t kNotEligible = 1;

// `logit` decides together with the key.
__device__ __forceinline__ uint32_t stored_of(float logit, float key) {
  constexpr float kLowest = -__builtin_inff();
  const bool eligible = logit == logit && key > kLowest;
  return eligible ? ordered_key(bit_cast<uint32_t>(key + 0.0f)) : kNotEligible;
}

__device__ __forceinline__ float key_of_stored(uint32_t stored) {
  return stored <= kNotEligible ? -__builtin_inff() : bit_cast<float>(bits_of_key(stored));
}

// What a group is worth, by its two largest.
__device__ __forceinline__ float group_value(const RowRule& r, uint32_t first, uint32_t second) {
  const float value = key_of_stored(first);
  if (!r.top2 || r.group_width == 1) return value;
  return without_nan(value + key_of_stored(second));
}

// Calls: load; select; next K times.
template <int kValues>
class RuleRow {
 public:
  using Item = unsigned char;  // rows are bytes apart
  static constexpr bool kIsUsed = kValues * kWaveSize <= kMaxRowExperts;
  static constexpr int kMaxThreads = max_row_threads(kValues);
  static constexpr int kRowsPerWave = 1;

  static __device__ __forceinline__ int row_in_wave() { return 0; }

  __device__ __forceinline__ explicit RuleRow(const RowRule& rule)
      : rule_(&rule), log2_lanes_(log2_of(kWaveSize) - rule.log2_groups) {}

  __device__ __forceinline__ const RowRule& rule() const { return *rule_; }

  __device__ __forceinline__ void load(const Item* row, int, bool) {
    const RowRule& r = *rule_;
    row_ = row;
    load_items(row, r.logit_kind, raw_);
    if (r.bias_kind != FloatKind::none) load_items(r.bias, r.bias_kind, raw_bias_);
  }

  // From logits to what is stored of every candidate.
  __device__ __forceinline__ RowSoftmax select() {
    const RowRule& r = *rule_;
    float logit[kValues], x[kValues], key[kValues];
    convert(raw_, r.logit_kind, logit);
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) x[i] = scaled_logit(r.rule, logit[i]);
    RowSoftmax softmax;
    if (r.rule.scoring_func == kSoftmax) softmax = softmax_of(x);
    score(softmax, x, key);
    if (r.bias_kind != FloatKind::none) {
      float bias[kValues];
      convert(raw_bias_, r.bias_kind, bias);
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) key[i] += bias[i];
    }
    const int width = anew(r.group_width);
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      stored_[i] = member(i) < width ? stored_of(logit[i], key[i]) : 0;
    }
    if (r.rule.num_expert_group > 1) keep_best_groups();
    return softmax;
  }

  // The best candidate that was not taken yet, the same in every lane, and takes it.
  __device__ __forceinline__ Winner next() {
    uint32_t best_here = stored_[0];
    AITER_UNROLL
    for (int i = 1; i < kValues; ++i) best_here = stored_[i] > best_here ? stored_[i] : best_here;
    const uint32_t best = wave_max(best_here);
    int register_idx = 0;  // the lowest that has it
    AITER_UNROLL
    for (int i = kValues - 1; i >= 0; --i)
      register_idx = stored_[i] == best_here ? i : register_idx;
    const uint32_t candidate = candidate_of(register_idx);
    const WaveMask lanes = wave_ballot(best_here == best);
    uint32_t winner = 0;
    if ((lanes & (lanes - 1)) == 0) {
      winner = wave_read_lane(candidate, lowest_lane(lanes));
    } else {
      winner = ~wave_max(best_here == best ? ~candidate : 0u);
    }
    const int taken = best_here == best && candidate == winner ? register_idx : -1;
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) stored_[i] = i == taken ? 0 : stored_[i];
    return {best, winner};
  }

  __device__ __forceinline__ float logit(uint32_t candidate) const {
    return load_float(row_, rule_->logit_kind, static_cast<int>(candidate));
  }

  __device__ __forceinline__ void forget() {
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) raw_[i] = raw_bias_[i] = 0;
  }

 private:
  // The lane's group, and which member of it register i holds.
  __device__ __forceinline__ int group() const { return lane_idx() >> log2_lanes_; }
  __device__ __forceinline__ int member(int i) const {
    return (i << log2_lanes_) + lane_idx() - (group() << log2_lanes_);
  }
  __device__ __forceinline__ uint32_t candidate_of(int i) const {
    return group() * rule_->group_width + member(i);
  }

  // All lanes load, the group's last item where there is none.
  __device__ __forceinline__ void load_items(const void* items, FloatKind kind,
                                             uint32_t (&raw)[kValues]) const {
    const int width = anew(rule_->group_width);
    const int first = group() * width;
    const auto item = [&](int i) { return first + (member(i) < width ? member(i) : width - 1); };
    if (kind == FloatKind::f32) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) raw[i] = static_cast<const uint32_t*>(items)[item(i)];
    } else {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) raw[i] = static_cast<const uint16_t*>(items)[item(i)];
    }
  }

  static __device__ __forceinline__ void convert(const uint32_t (&raw)[kValues], FloatKind kind,
                                                 float (&to)[kValues]) {
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      to[i] = bit_cast<float>(kind == FloatKind::bf16 ? raw[i] << 16 : raw[i]);
    }
    if (kind != FloatKind::f16) return;
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) to[i] = to_float(F16{static_cast<uint16_t>(raw[i])});
  }

  __device__ __forceinline__ void score(const RowSoftmax& softmax, const float (&x)[kValues],
                                        float (&key)[kValues]) const {
    const RowRule& r = *rule_;
    if (r.key_is_logit) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) key[i] = x[i];
    } else if (r.rule.scoring_func == kSigmoid) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) key[i] = sigmoid(x[i]);
    } else if (r.rule.scoring_func == kSqrtSoftplus) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) key[i] = sqrtsoftplus(x[i]);
    } else {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) key[i] = score_of(r, softmax, x[i]);
    }
  }

  // In the order of indices without groups: register i of lane l is candidate i * kWaveSize + l.
  __device__ __forceinline__ RowSoftmax softmax_of(const float (&x)[kValues]) const {
    const RowRule& r = *rule_;
    float ordered[kValues];
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) ordered[i] = x[i];
    if (r.rule.num_expert_group > 1) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) {
        const int candidate = i * kWaveSize + lane_idx();
        const int last = r.num_candidates - 1;
        ordered[i] = scaled_logit(r.rule, logit(candidate < last ? candidate : last));
      }
    }
    uint32_t best = 0;
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      ordered[i] = without_nan(ordered[i]);
      const uint32_t key = ordered_key(bit_cast<uint32_t>(ordered[i] + 0.0f));
      best = key > best ? key : best;  // the last once more does not matter
    }
    RowSoftmax softmax;
    softmax.max = bit_cast<float>(bits_of_key(wave_max(best)));
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const bool counts = i * kWaveSize + lane_idx() < r.num_candidates;
      ordered[i] = counts ? softmax_numerator(ordered[i], softmax.max) : 0.0f;
    }
    softmax.total = wave_sum_by_halves(sum_by_halves<0, 1>(ordered));
    return softmax;
  }

  // Over the registers kFirst, kFirst + kStep, ...: the halves of the range are summed first.
  template <int kFirst, int kStep>
  static __device__ __forceinline__ float sum_by_halves(const float (&terms)[kValues]) {
    if constexpr (kStep == kValues) {
      return terms[kFirst];
    } else {
      return sum_by_halves<kFirst, 2 * kStep>(terms) +
             sum_by_halves<kFirst + kStep, 2 * kStep>(terms);
    }
  }

  // The two largest of the lane's group.
  struct Best {
    uint32_t first, second;
    __device__ __forceinline__ void add(uint32_t x) {
      const uint32_t lower = x < first ? x : first;
      first = x > first ? x : first;
      second = lower > second ? lower : second;
    }
    template <int kDistance>
    __device__ __forceinline__ void merge(int lanes) {
      if (lanes <= kDistance) return;
      const uint32_t theirs = wave_swap<kDistance>(first);
      const uint32_t their_second = wave_swap<kDistance>(second);
      add(theirs);
      second = their_second > second ? their_second : second;
    }
  };

  __device__ __forceinline__ void keep_best_groups() {
    const RowRule& r = *rule_;
    const int lanes = 1 << log2_lanes_;
    Best best{0, 0};
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) best.add(stored_[i]);
    best.template merge<1>(lanes);
    best.template merge<2>(lanes);
    best.template merge<4>(lanes);
    best.template merge<8>(lanes);
    best.template merge<16>(lanes);
    const uint32_t value = ordered_key(bit_cast<uint32_t>(group_value(r, best.first, best.second)));
    int num_better = 0;
    AITER_LOOP
    for (int g = 0; g < r.rule.num_expert_group; ++g) {
      const uint32_t other = wave_read_lane(value, g << log2_lanes_);
      num_better += other > value || (other == value && g < group()) ? 1 : 0;
    }
    const bool stays = num_better < r.rule.topk_group;
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      stored_[i] = stays || stored_[i] == 0 ? stored_[i] : kNotEligible;
    }
  }

  const RowRule* rule_;
  const Item* row_ = nullptr;
  int log2_lanes_;  // of a group
  uint32_t raw_[kValues], raw_bias_[kValues];
  uint32_t stored_[kValues];
};

template <>
class RuleRow<0> {
 public:
  using Item = unsigned char;
  static constexpr bool kIsUsed = true;
  static constexpr int kMaxThreads = max_row_threads(0);
  static constexpr int kRowsPerWave = 1;

  static __device__ __forceinline__ int row_in_wave() { return 0; }

  __device__ __forceinline__ explicit RuleRow(const RowRule& rule) : rule_(&rule) {}

  __device__ __forceinline__ const RowRule& rule() const { return *rule_; }

  __device__ __forceinline__ void load(const Item* row, int, bool) { row_ = row; }

  __device__ __forceinline__ RowSoftmax select() {
    const RowRule& r = *rule_;
    if (r.rule.scoring_func == kSoftmax) find_softmax();
    last_ = ~uint64_t{0};
    last_group_ = ~uint64_t{0};
    if (r.rule.num_expert_group == 1) return softmax_;
    AITER_LOOP
    for (int t = 0; t < r.rule.topk_group; ++t) {
      uint64_t best = 0;
      AITER_LOOP
      for (int g = lane_idx(); g < r.rule.num_expert_group; g += kWaveSize) {
        const uint64_t group = ordered_group(g);
        if (group < last_group_ && group > best) best = group;
      }
      last_group_ = wave_max(best);
    }
    return softmax_;
  }

  // A lane takes whole groups, or single candidates where there is one group.
  __device__ __forceinline__ Winner next() {
    const RowRule& r = *rule_;
    const bool in_groups = r.rule.num_expert_group > 1;
    const int width = in_groups ? r.group_width : 1;
    uint64_t best = 0;
    AITER_LOOP
    for (int first = lane_idx() * width; first < r.num_candidates; first += kWaveSize * width) {
      const bool stays = !in_groups || ordered_group(first / width) >= last_group_;
      AITER_LOOP
      for (int c = first; c < first + width; ++c) {
        const uint64_t ordered = ordered_pair(stays ? stored_at(c) : kNotEligible, c);
        if (ordered < last_ && ordered > best) best = ordered;
      }
    }
    last_ = wave_max(best);
    return {static_cast<uint32_t>(last_ >> 32), ~static_cast<uint32_t>(last_)};
  }

  __device__ __forceinline__ float logit(uint32_t candidate) const {
    return load_float(row_, rule_->logit_kind, static_cast<int>(candidate));
  }

  __device__ __forceinline__ void forget() {}

 private:
  static __device__ __forceinline__ uint64_t ordered_pair(uint32_t value, int index) {
    return static_cast<uint64_t>(value) << 32 | static_cast<uint32_t>(~index);
  }

  __device__ __forceinline__ uint32_t stored_at(int candidate) const {
    const RowRule& r = *rule_;
    const float of = logit(candidate);
    const float x = scaled_logit(r.rule, of);
    float key = r.key_is_logit ? x : score_of(r, softmax_, x);
    if (r.bias_kind != FloatKind::none) key += load_float(r.bias, r.bias_kind, candidate);
    return stored_of(of, key);
  }

  __device__ __forceinline__ uint64_t ordered_group(int group) const {
    const RowRule& r = *rule_;
    uint32_t first = 0, second = 0;
    AITER_LOOP
    for (int i = 0; i < r.group_width; ++i) {
      const uint32_t stored = stored_at(group * r.group_width + i);
      const uint32_t lower = stored < first ? stored : first;
      first = stored > first ? stored : first;
      second = lower > second ? lower : second;
    }
    return ordered_pair(ordered_key(bit_cast<uint32_t>(group_value(r, first, second))), group);
  }

  // By kMinWaveSize lanes, as WaveRow's in memory.
  __device__ __forceinline__ void find_softmax() {
    const RowRule& r = *rule_;
    const auto x_at = [&](int c) { return without_nan(scaled_logit(r.rule, logit(c))); };
    uint32_t best = 0;
    AITER_LOOP
    for (int c = lane_idx(); c < r.num_candidates; c += kWaveSize) {
      const uint32_t key = ordered_key(bit_cast<uint32_t>(x_at(c) + 0.0f));
      best = key > best ? key : best;
    }
    softmax_.max = bit_cast<float>(bits_of_key(wave_max(best)));
    float sum = 0.0f;
    const int first = lane_idx() < kMinWaveSize ? lane_idx() : r.num_candidates;
    AITER_LOOP
    for (int c = first; c < r.num_candidates; c += kMinWaveSize) {
      sum += softmax_numerator(x_at(c), softmax_.max);
    }
    softmax_.total = wave_sum_by_halves(sum);
  }

  const RowRule* rule_;
  const Item* row_ = nullptr;
  RowSoftmax softmax_;
  uint64_t last_ = 0, last_group_ = 0;  // winner and group that were taken last
};

template <int kValues>
__device__ __forceinline__ void drop(RuleRow<kValues>& row) {
  row.forget();
}

// What a winner weighs before it is divided.
template <int kValues>
__device__ __forceinline__ float weight_of(const RuleRow<kValues>& row, const RowSoftmax& softmax,
                                           const Winner& winner) {
  const RowRule& r = row.rule();
  if (!r.counts_infinite && winner.stored == kNotEligible) return 0.0f;
  if (!r.key_is_logit && r.bias_kind == FloatKind::none) return key_of_stored(winner.stored);
  const float x = scaled_logit(r.rule, row.logit(winner.expert_idx));
  if (r.shares_chosen) return softmax_numerator(without_nan(x), softmax.max);
  return score_of(r, softmax, x);
}

// The last steps to a weight, once the sum over the chosen is known.
__device__ __forceinline__ float final_weight(const RowRule& r, float weight, float sum) {
  if (r.rule.need_renorm) {
    if (!r.shares_chosen)
      sum = (sum > r.rule.renorm_min ? sum : r.rule.renorm_min) + r.rule.renorm_eps;
    weight = sum == 0.0f ? 0.0f : weight / sum;
  }
  return weight * r.rule.routed_scaling_factor;
}

// Runs the selection for a loaded row, as row_topk.h does. Sink: put(k, id, weight) is called once per
// slot, each by one lane; when K exceeds the wave, weights arrive before their last steps, and
// finish(k, f) replaces each by f of it, called by the same lane.
template <int kValues, typename Sink>
__device__ __forceinline__ void wave_topk(RuleRow<kValues>& row, int, int, bool, bool, Sink& sink) {
  const RowRule& r = row.rule();
  const int topk = r.topk;
  const bool one_pass = topk <= kWaveSize;
  const RowSoftmax softmax = row.select();
  float sum = 0.0f;
  AITER_LOOP
  for (int first = 0; first < topk; first += kWaveSize) {
    const int num_winners = topk - first < kWaveSize ? topk - first : kWaveSize;
    Winner mine{};
    AITER_LOOP
    for (int k = 0; k < num_winners; ++k) {
      const Winner winner = row.next();
      if (k == lane_idx()) mine = winner;
    }
    float weight = weight_of(row, softmax, mine);
    if (r.rule.need_renorm) sum = wave_sum_in_order(weight, num_winners, sum);
    if (one_pass) weight = final_weight(r, weight, sum);
    const int id = static_cast<int>(mine.expert_idx);
    if (lane_idx() < num_winners) {
      sink.put(first + lane_idx(), id < r.num_experts ? id : id + r.rule.num_shared_experts,
               weight);
    }
  }
  if (!one_pass) {
    AITER_LOOP
    for (int k = lane_idx(); k < topk; k += kWaveSize) {
      sink.finish(k, [&](float weight) { return final_weight(r, weight, sum); });
    }
  }
  const int num_shared = r.rule.num_shared_experts;
  if (num_shared == 0) return;
  AITER_LOOP
  for (int k = lane_idx(); k < topk + num_shared; k += kWaveSize) {
    if (k < topk) continue;
    float weight = r.rule.shared_expert_weight;
    if (r.rule.shared_expert_scoring_func == kSharedSigmoid) {
      const float logit = row.logit(r.num_candidates + k - topk);
      weight = logit == logit ? sigmoid(logit) : 0.0f;
    }
    sink.put(k, r.num_experts + k - topk, weight);
  }
}

}  // namespace aiter
