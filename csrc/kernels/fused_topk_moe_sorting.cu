// The checked launcher of the fused launch.
#include <algorithm>

#include "fused_topk_moe_sorting.h"
#include "fused_topk_moe_sorting_api.h"
#include "fused_topk_moe_sorting_rules.h"
#include "rule_checks.h"
#include "rule_launch.h"
#include "sort_launch.h"

namespace aiter {
namespace {

// The numbers of routing workgroups that are chosen from, unasked, as far as the device has clusters.
constexpr int kClusterSizes[] = {1, 8, 16};

// Whether each of `cluster_size` routing workgroups has LDS for its share of the rows. What top-k by keys needs
// beside is no condition, as the rows go without where there is none left.
bool fits(int num_tokens, int num_experts, int topk, int cluster_size, const DeviceLimits& limits) {
  const int num_rows = (num_tokens + cluster_size - 1) / cluster_size;
  return fused_lds(num_rows, num_experts, topk, cluster_size, 0).total <=
         static_cast<size_t>(limits.lds_bytes);
}

// The most rows that `cluster_size` workgroups have LDS for.
int max_tokens(int num_experts, int topk, int cluster_size, const DeviceLimits& limits) {
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

int max_tokens(int num_experts, int topk, const DeviceLimits& limits) {
  int most = 0;
  for (int wanted : kClusterSizes) {
    const int size = std::min(wanted, limits.default_cluster_size);
    most = std::max(most, max_tokens(num_experts, topk, size, limits));
  }
  return most;
}

// The number of routing workgroups; 0 if none has LDS for all rows. One sorts fastest as long as its
// waves hardly wait for each other in top-k; more have to talk, which takes about as long among 8 as among
// 2, and a little longer among 16 (`op_tests/bench_fused_topk_moe_sorting.py --clusters 1,2,4,8,16`).
int choose_cluster_size(const SortShape& shape, const RowChoice& rows, const DeviceLimits& limits) {
  constexpr int kUnhurriedWaves = 8;
  int chosen = 0;
  for (int wanted : kClusterSizes) {
    const int size = std::min(wanted, limits.default_cluster_size);
    if (!fits(shape.num_tokens, shape.num_experts, shape.topk, size, limits)) continue;
    chosen = size;
    if (size * kUnhurriedWaves * rows.rows_per_wave >= shape.num_tokens) break;
  }
  return chosen;
}

// Waves of a workgroup for `num_rows` rows: all rows at once, a thread per entry, and one per expert where counts
// decide (not so in single_blocks.h); for one token, a thread per store of padding.
int choose_waves(const SortShape& shape, const RowChoice& rows, int num_rows, bool is_alone,
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
    const int entry_waves = waves_for(int64_t{std::min(num_rows, shape.block_size)} * shape.topk);
    const bool has_single_blocks = is_alone && shape.num_tokens <= shape.block_size;
    wanted = std::max(row_waves, has_single_blocks
                                     ? entry_waves
                                     : waves_for(shape.num_experts) + std::min(entry_waves, 4));
  }
  const int most =
      std::min(limits.max_threads_per_block,
               rows.max_threads != 0 ? rows.max_threads : max_row_threads(rows.values)) /
      limits.wave_size;
  return std::clamp((wanted + kTotalsAtOnce - 1) / kTotalsAtOnce * kTotalsAtOnce, kTotalsAtOnce,
                    most);
}

FusedConfig choose_config(const SortShape& shape, const RowChoice& rows, uint64_t zero_bytes,
                          int size, bool one_token, const DeviceLimits& limits) {
  FusedConfig config;
  config.tokens_per_block = (shape.num_tokens + size - 1) / size;
  const int num_waves =
      choose_waves(shape, rows, config.tokens_per_block, size == 1, one_token, limits);
  config.lds = fused_lds(config.tokens_per_block, shape.num_experts, shape.topk, size,
                         num_waves * rows.lds_bytes);
  config.launch.num_threads = limits.wave_size * num_waves;
  config.launch.num_blocks = (size + zeroing_blocks(zero_bytes, limits) + size - 1) / size * size;
  config.launch.lds_bytes = config.lds.total;
  config.launch.cluster_size = size;
  config.launch.waits_itself = true;
  return config;
}

// The number of routing workgroups, `asked` or, for 0, chosen; an error if rows do not fit in them.
int check_cluster_size(int64_t asked, const SortShape& shape, const RowChoice& rows,
                       const DeviceLimits& limits) {
  int size = 0;
  if (asked == 0) {
    size = choose_cluster_size(shape, rows, limits);
  } else {
    check_range("cluster_size", asked, 1, limits.max_cluster_size);
    if ((asked & (asked - 1)) != 0) {
      fail_argument("cluster_size", "a power of two", std::to_string(asked));
    }
    size = static_cast<int>(asked);
    if (!fits(shape.num_tokens, shape.num_experts, shape.topk, size, limits)) size = 0;
  }
  if (size != 0) return size;
  const int most = asked == 0 ? max_tokens(shape.num_experts, shape.topk, limits)
                              : max_tokens(shape.num_experts, shape.topk, asked, limits);
  fail_argument("gating_output",
                "at most " + std::to_string(most) + " rows, which is what fits in " +
                    std::to_string(limits.lds_bytes) + " bytes of LDS " +
                    (asked > 1 ? "in each of " + std::to_string(asked) + " workgroups " : "") +
                    "for num_experts " + std::to_string(shape.num_experts) + " and topk " +
                    std::to_string(shape.topk),
                std::to_string(shape.num_tokens));
}

}  // namespace

int64_t fused_topk_moe_sorting_max_tokens(int64_t num_experts, int64_t topk, int device_index) {
  check_experts_and_topk(num_experts, topk);
  return max_tokens(static_cast<int>(num_experts), static_cast<int>(topk),
                    device_limits(device_index));
}

struct FusedLaunch {
  void (*kernel)(FusedParams);  // of plain softmax in the slot format, else null and
  FusedRulesKernel rules_kernel;
  FusedParams params;
  FusedRule rule;  // of the latter
  LaunchShape shape;
  DeviceLimits limits;
  int device_index;
};

namespace {

// Which kernels take a call, and how many experts and slots its sort has.
struct Problem {
  RoutingRule rule;
  bool by_rule;
  int64_t num_experts, num_slots;  // E + S + Z, K + S
};

Problem problem_of(const FusedTopkMoeSortingArgs& args) {
  Problem problem;
  problem.by_rule = args.rule || args.correction_bias || args.topk_weights || args.flat_ids;
  problem.rule =
      args.rule ? RoutingRule::of(args.rule->data()) : RoutingRule::plain(args.need_renorm);
  problem.num_experts = args.num_experts + problem.rule.num_zero_experts;
  problem.num_slots = args.topk + problem.rule.num_shared_experts;
  return problem;
}

void check_topk_out(const FusedTopkMoeSortingArgs& args, int64_t num_slots) {
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

void check(const FusedTopkMoeSortingArgs& args, const Problem& problem) {
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

FusedRule fused_rule(const FusedTopkMoeSortingArgs& args, const Problem& problem) {
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

FusedLaunch checked_launch(const FusedTopkMoeSortingArgs& args) {
  const Problem problem = problem_of(args);
  check(args, problem);
  const int64_t num_tokens = args.gating_output.shape[0];
  const int device_index = args.gating_output.device_index;
  const DeviceLimits limits = device_limits(device_index);
  const SortShape shape =
      sort_shape(num_tokens, problem.num_experts, problem.num_slots, args.unit_size, args.sort,
                 args.flat_ids, problem.rule.num_zero_experts);
  FusedRule rule{};
  if (problem.by_rule) rule = fused_rule(args, problem);
  const auto choose = [&](bool lds_is_full) {
    if (problem.by_rule) {
      rule.row.in_memory = lds_is_full;
      return rule_row_choice(rule.row, args.gating_output, limits.wave_size);
    }
    return choose_rows(args.gating_output, shape.num_experts, shape.topk, args.need_renorm,
                       limits.wave_size, lds_is_full);
  };
  RowChoice rows = choose(false);
  const int cluster_size = check_cluster_size(args.cluster_size, shape, rows, limits);

  FusedParams params;
  params.gating = args.gating_output.data;
  params.shape = shape;
  params.sort = sort_params(args.sort);
  params.need_renorm = args.need_renorm;
  params.one_token = cluster_size == 1 && is_one_token(shape, params.sort);
  const auto configure = [&] {
    return choose_config(shape, rows, params.sort.row_bytes * shape.num_tokens, cluster_size,
                         params.one_token, limits);
  };
  FusedConfig config = configure();
  if (config.launch.lds_bytes > static_cast<size_t>(limits.lds_bytes)) {
    rows = choose(true);
    config = configure();
  }
  params.row_stride = rows.row_stride;
  params.row_format = rows.format;
  params.cluster_size = cluster_size;
  params.tokens_per_block = config.tokens_per_block;
  params.lds = config.lds;
  FusedLaunch prepared{nullptr, nullptr, params, rule, config.launch, limits, device_index};
  if (problem.by_rule) {
    prepared.rules_kernel = fused_rules_kernel(rule.row);
    return prepared;
  }
  dispatch_rows(args.gating_output.dtype, rows, [&](auto tag) {
    prepared.kernel = fused_topk_moe_sorting_kernel<typename decltype(tag)::type>;
  });
  return prepared;
}

}  // namespace

std::shared_ptr<const FusedLaunch> prepare_fused_launch(const FusedTopkMoeSortingArgs& args) {
  return std::make_shared<const FusedLaunch>(checked_launch(args));
}

void make_fused_launch(const FusedLaunch& prepared, void* stream) {
  const DeviceGuard guard(prepared.device_index);
  if (prepared.kernel != nullptr) {
    launch(prepared.kernel, prepared.limits, prepared.shape, static_cast<hipStream_t>(stream),
           prepared.params);
  } else {
    launch(prepared.rules_kernel, prepared.limits, prepared.shape, static_cast<hipStream_t>(stream),
           prepared.params, prepared.rule);
  }
}

void make_fused_launch(const FusedLaunch& prepared, const FusedMemory& memory, void* stream) {
  FusedLaunch moved = prepared;
  moved.params.gating = memory[kGatingOutput];
  SortParams& sort = moved.params.sort;
  sort.sorted_ids = static_cast<int32_t*>(memory[kSortedIds]);
  sort.sorted_weights = static_cast<float*>(memory[kSortedWeights]);
  sort.sorted_expert_ids = static_cast<int32_t*>(memory[kSortedExpertIds]);
  sort.num_valid_ids = static_cast<int32_t*>(memory[kNumValidIds]);
  sort.moe_buf = static_cast<unsigned char*>(memory[kMoeBuf]);
  sort.expert_mask = static_cast<const int32_t*>(memory[kExpertMask]);
  sort.num_local_tokens = static_cast<const int32_t*>(memory[kNumLocalTokens]);
  moved.rule.row.bias = memory[kCorrectionBias];
  moved.rule.topk_weights = static_cast<float*>(memory[kTopkWeights]);
  moved.rule.topk_ids = static_cast<int32_t*>(memory[kTopkIds]);
  make_fused_launch(moved, stream);
}

bool is_current_device(int device_index) { return current_device() == device_index; }

void fused_topk_moe_sorting_fwd(const FusedTopkMoeSortingArgs& args, void* stream) {
  make_fused_launch(checked_launch(args), stream);
}

}  // namespace aiter
