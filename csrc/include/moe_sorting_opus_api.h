// moe_sorting_opus as bindings call it.
#pragma once

#include "routing_checks.h"

namespace aiter {

struct MoeSortingOpusArgs {
  TensorView topk_ids, topk_weights;
  SortTensors sort;
  int64_t num_experts, unit_size;
  std::optional<TensorView> workspace;
  int64_t dispatch_policy;   // 0 automatic, 1 oneshot, 2 multi-phase
  bool flat_ids;             // id_format "flat"
  int64_t num_zero_experts;  // the last ones of num_experts, which compute nothing
};

// Bytes of workspace that moe_sorting_opus_fwd wants; 0 for none.
int64_t moe_sorting_opus_get_workspace_size(int64_t tokens, int64_t num_experts, int64_t topk,
                                            int64_t dispatch_policy);

// What moe_sorting_opus_fwd throws (std::invalid_argument), without the launch.
void moe_sorting_opus_check(const MoeSortingOpusArgs& args);

void moe_sorting_opus_fwd(const MoeSortingOpusArgs& args, void* stream);

// The same where the launch before on the stream, which selected, has left the counts in the workspace: topk_softmax
// and topk_routing with `counts`, whose workspace it is.
void moe_sorting_opus_place(const MoeSortingOpusArgs& args, void* stream);

}  // namespace aiter
