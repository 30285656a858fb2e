// The checked launcher of the fused launch.
#include "device/handover_tickets.h"
#include "fused_launch.h"

namespace aiter {
namespace {

// The numbers of routing workgroups that are chosen from, unasked, as far as the device has clusters.
constexpr int kClusterSizes[] = {1, 8, 16};
constexpr int kMaxHandoverSize = 64;

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

// Whether sorted_ids and sorted_weights have a place for every row's winners, which is where a hand-over leaves them:
// always, unless most of them may be zero experts, for which the slot format has no places.
bool has_slots_for_handover(const SortShape& shape) {
  const int num_placed = shape.flat_ids ? shape.num_experts : shape.num_real;
  return int64_t{num_placed} * shape.block_size >= shape.topk;
}

// The number of workgroups that hand over, where there are no clusters; 1: not worth it. Each gets so many rows that
// its waves have a SIMD for themselves, and what the hand-over takes, about 2,300 cycles, has to be less than
// what a single workgroup takes longer: it is, or about equal, beyond kUnhurriedRounds of waves. By the timing model
// (gfx942, us, one workgroup and handed over): 256/8 f32 M = 32 4.74 4.77, M = 33 7.07 5.53; 128/4 bf16 M = 64
// 3.94 4.64, M = 72 4.57 4.60, M = 122 5.98 4.77; 384/8 f32 M = 16 5.09 5.06, M = 33 11.3 7.9; 896/16 bf16 M = 16
// 6.36 6.81, M = 17 8.84 6.94. Beyond four rounds, as before: 7.1 for 256/8 bf16, M = 60, now 5.3.
int choose_handover_size(const SortShape& shape, const RowChoice& rows) {
  constexpr int kWavesAtOnce = 4;
  constexpr int kUnhurriedRounds = 2;
  const int row_waves = (shape.num_tokens + rows.rows_per_wave - 1) / rows.rows_per_wave;
  if (row_waves <= kUnhurriedRounds * kWavesAtOnce) return 1;
  return std::min((row_waves + kWavesAtOnce - 1) / kWavesAtOnce, kMaxHandoverSize);
}

// The number of routing workgroups of a cluster, `asked` or, for 0, chosen; an error if rows do not fit in them.
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
  if (most == kMaxClusterTokens) {
    fail_argument("gating_output",
                  "at most " + std::to_string(most) + " rows, which is what a cluster counts",
                  std::to_string(shape.num_tokens));
  }
  fail_argument("gating_output",
                "at most " + std::to_string(most) + " rows, which is what fits in " +
                    std::to_string(limits.lds_bytes) + " bytes of LDS " +
                    (asked > 1 ? "in each of " + std::to_string(asked) + " workgroups " : "") +
                    "for num_experts " + std::to_string(shape.num_experts) + " and topk " +
                    std::to_string(shape.topk),
                std::to_string(shape.num_tokens));
}

RoutingChoice check_routing(const FusedTopkMoeSortingArgs& args, const SortShape& shape,
                            const RowChoice& rows, const DeviceLimits& limits) {
  if (args.handover_size != 0) {
    check_range("handover_size", args.handover_size, 1,
                limits.can_hand_over ? kMaxHandoverSize : 1);
    if (args.cluster_size > 1) {
      fail_argument("cluster_size", "1 or None beside handover_size",
                    std::to_string(args.cluster_size));
    }
  }
  const bool may_hand_over =
      args.handover_size != 0 || (limits.hands_over && args.cluster_size == 0);
  const int64_t asked = args.handover_size != 0 ? 1 : args.cluster_size;
  const int cluster_size = check_cluster_size(asked, shape, rows, limits);
  if (!may_hand_over) return {cluster_size, false};
  int size = args.handover_size != 0 ? static_cast<int>(args.handover_size)
                                     : choose_handover_size(shape, rows);
  size = std::max(1, std::min(size, shape.num_tokens));
  if (size > 1 && !has_slots_for_handover(shape)) {
    if (args.handover_size != 0) {
      fail_argument("handover_size",
                    "1 or None, as sorted_ids has no slots for the topk * M ids of a hand-over",
                    std::to_string(args.handover_size));
    }
    size = 1;
  }
  return {size, size > 1};
}

}  // namespace

int64_t fused_topk_moe_sorting_max_tokens(int64_t num_experts, int64_t topk, int device_index) {
  check_experts_and_topk(num_experts, topk);
  return max_tokens(static_cast<int>(num_experts), static_cast<int>(topk),
                    device_limits(device_index));
}

struct FusedLaunch {
  // Of plain softmax in the slot format, else null and
  decltype(&fused_topk_moe_sorting_kernel<WaveRow<float, 2>>) kernel;
  FusedRulesKernel rules_kernel;
  FusedFirst first;
  FusedParams params;
  FusedRule rule;  // of the latter
  LaunchShape shape;
  DeviceLimits limits;
  int device_index;
};

namespace {

FusedLaunch checked_launch(const FusedTopkMoeSortingArgs& args) {
  const Problem problem = problem_of(args);
  check_fused_args(args, problem);
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
  const RoutingChoice routing = check_routing(args, shape, rows, limits);

  FusedParams params;
  params.shape = shape;
  params.sort = sort_params(args.sort);
  params.ticket = nullptr;
  const bool one_token = routing.size == 1 && is_one_token(shape, params.sort);
  const auto configure = [&] {
    return choose_config(shape, rows, params.sort.row_bytes * shape.num_tokens, routing, one_token,
                         limits);
  };
  FusedConfig config = configure();
  if (config.launch.lds_bytes > static_cast<size_t>(limits.lds_bytes)) {
    rows = choose(true);
    config = configure();
  }
  params.lds = config.lds;
  const FusedFirst first = fused_first(args, shape, params.sort, rows, config, routing, one_token);
  FusedLaunch prepared{nullptr, nullptr, first, params, rule, config.launch, limits, device_index};
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
  FusedParams params = prepared.params;
  if ((prepared.first.flags & FusedFirst::kHandsOver) != 0) {
    params.ticket = ticket_for(prepared.device_index, static_cast<hipStream_t>(stream));
  }
  const auto make = [&](auto kernel, const auto&... rule) {
    const FusedFirst& first = prepared.first;
    launch(kernel, prepared.limits, prepared.shape, static_cast<hipStream_t>(stream), first.gating,
           first.row_stride, first.num_local_tokens, first.expert_mask, first.num_tokens,
           first.num_experts, first.topk, first.tokens_per_block, first.num_threads, first.flags,
           params, rule...);
  };
  try {
    if (prepared.kernel != nullptr) {
      make(prepared.kernel);
    } else {
      make(prepared.rules_kernel, prepared.rule);
    }
  } catch (...) {
    if (params.ticket != nullptr) forget_arrivals(params.ticket);
    throw;
  }
}

void make_fused_launch(const FusedLaunch& prepared, const FusedMemory& memory, void* stream) {
  FusedLaunch moved = prepared;
  move_launch(memory.data(), memory[kExpertMask], memory[kNumLocalTokens], memory[kCorrectionBias],
              moved.first, moved.params, moved.rule);
  make_fused_launch(moved, stream);
}

bool is_current_device(int device_index) { return current_device() == device_index; }

void fused_topk_moe_sorting_fwd(const FusedTopkMoeSortingArgs& args, void* stream) {
  make_fused_launch(checked_launch(args), stream);
}

}  // namespace aiter
