// What the routing ops check alike: the sorted buffers, and the ranges of E, K, B and M.
#pragma once

#include <optional>

#include "tensor_view.h"

namespace aiter {

constexpr int64_t kMaxExperts = 0xffff;        // row_topk.h packs an expert index in 16 bits
constexpr int64_t kMaxTopk = 255;              // sorted_ids keep the slot in 8 bits
constexpr int64_t kMaxTokens = (1 << 24) - 1;  // and the token in 24

// The arguments that every sort has. Their names are the caller's.
struct SortTensors {
  TensorView sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf;
  std::optional<TensorView> expert_mask, num_local_tokens;

  const TensorView* expert_mask_or_null() const { return expert_mask ? &*expert_mask : nullptr; }
  const TensorView* num_local_tokens_or_null() const {
    return num_local_tokens ? &*num_local_tokens : nullptr;
  }
};

// That a launch which selects counts entries per expert as well and zeroes moe_buf, for moe_sorting_opus_place.
struct CountsArgs {
  TensorView workspace, moe_buf;  // the sort's
  int64_t num_experts;            // the sort's: ids from there on are no entries
  std::optional<TensorView> num_local_tokens;

  const TensorView* num_local_tokens_or_null() const {
    return num_local_tokens ? &*num_local_tokens : nullptr;
  }
};

void check_experts_and_topk(int64_t num_experts, int64_t topk);
// gating_output [M, E] of f32, f16 or bf16, inner stride 1 where there are rows.
void check_gating(const TensorView& gating_output, int64_t num_experts);
// Sizes, dtypes and layout of the sorted buffers for M tokens, and of mask and num_local_tokens. The mask does not
// have the last `num_zero_experts` of the experts.
void check_sort_tensors(const SortTensors& tensors, int64_t num_tokens, int64_t num_experts,
                        int64_t topk, int64_t unit_size, int64_t num_zero_experts = 0);
// One device for all, and no output that shares memory with anything else.
void check_placement(const SortTensors& tensors, std::initializer_list<const TensorView*> inputs,
                     const TensorView* workspace = nullptr);

// Memory of its own for `bytes`, as words; null only where `bytes` is 0.
void check_workspace(const TensorView* workspace, int64_t bytes);
void check_moe_buf(const TensorView& moe_buf, int64_t num_tokens);
void check_num_local_tokens(const TensorView* num_local_tokens);

}  // namespace aiter
