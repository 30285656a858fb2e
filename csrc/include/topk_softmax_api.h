// topk_softmax as bindings call it: checked arguments in, one launch out.
#pragma once

#include "routing_checks.h"

namespace aiter {

struct TopkSoftmaxArgs {
  TensorView topk_weights, topk_indices, token_expert_indices, gating_output;
  bool need_renorm;
};

// Throws std::invalid_argument before anything is launched.
void topk_softmax(const TopkSoftmaxArgs& args, void* stream);

}  // namespace aiter
