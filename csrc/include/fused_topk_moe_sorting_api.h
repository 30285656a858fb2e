// The fused launch as bindings call it: checked arguments in, one launch out.
#pragma once

#include <array>
#include <memory>

#include "routing_checks.h"

namespace aiter {

// A routing rule as Python packs it: aiter.ops.rule.RoutingRule.packed.
using RuleNumbers = std::array<double, 15>;
constexpr size_t kRuleNeedRenorm = 4;  // its place among these

struct FusedTopkMoeSortingArgs {
  TensorView gating_output;
  SortTensors sort;
  int64_t num_experts, topk, unit_size;
  bool need_renorm;
  int64_t cluster_size;             // workgroups that route; 0 to choose
  std::optional<RuleNumbers> rule;  // nothing for plain softmax
  std::optional<TensorView> correction_bias;
  std::optional<TensorView> topk_weights, topk_ids;  // both or none
  bool flat_ids;                                     // id_format "flat"
};

// Throws std::invalid_argument before anything is launched.
void fused_topk_moe_sorting_fwd(const FusedTopkMoeSortingArgs& args, void* stream);

// The tensors of a launch, outputs first.
enum FusedTensor {
  kSortedIds,
  kSortedWeights,
  kSortedExpertIds,
  kNumValidIds,
  kMoeBuf,
  kTopkWeights,
  kTopkIds,
  kGatingOutput,
  kExpertMask,
  kNumLocalTokens,
  kCorrectionBias
};
constexpr int kNumSortedBuffers = kTopkWeights;  // the outputs that every launch has
constexpr int kNumFusedOutputs = kGatingOutput;
constexpr int kNumFusedTensors = kCorrectionBias + 1;

inline const TensorView* or_null(const std::optional<TensorView>& view) {
  return view ? &*view : nullptr;
}

// Null for one that is absent.
inline std::array<const TensorView*, kNumFusedTensors> tensors_of(
    const FusedTopkMoeSortingArgs& args) {
  return {&args.sort.sorted_ids,
          &args.sort.sorted_weights,
          &args.sort.sorted_expert_ids,
          &args.sort.num_valid_ids,
          &args.sort.moe_buf,
          or_null(args.topk_weights),
          or_null(args.topk_ids),
          &args.gating_output,
          args.sort.expert_mask_or_null(),
          args.sort.num_local_tokens_or_null(),
          or_null(args.correction_bias)};
}

using FusedMemory = std::array<void*, kNumFusedTensors>;  // where each lies; null for an absent one

// The same in two steps: the launch of arguments that passed the checks, once chosen, can be made any
// number of times, also on other memory that would have passed them and lies as the first does relative
// to FourWords.
struct FusedLaunch;
std::shared_ptr<const FusedLaunch> prepare_fused_launch(const FusedTopkMoeSortingArgs& args);
void make_fused_launch(const FusedLaunch& prepared, void* stream);
void make_fused_launch(const FusedLaunch& prepared, const FusedMemory& memory, void* stream);

// Whether PyTorch's allocators take memory from this device now; always so on the CPU.
bool is_current_device(int device_index);

// The largest M whose routing state fits in the LDS of the workgroups that route unasked; 0 when none does.
int64_t fused_topk_moe_sorting_max_tokens(int64_t num_experts, int64_t topk, int device_index);

}  // namespace aiter
