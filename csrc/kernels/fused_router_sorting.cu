// The checked launcher of the launch from hidden states, and of the product alone.
//
// Long because both share the checks, the tiles, and what of a launch is kept for later calls like it.
#include <limits>
#include <type_traits>

#include "device/handover_tickets.h"
#include "fused_launch.h"
#include "fused_router_sorting.h"
#include "fused_router_sorting_api.h"
#include "router_product_alone.h"

namespace aiter {

// The product alone, for any M, a tile for every workgroup.
template <int kRows, int kExperts, int kHeld, typename Chunks>
__global__ void AITER_LAUNCH_BOUNDS(kPartialSums)
    router_product_kernel(int num_tokens, Divisor by_row_tiles, RouterProduct p) {
  AITER_DYNAMIC_LDS(lds_base);
  float* const lds = reinterpret_cast<float*>(lds_base);
  if constexpr (std::is_same<Chunks, Bf16Chunks>::value) {
    product_alone<kRows, kExperts, kHeld>(p, by_row_tiles, Chunks{}, Chunks{}, num_tokens, lds);
  } else {
    const Chunks hidden{p.hidden_kind}, weight{p.weight_kind};
    product_alone<kRows, kExperts, kHeld>(p, by_row_tiles, hidden, weight, num_tokens, lds);
  }
}

namespace {

constexpr int kMaxRouterWorkgroups = 1024;
constexpr int64_t kMostTileRows = 8;  // of either matrix

template <typename T>
T divided_up(T x, T y) {
  return (x + y - 1) / y;
}

bool lies_wide(const TensorView& rows) {
  const auto on_boundary = [](uint64_t bytes) { return bytes % sizeof(FourWords) == 0; };
  return on_boundary(reinterpret_cast<uintptr_t>(rows.data)) &&
         (rows.shape[0] <= 1 || on_boundary(rows.stride[0] * rows.itemsize));
}

// The fewest tiles with so many logits that keep the GPU busy: with fewer, the next smaller kind is faster. Small tiles
// wait more than they compute, so fewer than one for each compute unit do; of 8 x 8 two share one.
int64_t least_tiles(int num_logits, int64_t num_workgroups) {
  if (num_logits <= 8) return divided_up<int64_t>(4 * num_workgroups, 9);
  if (num_logits <= 32) return divided_up<int64_t>(3 * num_workgroups, 4);
  return divided_up<int64_t>(4 * num_workgroups, 3);
}

// The largest tile of which there are enough for the workgroups; a row alone for one token.
template <size_t kCount>
TileShape choose_tile(const TileInstance (&tiles)[kCount], int64_t num_tokens, int64_t num_experts,
                      int num_workgroups, ChunksBy by) {
  const auto is_too_large = [](int tile, int64_t size) { return tile > 1 && tile >= 2 * size; };
  TileShape chosen{};
  for (const TileInstance& instance : tiles) {
    const auto [rows, experts] = instance.shape;
    if (by > instance.slowest) continue;
    chosen = instance.shape;
    if (is_too_large(rows, num_tokens) || is_too_large(experts, num_experts)) continue;
    const int64_t num_tiles =
        divided_up<int64_t>(num_tokens, rows) * divided_up<int64_t>(num_experts, experts);
    if (num_tiles >= least_tiles(rows * experts, num_workgroups)) break;
  }
  return chosen;
}

// `num_workgroups`: how many there are to share the tiles.
template <size_t kCount>
RouterProduct product_of(const TileInstance (&tiles)[kCount], const RouterTensors& router,
                         const TensorView& logits, int num_workgroups) {
  const TensorView& hidden = router.hidden_states;
  const TensorView& weight = router.router_weight;
  RouterProduct p;
  p.hidden = static_cast<const unsigned char*>(hidden.data);
  p.weight = static_cast<const unsigned char*>(weight.data);
  p.bias = router.router_bias ? router.router_bias->data : nullptr;
  p.logits = static_cast<float*>(logits.data);
  p.hidden_stride = hidden.stride[0] * hidden.itemsize;
  p.weight_stride = weight.stride[0] * weight.itemsize;
  p.logits_stride = logits.stride[0];
  p.width = static_cast<int>(hidden.shape[1]);
  p.num_experts = static_cast<int>(weight.shape[0]);
  p.hidden_kind = float_kind(hidden);
  p.weight_kind = float_kind(weight);
  p.bias_kind = float_kind(router.router_bias);
  const bool is_wide = lies_wide(hidden) && lies_wide(weight);
  const bool is_bf16 = p.hidden_kind == FloatKind::bf16 && p.weight_kind == FloatKind::bf16;
  p.by = !is_wide ? ChunksBy::items : is_bf16 ? ChunksBy::bf16 : ChunksBy::wide;
  const int64_t num_tokens = hidden.shape[0];
  constexpr int64_t kMostBytes = std::numeric_limits<uint32_t>::max();
  const bool is_near = kMostTileRows * std::max(p.hidden_stride, p.weight_stride) <= kMostBytes;
  p.tile = is_near ? choose_tile(tiles, num_tokens, weight.shape[0], num_workgroups, p.by)
                   : TileShape{1, 1};
  p.row_tiles = static_cast<int>(divided_up<int64_t>(num_tokens, p.tile.rows));
  p.num_tiles = p.row_tiles * divided_up(p.num_experts, p.tile.experts);
  p.tiles_per_block = divided_up(p.num_tiles, num_workgroups);
  return p;
}

void check_matrix(const TensorView& t) {
  check_rank(t, 2);
  check_dtype(t, {DType::f32, DType::f16, DType::bf16});
  if (t.shape[0] > 0 && t.shape[1] > 1 && t.stride[1] != 1) {
    fail_argument(t.name, "inner stride 1", std::to_string(t.stride[1]));
  }
}

void check_router(const RouterTensors& router, const TensorView& logits) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const TensorView& hidden = router.hidden_states;
  const TensorView& weight = router.router_weight;
  const TensorView* const bias = or_null(router.router_bias);
  check_matrix(hidden);
  if (hidden.shape[0] > kMaxTokens) {
    fail_argument(hidden.name, "at most " + std::to_string(kMaxTokens) + " rows", shape_of(hidden));
  }
  constexpr int64_t kMostColumns = kMost - kProductItems + 1;  // whole chunks of which are counted
  if (hidden.shape[1] < 1 || hidden.shape[1] > kMostColumns) {
    fail_argument(hidden.name, "1 to " + std::to_string(kMostColumns) + " columns",
                  shape_of(hidden));
  }
  check_matrix(weight);
  check_shape(weight, {-1, hidden.shape[1]});
  check_range("rows of router_weight", weight.shape[0], 1, kMaxExperts);
  if (bias != nullptr) {
    check_rank(*bias, 1);
    check_dtype(*bias, {DType::f32, DType::f16, DType::bf16});
    check_shape(*bias, {weight.shape[0]});
    check_contiguous(*bias);
  }
  check_dtype(logits, {DType::f32});
  check_shape(logits, {hidden.shape[0], weight.shape[0]});
  check_rows(logits);
  if (logits.numel() > kMost) {
    fail_argument(logits.name, "at most " + std::to_string(kMost) + " logits", shape_of(logits));
  }
  check_same_device({&hidden, &weight, bias, &logits});
  check_no_overlap({&logits}, {&hidden, &weight, bias});
}

// As many rows of the weight as num_experts takes logits.
void check_num_experts(const FusedRouterSortingArgs& args, const RoutingRule& rule) {
  const TensorView& weight = args.router.router_weight;
  check_rank(weight, 2);
  const int64_t num_experts = args.routing.num_experts;
  const int64_t without_logits = rule.num_shared_experts - rule.num_shared_logits();
  const int64_t wanted = num_experts - without_logits + rule.num_zero_experts;
  if (weight.shape[0] == wanted) return;
  fail_argument(weight.name,
                "shape [" + std::to_string(wanted) + ", any] for num_experts " +
                    std::to_string(num_experts) + " with " +
                    std::to_string(rule.num_shared_experts) + " shared and " +
                    std::to_string(rule.num_zero_experts) + " zero ones",
                shape_of(weight));
}

// What the launch writes beside logits does not lie in what the product reads, nor logits in what the routing reads.
void check_apart(const FusedRouterSortingArgs& args) {
  const FusedTopkMoeSortingArgs& routing = args.routing;
  const SortTensors& sort = routing.sort;
  const TensorView* const bias = or_null(args.router.router_bias);
  const auto inputs = {&args.router.hidden_states, &args.router.router_weight, bias};
  check_same_device({&routing.gating_output, &sort.sorted_ids});
  check_no_overlap({&sort.sorted_ids, &sort.sorted_weights, &sort.sorted_expert_ids,
                    &sort.num_valid_ids, &sort.moe_buf},
                   inputs);
  check_no_overlap({or_null(routing.topk_weights), or_null(routing.topk_ids)}, inputs);
  check_no_overlap({&routing.gating_output},
                   {or_null(routing.correction_bias), sort.expert_mask_or_null(),
                    sort.num_local_tokens_or_null()});
}

void check_all(const FusedRouterSortingArgs& args, const Problem& problem) {
  check_num_experts(args, problem.rule);
  check_router(args.router, args.routing.gating_output);
  check_fused_args(args.routing, problem);
  check_apart(args);
  if (args.num_workgroups) {
    check_range("num_workgroups", *args.num_workgroups, 1, kMaxRouterWorkgroups);
  }
}

// Everything about a launch that the kernel does not get.
struct RouterConfig {
  LaunchShape launch;
  FusedLds lds;
  int num_rows;
};

RouterConfig choose_config(const SortShape& shape, const RowChoice& rows,
                           const RouterProduct& product, int num_workgroups, bool is_asked,
                           uint64_t zero_bytes, bool one_token, DeviceLimits limits) {
  const int row_threads = rows.max_threads != 0 ? rows.max_threads : max_row_threads(rows.values);
  limits.max_threads_per_block =
      std::min(limits.max_threads_per_block,
               max_router_threads(row_threads, rows.by == RowsBy::keys, rows.values));
  const int most_teams = std::min(kMaxProductTeams, limits.max_threads_per_block / kPartialSums);
  const int num_teams = std::clamp(product.tiles_per_block, 1, most_teams);
  const int num_waves =
      std::max(choose_waves(shape, rows, shape.num_tokens, true, one_token, limits),
               num_teams * kPartialSums / limits.wave_size);
  const FusedLdsPlan plan = plan_fused_lds(shape.num_tokens, shape.num_experts, shape.topk, 1,
                                           num_waves * rows.lds_bytes);
  RouterConfig config;
  config.lds = plan.lds;
  config.num_rows = shape.num_tokens;
  config.launch.num_threads = limits.wave_size * num_waves;
  config.launch.lds_bytes = std::max(
      plan.total, static_cast<size_t>(product_lds_bytes(config.launch.num_threads / kPartialSums)));
  const int with_tiles =
      product.num_tiles == 0 ? 1 : divided_up(product.num_tiles, product.tiles_per_block);
  const int zeroing = static_cast<int>(zeroing_blocks(zero_bytes, limits));
  config.launch.num_blocks =
      is_asked ? num_workgroups : std::max(with_tiles, std::min(num_workgroups, 1 + zeroing));
  config.launch.waits_itself = true;
  return config;
}

[[noreturn]] void fail_rows(const SortShape& shape, const DeviceLimits& limits) {
  fail_argument("hidden_states",
                "at most " + std::to_string(max_tokens(shape.num_experts, shape.topk, 1, limits)) +
                    " rows, which is what fits in " + std::to_string(limits.lds_bytes) +
                    " bytes of LDS for num_experts " + std::to_string(shape.num_experts) +
                    " and topk " + std::to_string(shape.topk),
                std::to_string(shape.num_tokens));
}

// Rows of f32 that have a kernel without a rule: by lists, and by keys as far as few tokens take them. All others
// are the rule's, with the same bits.
template <typename Rows>
struct HasPlainKernel : std::false_type {};
template <int kLanes, int kValues, int kBest>
struct HasPlainKernel<GroupRows<float, kLanes, kValues, kBest>> : std::true_type {};
template <int kLanes, int kValues, int kBest>
struct HasPlainKernel<KeyRows<kLanes, kValues, kBest>> : std::bool_constant<kLanes == kRuleLanes> {
};

bool has_plain_kernel(const RowChoice& rows) {
  bool has = false;
  dispatch_rows(DType::f32, rows,
                [&](auto tag) { has = HasPlainKernel<typename decltype(tag)::type>::value; });
  return has;
}

}  // namespace

struct RouterLaunch {
  RouterProduct product;
  LaunchShape shape;
  DeviceLimits limits;
  int device_index;
  int num_tokens;
  bool in_one;  // else the product alone, which has nothing of the rest
  FusedFirst first;
  FusedParams params;
  FusedRule rule;
  RowChoice rows;
  bool by_rule;
};

namespace {

RouterLaunch checked_launch(const FusedRouterSortingArgs& args) {
  const FusedTopkMoeSortingArgs& routing = args.routing;
  const TensorView& logits = routing.gating_output;
  const Problem problem = problem_of(routing);
  check_all(args, problem);
  RouterLaunch made{};
  made.in_one = true;
  made.by_rule = problem.by_rule;
  made.device_index = logits.device_index;
  made.limits = device_limits(made.device_index);
  const bool is_asked = args.num_workgroups.has_value();
  const int num_workgroups =
      is_asked ? static_cast<int>(*args.num_workgroups) : made.limits.num_compute_units;
  const SortShape shape =
      sort_shape(logits.shape[0], problem.num_experts, problem.num_slots, routing.unit_size,
                 routing.sort, routing.flat_ids, problem.rule.num_zero_experts);
  if (!fits(shape.num_tokens, shape.num_experts, shape.topk, 1, made.limits)) {
    fail_rows(shape, made.limits);
  }
  made.product = product_of(kTiles, args.router, logits, num_workgroups);
  made.params.shape = shape;
  made.params.sort = sort_params(routing.sort);
  made.rule = fused_rule(routing, problem);
  const bool one_token = is_one_token(shape, made.params.sort);
  const auto configure = [&](bool lds_is_full) {
    made.rule.row.in_memory = lds_is_full;
    if (!made.by_rule) {
      made.rows = choose_rows(logits, shape.num_experts, shape.topk, routing.need_renorm,
                              made.limits.wave_size, lds_is_full);
      made.by_rule = !has_plain_kernel(made.rows);
    }
    if (made.by_rule) made.rows = rule_row_choice(made.rule.row, logits, made.limits.wave_size);
    return choose_config(shape, made.rows, made.product, num_workgroups, is_asked,
                         made.params.sort.row_bytes * shape.num_tokens, one_token, made.limits);
  };
  RouterConfig config = configure(false);
  if (config.launch.lds_bytes > static_cast<size_t>(made.limits.lds_bytes))
    config = configure(true);
  made.params.lds = config.lds;
  made.shape = config.launch;
  FusedConfig alone{};
  alone.tokens_per_block = config.num_rows;
  alone.launch = config.launch;
  made.first =
      fused_first(routing, shape, made.params.sort, made.rows, alone, {1, false}, one_token);
  return made;
}

}  // namespace

int64_t fused_router_sorting_max_tokens(int64_t num_experts, int64_t topk, int device_index) {
  check_experts_and_topk(num_experts, topk);
  return max_tokens(static_cast<int>(num_experts), static_cast<int>(topk), 1,
                    device_limits(device_index));
}

void fused_router_sorting_check(const FusedRouterSortingArgs& args) {
  check_all(args, problem_of(args.routing));
}

namespace {

// NOTE: a function: clang does not emit the kernel for the host if only a variable template names it.
template <int kRows, int kExperts, int kWanted, typename Chunks, typename F>
void with_product_kernel(F f) {
  f(router_product_kernel<kRows, kExperts, held_rounds<kRows, kExperts, Chunks>(kWanted), Chunks>);
}

// Calls f(kernel) with the one for the product's tile.
template <typename F>
void dispatch_product(const RouterProduct& p, F f) {
  const auto is = [&](int rows, int experts) {
    return p.tile.rows == rows && p.tile.experts == experts;
  };
  if (p.by == ChunksBy::bf16) {
    if (is(8, 8)) return with_product_kernel<8, 8, 2, Bf16Chunks>(f);
    if (is(8, 4)) return with_product_kernel<8, 4, 2, Bf16Chunks>(f);
    if (is(4, 4)) return with_product_kernel<4, 4, 3, Bf16Chunks>(f);
    if (is(4, 2)) return with_product_kernel<4, 2, 3, Bf16Chunks>(f);
    if (is(4, 1)) return with_product_kernel<4, 1, 4, Bf16Chunks>(f);
    if (is(2, 2)) return with_product_kernel<2, 2, 4, Bf16Chunks>(f);
    if (is(1, 2)) return with_product_kernel<1, 2, 4, Bf16Chunks>(f);
    return with_product_kernel<1, 1, 4, Bf16Chunks>(f);
  }
  if (p.by == ChunksBy::wide) {
    if (is(4, 1)) return with_product_kernel<4, 1, 2, WideChunks>(f);
    return with_product_kernel<1, 1, 4, WideChunks>(f);
  }
  f(router_product_kernel<1, 1, 1, Items>);
}

// Of checked arguments.
RouterLaunch product_launch(const RouterTensors& router, const TensorView& logits) {
  RouterLaunch made{};
  made.device_index = logits.device_index;
  made.limits = device_limits(made.device_index);
  made.num_tokens = static_cast<int>(logits.shape[0]);
  made.product = product_of(kTilesAlone, router, logits, made.limits.num_compute_units);
  made.shape.num_blocks = made.product.num_tiles;
  made.shape.num_threads = kPartialSums;
  made.shape.lds_bytes = lds_bytes_alone(made.product.tile);
  made.shape.cluster_size = 1;
  made.shape.waits_itself = true;
  return made;
}

void make_product_launch(const RouterLaunch& made, hipStream_t stream) {
  if (made.num_tokens == 0) return;
  dispatch_product(made.product, [&](auto kernel) {
    launch(kernel, made.limits, made.shape, stream, made.num_tokens,
           Divisor::of(made.product.row_tiles), made.product);
  });
}

void make_launch_in_one(const RouterLaunch& made, hipStream_t stream) {
  const FusedFirst& first = made.first;
  FusedParams params = made.params;
  params.ticket = ticket_for(made.device_index, stream);
  const auto make = [&](auto kernel, const auto&... rest) {
    launch(kernel, made.limits, made.shape, stream, first.gating, first.row_stride,
           first.num_local_tokens, first.expert_mask, first.num_tokens, first.num_experts,
           first.topk, first.tokens_per_block, first.num_threads, first.flags, params, rest...,
           made.product);
  };
  try {
    if (made.by_rule) {
      make(router_rules_kernel(made.rule.row), made.rule);
      return;
    }
    dispatch_rows(DType::f32, made.rows, [&](auto tag) {
      using Rows = typename decltype(tag)::type;
      if constexpr (HasPlainKernel<Rows>::value) make(fused_router_sorting_kernel<Rows>);
    });
  } catch (...) {
    forget_arrivals(params.ticket);
    throw;
  }
}

}  // namespace

std::shared_ptr<const RouterLaunch> prepare_router_launch(const FusedRouterSortingArgs& args,
                                                          bool in_one) {
  if (in_one) return std::make_shared<const RouterLaunch>(checked_launch(args));
  fused_router_sorting_check(args);
  return std::make_shared<const RouterLaunch>(
      product_launch(args.router, args.routing.gating_output));
}

bool is_in_one(const RouterLaunch& prepared) { return prepared.in_one; }

void make_router_launch(const RouterLaunch& prepared, void* stream) {
  const DeviceGuard guard(prepared.device_index);
  const auto make = prepared.in_one ? make_launch_in_one : make_product_launch;
  make(prepared, static_cast<hipStream_t>(stream));
}

void make_router_launch(const RouterLaunch& prepared, const RouterMemory& memory, void* stream) {
  RouterLaunch moved = prepared;
  moved.product.hidden = static_cast<const unsigned char*>(memory[kHiddenStates]);
  moved.product.weight = static_cast<const unsigned char*>(memory[kRouterWeight]);
  moved.product.bias = memory[kRouterBias];
  moved.product.logits = static_cast<float*>(memory[kRouterLogits]);
  if (prepared.in_one) {
    move_launch(memory.data(), memory[kRouterExpertMask], memory[kRouterNumLocalTokens],
                memory[kRouterCorrectionBias], moved.first, moved.params, moved.rule);
  }
  make_router_launch(moved, stream);
}

void fused_router_sorting_fwd(const FusedRouterSortingArgs& args, void* stream) {
  make_router_launch(checked_launch(args), stream);
}

void router_product(const RouterTensors& router, const TensorView& logits_out, void* stream) {
  check_router(router, logits_out);
  make_router_launch(product_launch(router, logits_out), stream);
}

bool is_current_device(int device_index) { return current_device() == device_index; }

}  // namespace aiter
