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
  row.log2_group_places = log2_ceil(std::max(row.group_width, kKeysPerChunk));
  const auto on_boundary = [](uint64_t bytes) { return bytes % sizeof(FourWords) == 0; };
  const bool whole = row.group_width % kKeysPerChunk == 0;
  row.wide_logits = whole && on_boundary(reinterpret_cast<uintptr_t>(gating.data)) &&
                    on_boundary(gating.stride[0] * gating.itemsize);
  row.wide_bias = whole && on_boundary(reinterpret_cast<uintptr_t>(row.bias));
  row.in_memory = false;
  row.top2 = rule.group_score == kByBias ? has_bias : rule.group_score == kTop2;
  row.key_is_logit = is_plain || rule.select_on == kLogit;
  row.is_common = rule.scoring_func == kSigmoid && !row.key_is_logit && rule.logit_scale == 1.0f &&
                  rule.softcap == 0.0f && row.wide_logits && row.logit_kind != FloatKind::f16 &&
                  (!has_bias || (row.wide_bias && row.bias_kind == FloatKind::f32));
  row.shares_chosen = is_plain && rule.need_renorm && rule.renorm_eps <= kNegligibleEps &&
                      rule.renorm_min <= kNegligibleMin;
  row.shares_none = is_plain;
  return row;
}

inline RuleRowShape rule_row_shape(const RowRule& row) {
  if (row.in_memory) return {0, 0};
  const int num_groups = row.rule.num_expert_group;
  const int group_places = num_groups > 1 ? 1 << row.log2_group_places : row.num_candidates;
  return rule_row_shape(num_groups * group_places, group_places, num_groups, row.topk);
}

// Calls f(RowsTag<RuleRows or MemoryRuleRow>{}).
template <typename F>
void dispatch_rule_rows(const RowRule& row, F f) {
  const RuleRowShape shape = rule_row_shape(row);
  if (shape.values == 0) return f(RowsTag<MemoryRuleRow>{});
  const auto by = [&](auto is_common) {
    constexpr bool kIsCommon = decltype(is_common)::value;
    if (shape.best == 32) return f(RowsTag<RuleRows<32, 32, kIsCommon>>{});
    if (shape.values == 8) return f(RowsTag<RuleRows<8, 16, kIsCommon>>{});
    if (shape.values == 16) return f(RowsTag<RuleRows<16, 16, kIsCommon>>{});
    return f(RowsTag<RuleRows<32, 16, kIsCommon>>{});
  };
  return row.is_common ? by(std::true_type{}) : by(std::false_type{});
}

// The same as launchers choose among rows without a rule.
inline RowChoice rule_row_choice(const RowRule& row, const TensorView& gating, int wave_size) {
  const RuleRowShape shape = rule_row_shape(row);
  const bool in_memory = shape.values == 0;
  RowChoice choice{};
  choice.by = in_memory ? RowsBy::wave : RowsBy::keys;
  choice.values = shape.values;
  choice.rows_per_wave = in_memory ? 1 : wave_size / kRuleLanes;
  choice.places = in_memory ? kAnyPlaces : kRuleLanes * shape.values;
  choice.lds_bytes = in_memory ? 0 : best_keys_lds_bytes(wave_size);
  choice.max_threads = in_memory ? max_row_threads(0) : max_rule_threads(shape.values);
  choice.row_stride = gating.stride[0] * gating.itemsize;
  return choice;
}

}  // namespace aiter
