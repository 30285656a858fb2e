// topk_routing as bindings call it: checked arguments in, one launch out.
#pragma once

#include "rule_checks.h"

namespace aiter {

struct TopkRoutingArgs {
  TensorView topk_weights, topk_ids, gating_output;
  RoutingRule rule;
  std::optional<TensorView> correction_bias;
  std::optional<CountsArgs> counts;
};

// Throws std::invalid_argument before anything is launched.
void topk_routing(const TopkRoutingArgs& args, void* stream);

}  // namespace aiter
