// The launch from hidden states as bindings call it: checked arguments in, one launch out.
#pragma once

#include "fused_topk_moe_sorting_api.h"

namespace aiter {

struct RouterTensors {
  TensorView hidden_states, router_weight;  // [M, D'], [E', D']
  std::optional<TensorView> router_bias;    // [E']
};

struct FusedRouterSortingArgs {
  RouterTensors router;
  FusedTopkMoeSortingArgs routing;  // of logits_out [M, E'] f32, which is written, as gating_output
  std::optional<int64_t> num_workgroups;  // nothing to choose
};

// All throw std::invalid_argument before anything is launched.
void fused_router_sorting_fwd(const FusedRouterSortingArgs& args, void* stream);
// Everything but that M fits in LDS, and nothing else.
void fused_router_sorting_check(const FusedRouterSortingArgs& args);
// The product alone, for any M.
void router_product(const RouterTensors& router, const TensorView& logits_out, void* stream);

// The largest M whose routing state fits in the LDS of one workgroup; 0 when none does.
int64_t fused_router_sorting_max_tokens(int64_t num_experts, int64_t topk, int device_index);

}  // namespace aiter
