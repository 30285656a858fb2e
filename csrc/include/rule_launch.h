// From a checked rule to kernel parameters, and to the instance that takes its rows.
#pragma once

#include "rule_topk.h"
#include "sort_launch.h"

namespace aiter {

inline FloatKind float_kind(const std::optional<TensorView>& view) {
  if (!view) return FloatKind::none;
  return view->dtype == DType::f32   ? FloatKind::f32
         : view->dtype == DType::f16 ? FloatKind::f16
                                     : FloatKind::bf16;
}

// Of arguments that passed check_rule(); `num_slots` is K + S.
inline RowRule row_rule(const RoutingRule& rule, const std::optional<TensorView>& correction_bias,
                        const TensorView& gating, int64_t num_slots) {
  // What changes no bit of a softmax over the chosen: its denominator is at least 1 there, and at most
  // 65,535 times smaller over all. NOTE: aiter/ops/rule.py has the same numbers.
  constexpr float kNegligibleEps = 0x1p-41f, kNegligibleMin = 0x1p-16f;
  const bool has_bias = correction_bias.has_value();
  const bool is_plain = rule.scoring_func == kSoftmax && !has_bias && rule.num_expert_group == 1;
  RowRule row;
  row.rule = rule;
  row.bias = has_bias ? correction_bias->data : nullptr;
  row.logit_kind = float_kind(gating);
  row.bias_kind = float_kind(correction_bias);
  row.num_candidates = static_cast<int>(gating.shape[1]) - rule.num_shared_logits();
  row.num_experts = row.num_candidates - rule.num_zero_experts;
  row.topk = static_cast<int>(num_slots) - rule.num_shared_experts;
  row.group_width = row.num_candidates / rule.num_expert_group;
  row.log2_groups = log2_of(rule.num_expert_group);
  row.top2 = rule.group_score == kByBias ? has_bias : rule.group_score == kTop2;
  row.key_is_logit = is_plain || rule.select_on == kLogit;
  row.shares_chosen = is_plain && rule.need_renorm && rule.renorm_eps <= kNegligibleEps &&
                      rule.renorm_min <= kNegligibleMin;
  row.counts_infinite = is_plain;
  return row;
}

// Calls f(RowsTag<RuleRow>{}).
template <typename F>
void dispatch_rule_rows(const RowRule& row, int wave_size, F f) {
  static_assert(kMaxRowValues == 32, "one case per power of two from 4 on");
  switch (rule_row_values(row.num_candidates, row.rule.num_expert_group, wave_size)) {
    case 4:
      return f(RowsTag<RuleRow<4>>{});
    case 8:
      return f(RowsTag<RuleRow<8>>{});
    case 16:
      return f(RowsTag<RuleRow<16>>{});
    case 32:
      return f(RowsTag<RuleRow<32>>{});
    default:
      return f(RowsTag<RuleRow<0>>{});
  }
}

}  // namespace aiter
