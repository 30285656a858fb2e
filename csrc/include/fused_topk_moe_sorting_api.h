// The fused launch as bindings call it: checked arguments in, one launch out.
#pragma once

#include <memory>

#include "routing_checks.h"

namespace aiter {

struct FusedTopkMoeSortingArgs {
  TensorView gating_output;
  SortTensors sort;
  int64_t num_experts, topk, unit_size;
  bool need_renorm;
  int64_t cluster_size;  // workgroups that route; 0 to choose
};

// Throws std::invalid_argument before anything is launched.
void fused_topk_moe_sorting_fwd(const FusedTopkMoeSortingArgs& args, void* stream);

// The same in two steps: the launch of arguments that passed the checks, chosen and with its
// parameters set, can be made any number of times.
struct FusedLaunch;
std::shared_ptr<const FusedLaunch> prepare_fused_launch(const FusedTopkMoeSortingArgs& args);
void make_fused_launch(const FusedLaunch& prepared, void* stream);

// The largest M whose routing state fits in the LDS of the workgroups that route unasked; 0 when none does.
int64_t fused_topk_moe_sorting_max_tokens(int64_t num_experts, int64_t topk, int device_index);

}  // namespace aiter
