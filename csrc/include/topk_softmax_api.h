// topk_softmax as bindings call it: checked arguments in, one launch out.
#pragma once

#include "routing_checks.h"

namespace aiter {

struct TopkSoftmaxArgs {
  TensorView topk_weights, topk_indices;
  std::optional<TensorView> token_expert_indices;
  TensorView gating_output;
  bool need_renorm;
  std::optional<CountsArgs> counts;
};

// Throws std::invalid_argument before anything is launched.
void topk_softmax(const TopkSoftmaxArgs& args, void* stream);

}  // namespace aiter
