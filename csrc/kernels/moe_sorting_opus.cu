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

// The most bitmask words per expert that fit in LDS beside its count and its start.
int max_part_words(int64_t num_experts) {
  return kSortLdsWords / static_cast<int>(num_experts) - 2;
}
static_assert(kSortLdsWords / kMaxSortExperts - 2 >= 1, "a part is at least one word");

bool is_multiphase(int64_t num_tokens, int64_t num_experts, int64_t topk, int64_t dispatch_policy) {
  check_range("dispatch_policy", dispatch_policy, 0, 2);
  check_range("num_experts", num_experts, 1, kMaxSortExperts);
  return dispatch_policy == 2 || (dispatch_policy == 0 && num_tokens * topk > kMaxOneshotEntries);
}

int64_t workspace_bytes(bool multiphase, int64_t num_tokens, int64_t num_experts) {
  return multiphase ? tile_counts_bytes(static_cast<int>(num_tokens), num_experts) : 0;
}

// Checks everything; returns whether the sort is multi-phase.
bool check(const MoeSortingOpusArgs& args) {
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
  const bool multiphase = is_multiphase(num_tokens, args.num_experts, topk, args.dispatch_policy);
  check_workspace(args.workspace ? &*args.workspace : nullptr,
                  workspace_bytes(multiphase, num_tokens, args.num_experts));
  check_placement(args.sort, {&args.topk_ids, &args.topk_weights},
                  args.workspace ? &*args.workspace : nullptr);
  return multiphase;
}

// How the entries of a tile are placed: a part of so many bitmask words at a time, and whether in order.
struct Parts {
  int words;
  bool in_order;

  size_t lds_bytes(const SortShape& shape) const {
    return opus_lds_bytes(shape.num_experts, words) +
           (in_order ? part_lds_bytes(words, shape.topk) : 0);
  }

  // In order unless there are few entries in all, or of each expert in as much as fits in `lds_bytes`.
  static Parts choose(const SortShape& shape, const Tiles& tiles, size_t lds_bytes) {
    const int wanted = hit_words(tiles.tokens);
    const Parts as_they_come{std::min(wanted, max_part_words(shape.num_experts)), false};
    if (!kOrdersEntries || tiles.tokens * shape.topk <= kFewEntries) return as_they_come;
    Parts ordered{wanted, true};
    while (ordered.words > 0 && ordered.lds_bytes(shape) > lds_bytes) --ordered.words;
    const int num_entries = kTokensPerWord * ordered.words * shape.topk;
    const bool has_neighbours = ordered.words == wanted || num_entries >= 2 * shape.num_experts;
    return ordered.words > 0 && has_neighbours ? ordered : as_they_come;
  }
};

void launch_oneshot(OpusParams p, const DeviceLimits& limits, unsigned num_zeroing,
                    hipStream_t stream) {
  const unsigned threads = std::min(kSortThreads, limits.max_threads_per_block);
  p.part_words = std::clamp(hit_words(p.shape.num_tokens), 1, max_part_words(p.shape.num_experts));
  launch(moe_sorting_oneshot_kernel, limits,
         {1 + num_zeroing, threads, opus_lds_bytes(p.shape.num_experts, p.part_words), 1, true},
         stream, p);
}

// `counted`: an earlier launch has.
void launch_multiphase(OpusParams p, const DeviceLimits& limits, uint32_t* workspace, bool counted,
                       hipStream_t stream) {
  const unsigned threads = std::min(kTileThreads, limits.max_threads_per_block);
  const Tiles tiles = Tiles::choose(p.shape.num_tokens, limits);
  const unsigned num_tiles = tiles.count, group = tiles.group;
  p.counts = TileCounts::in(workspace, p.shape.num_experts, tiles);
  p.num_zeroed = tiles.zeroed_first(p.shape.topk, p.sort.row_bytes, limits);
  const size_t zero_page_bytes = p.num_zeroed < tiles.tokens ? kZeroPageBytes : 0;
  const Parts parts = Parts::choose(p.shape, tiles, limits.lds_bytes - zero_page_bytes);
  p.part_words = parts.words;
  if (num_tiles > 0 && !counted) {
    launch(moe_sorting_count_kernel, limits,
           {num_tiles, threads, p.counts.lds_bytes(), group, true}, stream, p);
  }
  size_t lds_bytes = zero_page_bytes + parts.lds_bytes(p.shape);
  // NOTE: more than half of a compute unit's, so that each has one workgroup. Those that start up while the launch
  // before still runs crowd on the compute units that it leaves free else, and take several times as long.
  if (limits.overlaps_launches) {
    lds_bytes = std::max<size_t>(lds_bytes, limits.lds_bytes / 2 + 1024);
  }
  const unsigned num_zeroing = p.num_zeroed < tiles.tokens ? limits.wave_size : 0;
  launch(
      parts.in_order ? moe_sorting_place_kernel<kOrdersEntries> : moe_sorting_place_kernel<false>,
      limits, {std::max(num_tiles, 1u), threads + num_zeroing, lds_bytes, 1, true}, stream, p);
}

void sort(const MoeSortingOpusArgs& args, bool counted, void* stream) {
  const bool multiphase = check(args);
  const DeviceGuard guard(args.topk_ids.device_index);
  const DeviceLimits limits = device_limits(args.topk_ids.device_index);
  OpusParams params{};
  params.topk_ids = static_cast<const int32_t*>(args.topk_ids.data);
  params.topk_weights = static_cast<const float*>(args.topk_weights.data);
  params.shape = sort_shape(args.topk_ids.shape[0], args.num_experts, args.topk_ids.shape[1],
                            args.unit_size, args.sort, args.flat_ids, args.num_zero_experts);
  params.sort = sort_params(args.sort);
  if (multiphase) {
    uint32_t* const workspace =  // none for no tokens
        args.workspace ? static_cast<uint32_t*>(args.workspace->data) : nullptr;
    launch_multiphase(params, limits, workspace, counted, static_cast<hipStream_t>(stream));
  } else {
    const unsigned num_zeroing =
        zeroing_blocks(params.sort.row_bytes * params.shape.num_tokens, limits);
    launch_oneshot(params, limits, num_zeroing, static_cast<hipStream_t>(stream));
  }
}

}  // namespace

int64_t moe_sorting_opus_get_workspace_size(int64_t tokens, int64_t num_experts, int64_t topk,
                                            int64_t dispatch_policy) {
  check_range("tokens", tokens, 0, kMaxTokens);
  check_experts_and_topk(num_experts, topk);
  return workspace_bytes(is_multiphase(tokens, num_experts, topk, dispatch_policy), tokens,
                         num_experts);
}

void moe_sorting_opus_check(const MoeSortingOpusArgs& args) { check(args); }

void moe_sorting_opus_fwd(const MoeSortingOpusArgs& args, void* stream) {
  sort(args, false, stream);
}

void moe_sorting_opus_place(const MoeSortingOpusArgs& args, void* stream) {
  sort(args, true, stream);
}

}  // namespace aiter
