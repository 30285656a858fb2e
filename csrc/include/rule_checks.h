// What the ops that take a RoutingRule check alike.
#pragma once

#include "routing_checks.h"
#include "routing_rule.h"

namespace aiter {

struct RuleShape {
  int64_t num_candidates, topk;  // E + Z, K
};

// That rule, correction_bias and gating_output [M, E + Z (+ S)] fit together, for `num_slots` = K + S slots of a
// row, and returns what follows of them.
RuleShape check_rule(const RoutingRule& rule, const std::optional<TensorView>& correction_bias,
                     const TensorView& gating_output, int64_t num_slots);
// gating_output as wide as `num_experts`, the routed and the shared ones, take.
void check_num_logits(const RoutingRule& rule, const TensorView& gating_output,
                      int64_t num_experts);
// Inner stride 1 and rows that do not share memory.
void check_rows(const TensorView& t);

}  // namespace aiter
