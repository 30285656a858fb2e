// From checked arguments to the parameters of the fused kernels: what the launchers of those that start from logits and
// of those that start from hidden states share.
#pragma once

#include <algorithm>

#include "fused_topk_moe_sorting.h"
#include "fused_topk_moe_sorting_api.h"
#include "fused_topk_moe_sorting_rules.h"
#include "rule_checks.h"
#include "rule_launch.h"
#include "sort_launch.h"

namespace aiter {

// Whether each of `cluster_size` routing workgroups has LDS for its share of the rows. What top-k by keys needs
// beside is no condition, as the rows go without where there is none left.
inline bool fits(int num_tokens, int num_experts, int topk, int cluster_size,
                 const DeviceLimits& limits) {
  if (cluster_size > 1 && num_tokens > kMaxClusterTokens) return false;
  const int num_rows = (num_tokens + cluster_size - 1) / cluster_size;
  return plan_fused_lds(num_rows, num_experts, topk, cluster_size, 0).total <=
         static_cast<size_t>(limits.lds_bytes);
}

// The most rows that `cluster_size` workgroups have LDS for.
inline int max_tokens(int num_experts, int topk, int cluster_size, const DeviceLimits& limits) {
  int low = 0, high = static_cast<int>(kMaxTokens);
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (fits(middle, num_experts, topk, cluster_size, limits)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Workgroups that route, and whether they hand over through memory.
struct RoutingChoice {
  int size;
  bool hands_over;
};

// Waves of a workgroup for `num_rows` rows: all rows at once, a thread per entry, and one per one or two experts where counts
// decide (not so in single_blocks.h); for one token, a thread per store of padding.
inline int choose_waves(const SortShape& shape, const RowChoice& rows, int num_rows, bool is_alone,
                        bool one_token, const DeviceLimits& limits) {
  const auto waves_for = [&](int64_t threads) {
    const int64_t most = limits.max_threads_per_block;
    return static_cast<int>((std::min(threads, most) + limits.wave_size - 1) / limits.wave_size);
  };
  int wanted = 0;
  if (one_token) {
    const int64_t num_slots = int64_t{shape.topk} * shape.block_size;
    wanted = 1 + waves_for(shape.wide_stores ? num_slots / 4 : num_slots);
  } else {
    const int row_waves = (num_rows + rows.rows_per_wave - 1) / rows.rows_per_wave;
    const bool hands_over = is_alone && num_rows < shape.num_tokens;
    const int64_t entry_rows = hands_over ? shape.num_tokens : std::min(num_rows, shape.block_size);
    const int entry_waves = waves_for(entry_rows * shape.topk);
    const int per_thread = experts_per_thread(rows.places, limits.wave_size);
    const int expert_waves = waves_for((shape.num_experts + per_thread - 1) / per_thread);
    if (hands_over) {
      wanted = std::max({row_waves, entry_waves, expert_waves});
    } else if (is_alone && shape.num_tokens <= shape.block_size) {  // has single blocks
      wanted = std::max(row_waves, entry_waves);
    } else {
      wanted = std::max(row_waves, expert_waves + std::min(entry_waves, 4));
    }
  }
  const int most =
      std::min(limits.max_threads_per_block,
               rows.max_threads != 0 ? rows.max_threads : max_row_threads(rows.values)) /
      limits.wave_size;
  return std::clamp((wanted + kTotalsAtOnce - 1) / kTotalsAtOnce * kTotalsAtOnce, kTotalsAtOnce,
                    most);
}

inline FusedConfig choose_config(const SortShape& shape, const RowChoice& rows, uint64_t zero_bytes,
                                 const RoutingChoice& routing, bool one_token,
                                 const DeviceLimits& limits) {
  const int size = routing.size;
  const int cluster_size = routing.hands_over ? 1 : size;
  FusedConfig config;
  config.tokens_per_block = (shape.num_tokens + size - 1) / size;
  const int num_waves =
      choose_waves(shape, rows, config.tokens_per_block, cluster_size == 1, one_token, limits);
  const FusedLdsPlan plan =
      plan_fused_lds(routing.hands_over ? shape.num_tokens : config.tokens_per_block,
                     shape.num_experts, shape.topk, cluster_size, num_waves * rows.lds_bytes);
  config.lds = plan.lds;
  config.launch.num_threads = limits.wave_size * num_waves;
  config.launch.num_blocks =
      (size + zeroing_blocks(zero_bytes, limits) + cluster_size - 1) / cluster_size * cluster_size;
  config.launch.lds_bytes = plan.total;
  config.launch.cluster_size = cluster_size;
  config.launch.waits_itself = true;
  return config;
}

// Which kernels take a call, and how many experts and slots its sort has.
struct Problem {
  RoutingRule rule;
  bool by_rule;
  int64_t num_experts, num_slots;  // E + S + Z, K + S
};

inline Problem problem_of(const FusedTopkMoeSortingArgs& args) {
  Problem problem;
  problem.by_rule = args.rule || args.correction_bias || args.topk_weights || args.flat_ids;
  problem.rule =
      args.rule ? RoutingRule::of(args.rule->data()) : RoutingRule::plain(args.need_renorm);
  problem.num_experts = args.num_experts + problem.rule.num_zero_experts;
  problem.num_slots = args.topk + problem.rule.num_shared_experts;
  return problem;
}

inline void check_topk_out(const FusedTopkMoeSortingArgs& args, int64_t num_slots) {
  if (!args.topk_weights) return;
  for (const TensorView* t : {&*args.topk_weights, &*args.topk_ids}) {
    check_dtype(*t, {t == &*args.topk_weights ? DType::f32 : DType::i32});
    check_shape(*t, {args.gating_output.shape[0], num_slots});
    check_rows(*t);
  }
  const SortTensors& sort = args.sort;
  check_same_device({&args.gating_output, &*args.topk_weights, &*args.topk_ids});
  check_no_overlap({&*args.topk_weights, &*args.topk_ids},
                   {&sort.sorted_ids, &sort.sorted_weights, &sort.sorted_expert_ids,
                    &sort.num_valid_ids, &sort.moe_buf},
                   {&args.gating_output, or_null(args.correction_bias), sort.expert_mask_or_null(),
                    sort.num_local_tokens_or_null()});
}

inline void check_fused_args(const FusedTopkMoeSortingArgs& args, const Problem& problem) {
  const int64_t num_tokens = args.gating_output.shape[0];
  const int64_t num_zero = problem.rule.num_zero_experts;
  if (problem.by_rule) {
    check_num_logits(problem.rule, args.gating_output, args.num_experts);
    check_rule(problem.rule, args.correction_bias, args.gating_output, problem.num_slots);
  } else {
    check_experts_and_topk(args.num_experts, args.topk);
    check_gating(args.gating_output, args.num_experts);
  }
  check_sort_tensors(args.sort, num_tokens, args.num_experts + (args.flat_ids ? num_zero : 0),
                     problem.num_slots, args.unit_size, args.flat_ids ? num_zero : 0);
  if (args.correction_bias) {
    check_placement(args.sort, {&args.gating_output, &*args.correction_bias});
  } else {
    check_placement(args.sort, {&args.gating_output});
  }
  check_topk_out(args, problem.num_slots);
}

inline FusedRule fused_rule(const FusedTopkMoeSortingArgs& args, const Problem& problem) {
  FusedRule rule{};
  rule.row = row_rule(problem.rule, args.correction_bias, args.gating_output, problem.num_slots);
  if (args.topk_weights) {
    rule.topk_weights = static_cast<float*>(args.topk_weights->data);
    rule.topk_ids = static_cast<int32_t*>(args.topk_ids->data);
    rule.weights_stride = args.topk_weights->stride[0];
    rule.ids_stride = args.topk_ids->stride[0];
  }
  return rule;
}

inline FusedFirst fused_first(const FusedTopkMoeSortingArgs& args, const SortShape& shape,
                              const SortParams& sort, const RowChoice& rows,
                              const FusedConfig& config, const RoutingChoice& routing,
                              bool one_token) {
  const bool leaves_out = sort.expert_mask != nullptr || shape.num_real < shape.num_experts;
  FusedFirst first;
  first.gating = args.gating_output.data;
  first.row_stride = rows.row_stride;
  first.num_local_tokens = sort.num_local_tokens;
  first.expert_mask = sort.expert_mask;
  first.num_tokens = shape.num_tokens;
  first.num_experts = shape.num_experts;
  first.topk = shape.topk;
  first.tokens_per_block = config.tokens_per_block;
  first.num_threads = static_cast<int>(config.launch.num_threads);
  first.flags = (args.need_renorm ? FusedFirst::kNeedRenorm : 0) |
                (rows.format.wide != 0 ? FusedFirst::kWideRows : 0) |
                (one_token ? FusedFirst::kOneToken : 0) |
                (routing.hands_over ? FusedFirst::kHandsOver : 0) |
                (leaves_out && !shape.flat_ids ? FusedFirst::kDrops : 0) |
                static_cast<uint32_t>(rows.format.type) << FusedFirst::kTypeShift |
                static_cast<uint32_t>(routing.size) << FusedFirst::kRoutingShift;
  return first;
}

// Puts a launch on other memory, for FusedTensors as far as the logits and the inputs behind them.
inline void move_launch(void* const* memory, void* expert_mask, void* num_local_tokens,
                        void* correction_bias, FusedFirst& first, FusedParams& params,
                        FusedRule& rule) {
  SortParams& sort = params.sort;
  sort.sorted_ids = static_cast<int32_t*>(memory[kSortedIds]);
  sort.sorted_weights = static_cast<float*>(memory[kSortedWeights]);
  sort.sorted_expert_ids = static_cast<int32_t*>(memory[kSortedExpertIds]);
  sort.num_valid_ids = static_cast<int32_t*>(memory[kNumValidIds]);
  sort.moe_buf = static_cast<unsigned char*>(memory[kMoeBuf]);
  sort.expert_mask = static_cast<const int32_t*>(expert_mask);
  sort.num_local_tokens = static_cast<const int32_t*>(num_local_tokens);
  first.gating = memory[kGatingOutput];
  first.num_local_tokens = sort.num_local_tokens;
  first.expert_mask = sort.expert_mask;
  rule.row.bias = correction_bias;
  rule.topk_weights = static_cast<float*>(memory[kTopkWeights]);
  rule.topk_ids = static_cast<int32_t*>(memory[kTopkIds]);
}

}  // namespace aiter
