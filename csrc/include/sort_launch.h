// From checked arguments to kernel parameters: the launchers' shared second step.
#pragma once

#include <algorithm>
#include <type_traits>

#include "expert_sort.h"
#include "key_topk.h"
#include "routing_checks.h"
#include "tile_counts.h"

namespace aiter {

// `num_experts` includes `num_zero_experts`, the last ones, which compute nothing.
inline SortShape sort_shape(int64_t num_tokens, int64_t num_experts, int64_t topk,
                            int64_t unit_size, const SortTensors& t, bool flat_ids = false,
                            int64_t num_zero_experts = 0) {
  const auto on_boundary = [](const TensorView& view) {
    return reinterpret_cast<uintptr_t>(view.data) % sizeof(FourWords) == 0;
  };
  return {static_cast<int>(num_tokens),
          static_cast<int>(num_experts),
          static_cast<int>(topk),
          static_cast<int>(unit_size),
          Divisor::of(static_cast<uint32_t>(topk)),
          Divisor::of(static_cast<uint32_t>(unit_size)),
          unit_size % 4 == 0 && on_boundary(t.sorted_ids) && on_boundary(t.sorted_weights),
          flat_ids,
          static_cast<int>(num_experts - num_zero_experts)};
}

inline SortParams sort_params(const SortTensors& t) {
  const auto i32 = [](const TensorView* view) {
    return view == nullptr ? nullptr : static_cast<int32_t*>(view->data);
  };
  return {i32(&t.sorted_ids),
          static_cast<float*>(t.sorted_weights.data),
          i32(&t.sorted_expert_ids),
          i32(&t.num_valid_ids),
          static_cast<unsigned char*>(t.moe_buf.data),
          static_cast<uint64_t>(t.moe_buf.shape[1]) * t.moe_buf.itemsize,
          i32(t.expert_mask_or_null()),
          i32(t.num_local_tokens_or_null())};
}

// One workgroup zeroes this many bytes, until there are as many workgroups as compute units.
constexpr uint64_t kZeroBytesPerBlock = 32 * 1024;

// Workgroups beside the sorting ones that zero `num_bytes` of moe_buf. As many as the compute units that the
// sorting ones leave, 112 instead of 144 on an H100, are not enough: 107 instead of 96 us for 235 MB.
inline unsigned zeroing_blocks(uint64_t num_bytes, const DeviceLimits& limits) {
  const uint64_t wanted = (num_bytes + kZeroBytesPerBlock - 1) / kZeroBytesPerBlock;
  return static_cast<unsigned>(
      std::min<uint64_t>(wanted, std::max(1, limits.num_compute_units - 1)));
}

// How waves take rows of logits: several in groups of lanes, by lists (group_topk.h) or as f32 keys
// (key_topk.h), or one in so many registers of a lane (row_topk.h).
enum class RowsBy { wave, lists, keys };

struct RowChoice {
  RowsBy by;
  GroupShape group;  // of lists and keys
  int values;        // registers of a lane
  int rows_per_wave;
  int lds_bytes;  // of each wave
  RowFormat format;
  int64_t row_stride;   // in items of the class of rows
  int max_threads = 0;  // of a workgroup; 0 for those of max_row_threads()
  int places = 0;       // for experts, as kPlaces of the class
};

// The measurements are in group_topk.h and key_topk.h. Lists of f32 logits are for short rows and few tokens. A step per
// winner takes half of the time for 16-bit logits that it does for f32, and is for few winners of few tokens.
inline RowsBy choose_kind(const TensorView& gating, int num_experts, int topk, bool need_renorm) {
  constexpr int kShortRow = 128, kFewF32Logits = 64 * 256;
  if (!need_renorm) return RowsBy::wave;
  const bool is_f32 = gating.dtype == DType::f32;
  const int64_t num_tokens = gating.shape[0];
  if (topk <= kMaxGroupTopk && num_experts <= kMaxGroupExperts &&
      (!is_f32 || num_experts <= kShortRow || num_tokens * num_experts <= kFewF32Logits)) {
    return RowsBy::lists;
  }
  const int few = is_f32 || topk > kMaxGroupTopk ? 0 : 4;
  return has_key_group(num_experts, topk) && num_tokens > few ? RowsBy::keys : RowsBy::wave;
}

// `lds_is_full`: there is none for keys.
inline RowChoice choose_rows(const TensorView& gating, int num_experts, int topk, bool need_renorm,
                             int wave_size, bool lds_is_full = false) {
  const LogitType type = gating.dtype == DType::f32   ? LogitType::f32
                         : gating.dtype == DType::f16 ? LogitType::f16
                                                      : LogitType::bf16;
  RowChoice choice{choose_kind(gating, num_experts, topk, need_renorm),
                   {},
                   row_values(num_experts, wave_size),
                   1,
                   0,
                   {0, type},
                   gating.stride[0]};
  choice.places = choice.values == 0 ? kAnyPlaces : choice.values * wave_size;
  if (choice.by == RowsBy::keys && lds_is_full) choice.by = RowsBy::wave;
  if (choice.by == RowsBy::wave) return choice;
  const int num_tokens = static_cast<int>(gating.shape[0]);
  if (choice.by == RowsBy::lists) {
    choice.group = group_shape(num_tokens, num_experts, topk);
  } else {
    choice.group = key_group_shape(num_experts, topk);
    choice.lds_bytes = best_keys_lds_bytes(wave_size);
    choice.row_stride *= gating.itemsize;
    choice.max_threads = max_key_threads(choice.group.values);
  }
  choice.values = choice.group.values;
  choice.places = choice.group.lanes * choice.group.values;
  if (choice.by == RowsBy::lists && type == LogitType::f32) {
    choice.values = list_registers<float>(choice.values);
  }
  choice.rows_per_wave = wave_size / choice.group.lanes;
  const auto on_boundary = [](uint64_t bytes) { return bytes % sizeof(FourWords) == 0; };
  choice.format.wide = on_boundary(reinterpret_cast<uintptr_t>(gating.data)) &&
                       on_boundary(gating.stride[0] * gating.itemsize) &&
                       on_boundary(num_experts * gating.itemsize);
  return choice;
}

// The tensors of the counts of a launch that selects; null without.
struct CountsTensors {
  const TensorView *workspace = nullptr, *moe_buf = nullptr;  // outputs
  const TensorView* num_local_tokens = nullptr;
};

// Checks them for a launch that selects `num_tokens` rows, but for their places.
inline CountsTensors check_counts(const std::optional<CountsArgs>& counts, int64_t num_tokens) {
  if (!counts) return {};
  check_range("num_experts", counts->num_experts, 1, kMaxSortExperts);
  check_workspace(&counts->workspace,
                  tile_counts_bytes(static_cast<int>(num_tokens), counts->num_experts));
  check_num_local_tokens(counts->num_local_tokens_or_null());
  check_moe_buf(counts->moe_buf, num_tokens);
  return {&counts->workspace, &counts->moe_buf, counts->num_local_tokens_or_null()};
}

// How a launch that selects rows is made: with counts, a tile a workgroup, else as many rows as its waves take at once.
struct SelectLaunch {
  RowsOfBlock block;
  LaunchShape shape;
};

// Rows come ahead to waves that have several sets of them, behind `lds_bytes` that are taken.
inline AheadShape ahead_shape(const TensorView& gating, const RowChoice& rows, int num_waves,
                              const Tiles& tiles, size_t lds_bytes, const DeviceLimits& limits) {
  const int64_t row_bytes = gating.shape[1] * gating.itemsize;
  const auto on_boundary = [](uint64_t bytes) { return bytes % sizeof(FourWords) == 0; };
  const bool can_copy = limits.copies_in_bulk && on_boundary(row_bytes) &&
                        on_boundary(gating.stride[0] * gating.itemsize) &&
                        on_boundary(reinterpret_cast<uintptr_t>(gating.data));
  if (!can_copy || tiles.tokens <= num_waves * rows.rows_per_wave) return {};
  if (row_bytes * rows.rows_per_wave > limits.lds_bytes) return {};
  const AheadShape shape{
      AheadShape::up_to_boundary(static_cast<uint32_t>(lds_bytes)),
      static_cast<uint32_t>(row_bytes),
      AheadShape::up_to_boundary(static_cast<uint32_t>(row_bytes * rows.rows_per_wave))};
  const bool fits =
      shape.offset + shape.lds_bytes(num_waves) <= static_cast<uint32_t>(limits.lds_bytes);
  return fits ? shape : AheadShape{};
}

inline SelectLaunch select_launch(const TensorView& gating, int topk, const RowChoice& rows,
                                  const std::optional<CountsArgs>& counts,
                                  const DeviceLimits& limits) {
  SelectLaunch launch{};
  const int num_tokens = static_cast<int>(gating.shape[0]);
  const Tiles tiles = Tiles::choose(num_tokens, limits);
  int num_waves = kWavesPerBlock;
  if (counts) {
    const int most_threads =
        std::min({kCountingThreads, limits.max_threads_per_block,
                  rows.max_threads != 0 ? rows.max_threads : kCountingThreads});
    const int wanted = (tiles.tokens + rows.rows_per_wave - 1) / rows.rows_per_wave + 1;
    num_waves = std::min(std::max(wanted, kWavesPerBlock), most_threads / limits.wave_size);
  }
  LaunchShape& shape = launch.shape;
  shape.num_threads = num_waves * limits.wave_size;
  shape.lds_bytes = num_waves * rows.lds_bytes;
  shape.waits_itself = true;
  if (!counts) {
    launch.block.num_rows = num_waves * rows.rows_per_wave;
    shape.num_blocks = (num_tokens + launch.block.num_rows - 1) / launch.block.num_rows;
    return launch;
  }
  const TensorView* local = counts->num_local_tokens_or_null();
  const uint64_t row_bytes =
      static_cast<uint64_t>(counts->moe_buf.shape[1]) * counts->moe_buf.itemsize;
  launch.block = {tiles.tokens,
                  tiles.zeroed_first(topk, row_bytes, limits),
                  static_cast<uint32_t>(shape.lds_bytes),
                  TileCounts::in(static_cast<uint32_t*>(counts->workspace.data),
                                 static_cast<int>(counts->num_experts), tiles),
                  local == nullptr ? nullptr : static_cast<const int32_t*>(local->data),
                  static_cast<unsigned char*>(counts->moe_buf.data),
                  row_bytes,
                  {}};
  shape.lds_bytes += launch.block.counts.lds_bytes();
  launch.block.ahead = ahead_shape(gating, rows, num_waves - 1, tiles, shape.lds_bytes, limits);
  if (launch.block.ahead.row_bytes != 0) {
    shape.lds_bytes = launch.block.ahead.offset + launch.block.ahead.lds_bytes(num_waves - 1);
  }
  shape.num_blocks = tiles.count;
  shape.cluster_size = tiles.group;
  return launch;
}

template <typename Rows>
struct RowsTag {
  using type = Rows;
};

// Calls f(RowsTag<WaveRow or GroupRows of the logit type, or KeyRows>{}).
template <typename F>
void dispatch_rows(DType dtype, const RowChoice& choice, F f) {
  const auto is = [&](int lanes, int values, int best) {
    return choice.group.lanes == lanes && choice.group.values == values &&
           choice.group.best == best;
  };
  const auto by_lists = [&](auto logit) {
    using T = decltype(logit);
    if (is(8, 16, 4)) return f(RowsTag<GroupRows<T, 8, 16, 4>>{});
    if (is(8, 16, 8)) return f(RowsTag<GroupRows<T, 8, 16, 8>>{});
    if (is(16, 16, 8)) return f(RowsTag<GroupRows<T, 16, 16, 8>>{});
    if constexpr (!std::is_same_v<T, float>) {  // so many f32 logits go by keys
      if (is(8, 32, 8)) return f(RowsTag<GroupRows<T, 8, 32, 8>>{});
    }
    return f(RowsTag<GroupRows<T, 32, 16, 8>>{});
  };
  const auto by_keys = [&] {
    if (is(8, 32, 8)) return f(RowsTag<KeyRows<8, 32, 8>>{});
    if (is(32, 16, 16)) return f(RowsTag<KeyRows<32, 16, 16>>{});
    if (is(32, 32, 16)) return f(RowsTag<KeyRows<32, 32, 16>>{});
    return f(RowsTag<KeyRows<32, 32, 32>>{});
  };
  const auto by_wave = [&](auto logit) {
    using T = decltype(logit);
    static_assert(kMaxRowValues == 32, "one case per power of two");
    switch (choice.values) {
      case 2:
        return f(RowsTag<WaveRow<T, 2>>{});
      case 4:
        return f(RowsTag<WaveRow<T, 4>>{});
      case 8:
        return f(RowsTag<WaveRow<T, 8>>{});
      case 16:
        return f(RowsTag<WaveRow<T, 16>>{});
      case 32:
        return f(RowsTag<WaveRow<T, 32>>{});
      default:
        return f(RowsTag<WaveRow<T, 0>>{});
    }
  };
  if (choice.by == RowsBy::keys) return by_keys();
  switch (dtype) {
    case DType::f32:
      return choice.by == RowsBy::lists ? by_lists(float{}) : by_wave(float{});
    case DType::f16:
      return choice.by == RowsBy::lists ? by_lists(F16{}) : by_wave(F16{});
    default:
      return choice.by == RowsBy::lists ? by_lists(Bf16{}) : by_wave(Bf16{});
  }
}

}  // namespace aiter
