// The checks of routing_checks.h.
#include "routing_checks.h"

#include <limits>

namespace aiter {

void check_experts_and_topk(int64_t num_experts, int64_t topk) {
  check_range("num_experts", num_experts, 1, kMaxExperts);
  check_range("topk", topk, 1, kMaxTopk);
  if (topk > num_experts) {
    fail_argument("topk", "at most num_experts = " + std::to_string(num_experts),
                  std::to_string(topk));
  }
}

void check_gating(const TensorView& gating_output, int64_t num_experts) {
  check_rank(gating_output, 2);
  check_dtype(gating_output, {DType::f32, DType::f16, DType::bf16});
  if (gating_output.shape[1] != num_experts) {
    fail_argument(gating_output.name,
                  "shape [any, num_experts = " + std::to_string(num_experts) + "]",
                  shape_of(gating_output));
  }
  const bool has_neighbours = gating_output.shape[0] > 0 && gating_output.shape[1] > 1;
  if (has_neighbours && gating_output.stride[1] != 1) {
    fail_argument(gating_output.name, "inner stride 1", std::to_string(gating_output.stride[1]));
  }
  if (gating_output.shape[0] > kMaxTokens) {
    fail_argument(gating_output.name, "at most " + std::to_string(kMaxTokens) + " rows",
                  shape_of(gating_output));
  }
}

void check_sort_tensors(const SortTensors& tensors, int64_t num_tokens, int64_t num_experts,
                        int64_t topk, int64_t unit_size, int64_t num_zero_experts) {
  constexpr int64_t kMaxSlots = std::numeric_limits<int32_t>::max();
  check_range("unit_size", unit_size, 1, kMaxSlots);
  const int64_t slots = num_tokens * topk + num_experts * unit_size - topk;
  if (slots > kMaxSlots) {
    fail_argument("unit_size",
                  "M*topk + num_experts*unit_size - topk at most " + std::to_string(kMaxSlots),
                  std::to_string(slots) + " (unit_size " + std::to_string(unit_size) + ")");
  }
  const TensorView* one_dimensional[] = {&tensors.sorted_ids, &tensors.sorted_weights,
                                         &tensors.sorted_expert_ids, &tensors.num_valid_ids};
  for (const TensorView* t : one_dimensional) {
    check_rank(*t, 1);
    check_dtype(*t, {t == &tensors.sorted_weights ? DType::f32 : DType::i32});
    check_contiguous(*t);
  }
  constexpr const char* kSlotsFormula = "M*topk + num_experts*unit_size - topk";
  check_min_numel(tensors.sorted_ids, slots, kSlotsFormula);
  check_min_numel(tensors.sorted_weights, slots, kSlotsFormula);
  check_min_numel(tensors.sorted_expert_ids, (slots + unit_size - 1) / unit_size,
                  "(M*topk + num_experts*unit_size - topk) / unit_size, rounded up");
  check_shape(tensors.num_valid_ids, {2});
  check_moe_buf(tensors.moe_buf, num_tokens);
  if (const TensorView* mask = tensors.expert_mask_or_null()) {
    check_dtype(*mask, {DType::i32});
    check_shape(*mask, {num_experts - num_zero_experts});
    check_contiguous(*mask);
  }
  check_num_local_tokens(tensors.num_local_tokens_or_null());
}

void check_moe_buf(const TensorView& moe_buf, int64_t num_tokens) {
  check_rank(moe_buf, 2);
  if (moe_buf.shape[0] != num_tokens) {
    fail_argument(moe_buf.name, std::to_string(num_tokens) + " rows, one per token",
                  shape_of(moe_buf));
  }
  check_contiguous(moe_buf);
}

void check_num_local_tokens(const TensorView* num_local_tokens) {
  if (num_local_tokens == nullptr) return;
  check_dtype(*num_local_tokens, {DType::i32});
  if (num_local_tokens->ndim != 0) check_shape(*num_local_tokens, {1});
}

void check_placement(const SortTensors& tensors, std::initializer_list<const TensorView*> inputs,
                     const TensorView* workspace) {
  const TensorView* mask = tensors.expert_mask_or_null();
  const TensorView* local = tensors.num_local_tokens_or_null();
  const TensorView* first = *inputs.begin();
  for (const TensorView* input : inputs) check_same_device({first, input});
  check_same_device({first, &tensors.sorted_ids, &tensors.sorted_weights,
                     &tensors.sorted_expert_ids, &tensors.num_valid_ids, &tensors.moe_buf, mask,
                     local, workspace});
  check_no_overlap({&tensors.sorted_ids, &tensors.sorted_weights, &tensors.sorted_expert_ids,
                    &tensors.num_valid_ids, &tensors.moe_buf, workspace},
                   inputs, {mask, local});
}

void check_workspace(const TensorView* workspace, int64_t bytes) {
  if (bytes == 0) return;
  const std::string expected =
      "a contiguous tensor of at least " + std::to_string(bytes) + " bytes";
  if (workspace == nullptr) fail_argument("workspace", expected, "None");
  check_contiguous(*workspace);
  if (workspace->numel() * workspace->itemsize < bytes) {
    fail_argument(workspace->name, expected,
                  std::to_string(workspace->numel() * workspace->itemsize) + " bytes (shape " +
                      shape_of(*workspace) + ")");
  }
  if (reinterpret_cast<uintptr_t>(workspace->data) % alignof(uint32_t) != 0) {
    fail_argument(workspace->name, "memory aligned to 4 bytes", "an address that is not");
  }
}

}  // namespace aiter
