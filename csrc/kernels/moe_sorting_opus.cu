// The checked launchers of the oneshot and the multi-phase sort.
#include <algorithm>

#include "moe_sorting_opus.h"
#include "moe_sorting_opus_api.h"
#include "sort_launch.h"

namespace aiter {
namespace {

// Up to this many entries (tokens x slots) one workgroup is faster than three launches.
// NOTE: aiter/routing/dispatch.py has the same number; test_moe_sorting_opus.py compares.
constexpr int64_t kMaxOneshotEntries = 8192;

struct Tiling {
  bool multiphase;
  int tile_words, num_tiles;
};

// The most bitmask words per expert that fit in LDS beside its count and its start.
int max_tile_words(int num_experts) { return kSortLdsWords / num_experts - 2; }
static_assert(kSortLdsWords / kMaxSortExperts - 2 >= 1, "a tile is at least one word");

Tiling choose_tiling(int64_t num_tokens, int num_experts, int topk, int64_t dispatch_policy) {
  check_range("dispatch_policy", dispatch_policy, 0, 2);
  check_range("num_experts", num_experts, 1, kMaxSortExperts);
  const bool multiphase =
      dispatch_policy == 2 || (dispatch_policy == 0 && num_tokens * topk > kMaxOneshotEntries);
  const int num_words = hit_words(static_cast<int>(num_tokens));
  const int wanted = multiphase ? (num_words + kTargetTiles - 1) / kTargetTiles : num_words;
  const int tile_words = std::clamp(wanted, 1, max_tile_words(num_experts));
  return {multiphase, tile_words, (num_words + tile_words - 1) / tile_words};
}

int64_t workspace_bytes(const Tiling& tiling, int64_t num_experts) {
  return tiling.multiphase ? (tiling.num_tiles + 1) * num_experts * sizeof(uint32_t) : 0;
}

void check_workspace(const std::optional<TensorView>& workspace, int64_t bytes) {
  if (bytes == 0) return;
  const std::string expected =
      "a contiguous tensor of at least " + std::to_string(bytes) + " bytes";
  if (!workspace) fail_argument("workspace", expected, "None");
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

// Checks everything; returns the launch choice.
Tiling check(const MoeSortingOpusArgs& args) {
  check_rank(args.topk_ids, 2);
  check_dtype(args.topk_ids, {DType::i32});
  check_contiguous(args.topk_ids);
  const int64_t num_tokens = args.topk_ids.shape[0];
  const int64_t topk = args.topk_ids.shape[1];
  if (num_tokens > kMaxTokens) {
    fail_argument(args.topk_ids.name, "at most " + std::to_string(kMaxTokens) + " rows",
                  shape_of(args.topk_ids));
  }
  check_experts_and_topk(args.num_experts, topk);
  check_dtype(args.topk_weights, {DType::f32});
  check_shape(args.topk_weights, {num_tokens, topk});
  check_contiguous(args.topk_weights);
  check_range("num_zero_experts", args.num_zero_experts, 0, args.num_experts - 1);
  check_sort_tensors(args.sort, num_tokens, args.num_experts, topk, args.unit_size,
                     args.num_zero_experts);
  const Tiling tiling = choose_tiling(num_tokens, static_cast<int>(args.num_experts),
                                      static_cast<int>(topk), args.dispatch_policy);
  check_workspace(args.workspace, workspace_bytes(tiling, args.num_experts));
  check_placement(args.sort, {&args.topk_ids, &args.topk_weights},
                  args.workspace ? &*args.workspace : nullptr);
  return tiling;
}

void launch_oneshot(const OpusParams& p, const DeviceLimits& limits, unsigned num_zeroing,
                    hipStream_t stream) {
  const unsigned threads = std::min(kSortThreads, limits.max_threads_per_block);
  launch(moe_sorting_oneshot_kernel, limits,
         {1 + num_zeroing, threads, opus_lds_bytes(p.shape.num_experts, p.tile_words), 1, true},
         stream, p);
}

void launch_multiphase(const OpusParams& p, const DeviceLimits& limits, unsigned num_zeroing,
                       hipStream_t stream) {
  const unsigned threads = std::min(kSortThreads, limits.max_threads_per_block);
  const unsigned num_tiles = p.num_tiles;
  if (num_tiles > 0) {
    launch(moe_sorting_count_kernel, limits,
           {num_tiles + num_zeroing, threads, sizeof(uint32_t) * p.shape.num_experts, 1, true},
           stream, p);
  }
  launch(moe_sorting_assign_kernel, limits,
         {1, threads, opus_lds_bytes(p.shape.num_experts, 0), 1, true}, stream, p);
  if (num_tiles > 0) {
    launch(moe_sorting_scatter_kernel, limits,
           {num_tiles, threads, opus_lds_bytes(p.shape.num_experts, p.tile_words), 1, true}, stream,
           p);
  }
}

}  // namespace

int64_t moe_sorting_opus_get_workspace_size(int64_t tokens, int64_t num_experts, int64_t topk,
                                            int64_t dispatch_policy) {
  check_range("tokens", tokens, 0, kMaxTokens);
  check_experts_and_topk(num_experts, topk);
  return workspace_bytes(
      choose_tiling(tokens, static_cast<int>(num_experts), static_cast<int>(topk), dispatch_policy),
      num_experts);
}

void moe_sorting_opus_check(const MoeSortingOpusArgs& args) { check(args); }

void moe_sorting_opus_fwd(const MoeSortingOpusArgs& args, void* stream) {
  const Tiling tiling = check(args);
  const DeviceGuard guard(args.topk_ids.device_index);
  const DeviceLimits limits = device_limits(args.topk_ids.device_index);
  OpusParams params;
  params.topk_ids = static_cast<const int32_t*>(args.topk_ids.data);
  params.topk_weights = static_cast<const float*>(args.topk_weights.data);
  params.shape = sort_shape(args.topk_ids.shape[0], args.num_experts, args.topk_ids.shape[1],
                            args.unit_size, args.sort, args.flat_ids, args.num_zero_experts);
  params.sort = sort_params(args.sort);
  params.workspace = args.workspace ? static_cast<uint32_t*>(args.workspace->data) : nullptr;
  params.tile_words = tiling.tile_words;
  params.num_tiles = tiling.num_tiles;
  const unsigned num_zeroing =
      zeroing_blocks(params.sort.row_bytes * params.shape.num_tokens, limits);
  const auto launch_sort = tiling.multiphase ? launch_multiphase : launch_oneshot;
  launch_sort(params, limits, num_zeroing, static_cast<hipStream_t>(stream));
}

}  // namespace aiter
