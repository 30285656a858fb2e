// The checks of rule_checks.h.
#include "rule_checks.h"

#include <algorithm>

namespace aiter {
namespace {

void check_bias(const RoutingRule& rule, const TensorView& bias, int64_t num_candidates) {
  check_rank(bias, 1);
  check_dtype(bias, {DType::f32, DType::f16, DType::bf16});
  if (bias.shape[0] != num_candidates) {
    fail_argument(bias.name,
                  "shape [" + std::to_string(num_candidates) + "], a number per routed" +
                      (rule.num_zero_experts > 0 ? " and zero" : "") + " expert",
                  shape_of(bias));
  }
  check_contiguous(bias);
  if (rule.select_on == kLogit) {
    fail_argument(bias.name, "None with a rule of select_on 'logit'",
                  "a tensor (shape " + shape_of(bias) + ")");
  }
}

}  // namespace

RuleShape check_rule(const RoutingRule& rule, const std::optional<TensorView>& correction_bias,
                     const TensorView& gating_output, int64_t num_slots) {
  check_rank(gating_output, 2);
  check_gating(gating_output, gating_output.shape[1]);
  const int64_t behind = rule.num_zero_experts + rule.num_shared_logits();
  const int64_t width = gating_output.shape[1];
  if (width <= behind) {
    fail_argument(gating_output.name,
                  "more than " + std::to_string(behind) +
                      " columns, those of the rule's zero and shared experts",
                  shape_of(gating_output));
  }
  const int64_t num_candidates = width - rule.num_shared_logits();
  const int64_t num_shared = rule.num_shared_experts;
  check_range("topk", num_slots - num_shared, 1, std::min(num_candidates, kMaxTopk - num_shared));
  check_range("num_experts", num_candidates + num_shared, 1, kMaxExperts);
  if (num_candidates % rule.num_expert_group != 0) {
    fail_argument(gating_output.name,
                  "experts in " + std::to_string(rule.num_expert_group) + " groups of equal size",
                  std::to_string(num_candidates) + " experts");
  }
  if (correction_bias) check_bias(rule, *correction_bias, num_candidates);
  return {num_candidates, num_slots - num_shared};
}

void check_num_logits(const RoutingRule& rule, const TensorView& gating_output,
                      int64_t num_experts) {
  check_rank(gating_output, 2);
  const int64_t without_logits = rule.num_shared_experts - rule.num_shared_logits();
  const int64_t wanted = num_experts - without_logits + rule.num_zero_experts;
  if (gating_output.shape[1] == wanted) return;
  fail_argument(gating_output.name,
                "shape [any, " + std::to_string(wanted) + "] for num_experts " +
                    std::to_string(num_experts) + " with " +
                    std::to_string(rule.num_shared_experts) + " shared and " +
                    std::to_string(rule.num_zero_experts) + " zero ones",
                shape_of(gating_output));
}

void check_rows(const TensorView& t) {
  if (t.numel() == 0) return;
  if (t.shape[1] > 1 && t.stride[1] != 1) {
    fail_argument(t.name, "inner stride 1", std::to_string(t.stride[1]));
  }
  if (t.shape[0] > 1 && t.stride[0] < t.shape[1]) {
    fail_argument(t.name,
                  "rows that do not overlap, of stride " + std::to_string(t.shape[1]) + " or more",
                  std::to_string(t.stride[0]));
  }
}

}  // namespace aiter
