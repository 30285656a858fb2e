// The launch from hidden states as bindings call it: checked arguments in, one launch out.
#pragma once

#include <algorithm>

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
// The tensors of a launch, outputs first; as of a FusedTensor as far as the logits, which are written here.
enum RouterTensor {
  kRouterLogits = kGatingOutput,
  kHiddenStates,
  kRouterWeight,
  kRouterBias,
  kRouterExpertMask,
  kRouterNumLocalTokens,
  kRouterCorrectionBias
};
constexpr int kNumRouterOutputs = kHiddenStates;
constexpr int kNumRouterTensors = kRouterCorrectionBias + 1;

// Null for one that is absent.
inline std::array<const TensorView*, kNumRouterTensors> tensors_of(
    const FusedRouterSortingArgs& args) {
  std::array<const TensorView*, kNumRouterTensors> views{};
  const auto routing = tensors_of(args.routing);
  std::copy_n(routing.begin(), kNumRouterOutputs, views.begin());
  views[kHiddenStates] = &args.router.hidden_states;
  views[kRouterWeight] = &args.router.router_weight;
  views[kRouterBias] = or_null(args.router.router_bias);
  views[kRouterExpertMask] = routing[kExpertMask];
  views[kRouterNumLocalTokens] = routing[kNumLocalTokens];
  views[kRouterCorrectionBias] = routing[kCorrectionBias];
  return views;
}

using RouterMemory =
    std::array<void*, kNumRouterTensors>;  // where each lies; null for an absent one

// In two steps, as a FusedLaunch: all in one launch, or the product alone, with all arguments checked, behind
// which the caller routes.
struct RouterLaunch;
std::shared_ptr<const RouterLaunch> prepare_router_launch(const FusedRouterSortingArgs& args,
                                                          bool in_one);
bool is_in_one(const RouterLaunch& prepared);
void make_router_launch(const RouterLaunch& prepared, void* stream);
void make_router_launch(const RouterLaunch& prepared, const RouterMemory& memory, void* stream);

// The product alone, for any M.
void router_product(const RouterTensors& router, const TensorView& logits_out, void* stream);

// The largest M whose routing state fits in the LDS of one workgroup; 0 when none does.
int64_t fused_router_sorting_max_tokens(int64_t num_experts, int64_t topk, int device_index);

}  // namespace aiter
