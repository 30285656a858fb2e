// Top-k of rows of logits by any rule (routing_rule.h): what topk_routing and the fused launch share, beside
// key_topk.h, group_topk.h and row_topk.h for softmax alone.
//
//   candidates  E experts and Z zero experts, logits 0 .. E + Z - 1; the logits of shared experts follow
//   key         of a candidate, f32; NaN if it is not eligible. So what fills a row up, the lowest candidates
//               that are left, comes last by itself
//   winners     the K largest (key, -candidate) in descending order
//
// Lane k of a row gets winner k of rule_rows.h, with s of it, or x where logits are chosen by. Rows that are selected
// by steps, and those in memory (memory_rule_row.h), read the winners' logits once more and take the same way to s.
#pragma once

#include "memory_rule_row.h"
#include "rule_rows.h"

namespace aiter {

static_assert(kMaxRulePlaces == kMaxRowExperts, "MemoryRuleRow sums rows up to there as RuleRows");

// What a winner weighs before it is divided.
template <typename Rows>
__device__ __forceinline__ float weight_of(const Rows& row, const RowSoftmax& softmax,
                                           const Winner& winner) {
  const RowRule& r = row.rule();
  if (!r.shares_none && winner.stored == kNotEligible) return 0.0f;
  if (!r.key_is_logit && r.bias_kind == FloatKind::none) {
    return bit_cast<float>(bits_of_key(winner.stored));
  }
  const float x = scaled_logit(r.rule, row.logit(static_cast<int>(winner.expert_idx)));
  return weight_of_x(r, softmax, x);
}

// Puts the shared experts in their slots, lane l of `num_lanes` slots l, num_lanes + l and so on.
template <typename Rows, typename Sink>
__device__ __forceinline__ void put_shared(const Rows& row, int lane, int num_lanes, bool valid,
                                           Sink& sink) {
  const RowRule& r = row.rule();
  if (!AITER_UNLIKELY(r.rule.num_shared_experts != 0)) return;
  AITER_LOOP
  for (int k = lane; k < r.topk + r.rule.num_shared_experts; k += num_lanes) {
    if (k < r.topk) continue;
    float weight = r.rule.shared_expert_weight;
    if (r.rule.shared_expert_scoring_func == kSharedSigmoid) {
      const float logit = row.logit(r.num_candidates + k - r.topk);
      weight = logit == logit ? sigmoid(logit) : 0.0f;
    }
    if (valid) sink.put(k, r.num_experts + k - r.topk, weight);
  }
}

// Runs the selection for the loaded rows, as row_topk.h does; sink and `valid` are the lane's row's. Sink:
// put(k, id, weight) is called once per slot, each by one lane.
template <int kValues, int kBest, bool kIsCommon, typename Sink>
__device__ __forceinline__ void wave_topk(RuleRows<kValues, kBest, kIsCommon>& rows, int, int, bool,
                                          bool valid, Sink& sink) {
  const RowRule& r = rows.rule();
  RowSoftmax softmax;
  const auto mine = rows.select(softmax);
  float weight = mine.score;
  if (AITER_UNLIKELY(!mine.has_score)) {
    if constexpr (kIsCommon) {
      const bool chosen = mine.winner.stored != kNotEligible;
      weight = chosen ? sigmoid(rows.logit(static_cast<int>(mine.winner.expert_idx))) : 0.0f;
    } else {
      weight = weight_of(rows, softmax, mine.winner);
    }
  } else if (!kIsCommon && r.key_is_logit) {
    weight = weight_of_x(r, softmax, mine.score);
  }
  float sum = 0.0f;
  if (r.rule.need_renorm) sum = wave_sum_in_groups<kRuleLanes>(weight, r.topk);
  weight = final_weight(r, weight, sum);
  const int k = lane_idx() % kRuleLanes;
  if (valid && k < r.topk) sink.put(k, id_of(r, mine.winner.expert_idx), weight);
  put_shared(rows, k, kRuleLanes, valid, sink);
}

// When K exceeds the wave, weights arrive before their last steps, and finish(k, f) replaces each by f of it,
// called by the same lane.
template <typename Sink>
__device__ __forceinline__ void wave_topk(MemoryRuleRow& row, int, int, bool, bool, Sink& sink) {
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
    if (lane_idx() < num_winners) {
      sink.put(first + lane_idx(), id_of(r, mine.expert_idx), weight);
    }
  }
  if (!one_pass) {
    AITER_LOOP
    for (int k = lane_idx(); k < topk; k += kWaveSize) {
      sink.finish(k, [&](float weight) { return final_weight(r, weight, sum); });
    }
  }
  put_shared(row, lane_idx(), kWaveSize, true, sink);
}

}  // namespace aiter
