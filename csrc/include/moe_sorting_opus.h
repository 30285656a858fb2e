// The block-padded sort by expert of ready top-k ids: the second step of the separate chain.
//
//   topk_ids i32 [M, K], topk_weights f32 [M, K], contiguous; ids outside [0, E) are left out, and ids
//   may repeat in a row: every (token, slot) is an entry of its own
//   outputs as in expert_sort.h; moe_buf rows below n zeroed
//
// Tokens are handled in tiles of whole bitmask words, so that LDS does not depend on M.
//
// Oneshot, one launch. Workgroup 0 sorts, the others zero moe_buf:
//   count all entries into LDS, give every expert its blocks, then tile by tile: bits of the tile,
//   entries to start + rank, start += entries of the tile.
//
// Multi-phase, three launches over a workspace of [num_tiles][E] counts and [E] first slots:
//   1 count     a workgroup per tile: its entries per expert (and further ones zero moe_buf)
//   2 assign    one workgroup: exclusive sums over the tiles, blocks, padding
//   3 scatter   a workgroup per tile: bits of the tile, entries to start + tile's offset + rank
//
// A bit per (token, expert) cannot count an id that repeats in a row. What was set before a bit is set tells
// of it, and the tile is then done once more with a bit per (entry, expert), which needs no such care: the
// entries' order by token, then slot, is the order in memory. A tile's bits hold 1/K of its entries at a time,
// so such a tile takes about K times as long; without repeats nothing is done twice. Rejected: entries as
// bits always (K times the LDS, or K passes); comparing every id with those before it in its row (K/2 loads
// per entry, repeats or not); distinct counts against all counts (a pass over the experts per tile).
//
// Rejected: what the first loads need as arguments of their own, as the other kernels have them (the model of
// op_tests/rocm, gfx942, 128/4, M = 1: 3.64 -> 3.31 us oneshot; but on an H100 3.12 -> 3.31, and 9.37 -> 9.60 for
// M = 1024 in three launches, `python op_tests/bench_moe_sorting_opus.py`, 2026-11-26).
#pragma once

#include "device/cluster.h"
#include "expert_sort.h"

namespace aiter {

// The launch choice is the same on every device, as the workspace size must not depend on it.
constexpr int kSortLdsWords =
    15 * 1024;  // 60 KiB: what every target gives a workgroup, less scratch
constexpr int kMaxSortExperts = 4096;
constexpr int kTargetTiles = 64;
constexpr int kSortThreads = 1024;

struct OpusParams {
  const int32_t* topk_ids;
  const float* topk_weights;
  SortShape shape;
  SortParams sort;
  uint32_t* workspace;  // multi-phase only
  int tile_words;       // bitmask words per tile
  int num_tiles;
};

// LDS: totals [2][kMaxWavesPerBlock], counts [E], starts [E], bitmask [tile_words][E]. An expert's tail
// takes the place of its count, and whether a tile has repeats that of the first total.
struct OpusLds {
  uint32_t* counts;
  SortLds sort;
  HitMask hits;

  __device__ __forceinline__ uint32_t* repeats() const { return sort.totals; }
  // Before a tile; needs a barrier behind.
  __device__ __forceinline__ void clear_tile() const {
    hits.clear(blockDim.x);
    if (threadIdx.x == 0) *repeats() = 0;
  }
};

__host__ __device__ inline size_t opus_lds_bytes(int num_experts, int tile_words) {
  return sizeof(uint32_t) *
         (static_cast<size_t>(num_experts) * (2 + tile_words) + 2 * kMaxWavesPerBlock);
}

__device__ __forceinline__ OpusLds opus_lds(const OpusParams& p, char* lds_base) {
  uint32_t* const totals = reinterpret_cast<uint32_t*>(lds_base);
  uint32_t* const counts = totals + 2 * kMaxWavesPerBlock;
  uint32_t* const starts = counts + p.shape.num_experts;
  return {counts,
          {starts, counts, totals},
          HitMask{starts + p.shape.num_experts, p.shape.num_experts, p.tile_words}};
}

constexpr uint32_t kNoExpert = 0xffffffffu;

struct TokenRange {
  int first, last;  // last is excluded
};

__device__ __forceinline__ TokenRange tile_tokens(const OpusParams& p, int tile, int num_local) {
  const int64_t per_tile = static_cast<int64_t>(p.tile_words) * kTokensPerWord;
  const int64_t first = tile * per_tile;
  const int64_t last = first + per_tile < num_local ? first + per_tile : num_local;
  return {static_cast<int>(first), static_cast<int>(last)};
}

__device__ __forceinline__ void clear_words(uint32_t* words, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) words[i] = 0;
}

struct EntryRange {
  uint32_t first, last;  // last is excluded
};

__device__ __forceinline__ EntryRange entries_of(const OpusParams& p, TokenRange tokens) {
  return {static_cast<uint32_t>(tokens.first * p.shape.topk),
          static_cast<uint32_t>(tokens.last * p.shape.topk)};
}

// Calls f(entry, expert) for the entries whose id is an expert's, each by one thread. Loads of several
// entries are on their way at once.
template <typename F>
__device__ __forceinline__ void for_each_entry(const OpusParams& p, EntryRange entries, F f) {
  constexpr uint32_t kAtOnce = 4;
  AITER_LOOP
  for (uint32_t first = entries.first + threadIdx.x; first < entries.last;
       first += kAtOnce * blockDim.x) {
    uint32_t ids[kAtOnce];
    AITER_UNROLL
    for (uint32_t j = 0; j < kAtOnce; ++j) {
      const uint32_t i = first + j * blockDim.x;
      ids[j] = i < entries.last ? static_cast<uint32_t>(p.topk_ids[i]) : kNoExpert;
    }
    AITER_UNROLL
    for (uint32_t j = 0; j < kAtOnce; ++j) {
      if (ids[j] < static_cast<uint32_t>(p.shape.num_experts)) f(first + j * blockDim.x, ids[j]);
    }
  }
}

__device__ __forceinline__ void count_entries(const OpusParams& p, TokenRange tokens,
                                              uint32_t* lds_counts) {
  for_each_entry(p, entries_of(p, tokens),
                 [&](uint32_t, uint32_t expert_idx) { atomicAdd(&lds_counts[expert_idx], 1u); });
}

// Writes entry i at its expert's start + rank.
__device__ __forceinline__ void write_entry_at(const OpusParams& p, uint32_t start, uint32_t rank,
                                               uint32_t i, uint32_t expert_idx, int token) {
  const int k = static_cast<int>(i) - token * p.shape.topk;
  write_entry_and_id<true>(p.shape, p.sort, start + rank, {expert_idx, token, k, p.topk_weights[i]},
                           !leaves_out<true>(p.shape, p.sort));
}

// Moves an expert's first slot on by the entries before, unless expert_mask drops the expert.
__device__ __forceinline__ uint32_t advanced(uint32_t start, uint32_t entries) {
  return start == kNoSlot ? kNoSlot : start + entries;
}

// Moves all first slots on by the entries in the bitmask. Needs a barrier before and after.
__device__ __forceinline__ void advance_starts(const OpusParams& p, const OpusLds& lds) {
  for (int e = threadIdx.x; e < p.shape.num_experts; e += blockDim.x) {
    lds.sort.starts[e] = advanced(lds.sort.starts[e], lds.hits.count(e));
  }
}

// Writes the entries of a tile that has repeats, in parts of as many entries as the bitmask has bits per
// expert. Leaves starts and bitmask as scatter_tile() does: those of the last part.
__device__ void scatter_repeats(const OpusParams& p, EntryRange entries, const OpusLds& lds) {
  const uint32_t per_part = static_cast<uint32_t>(p.tile_words) * kTokensPerWord;
  AITER_LOOP
  for (uint32_t first = entries.first; first < entries.last; first += per_part) {
    const EntryRange part{first, entries.last - first < per_part ? entries.last : first + per_part};
    if (first != entries.first) advance_starts(p, lds);
    __syncthreads();
    lds.hits.clear(blockDim.x);
    __syncthreads();
    for_each_entry(p, part, [&](uint32_t i, uint32_t expert_idx) {
      lds.hits.set(static_cast<int>(i - part.first), expert_idx);
    });
    __syncthreads();
    for_each_entry(p, part, [&](uint32_t i, uint32_t expert_idx) {
      const uint32_t start = lds.sort.starts[expert_idx];
      if (start == kNoSlot) return;
      const uint32_t rank = lds.hits.rank(static_cast<int>(i - part.first), expert_idx);
      write_entry_at(p, start, rank, i, expert_idx, static_cast<int>(p.shape.by_topk.quotient(i)));
    });
    __syncthreads();
  }
}

// Writes the entries of a tile behind the starts. clear_tile() must be done, and all threads there. Starts
// and bitmask are such that advance_starts() makes them those of the next tile.
__device__ __forceinline__ void scatter_tile(const OpusParams& p, TokenRange tokens,
                                             const OpusLds& lds) {
  const EntryRange entries = entries_of(p, tokens);
  uint32_t repeats = 0;
  for_each_entry(p, entries, [&](uint32_t i, uint32_t expert_idx) {
    const int token = static_cast<int>(p.shape.by_topk.quotient(i)) - tokens.first;
    repeats |= lds.hits.set_again(token, expert_idx);
  });
  if (repeats != 0) atomicOr(lds.repeats(), 1u);
  __syncthreads();
  if (*lds.repeats() != 0) {
    scatter_repeats(p, entries, lds);
    return;
  }
  for_each_entry(p, entries, [&](uint32_t i, uint32_t expert_idx) {
    const uint32_t start = lds.sort.starts[expert_idx];
    if (start == kNoSlot) return;
    const int token = static_cast<int>(p.shape.by_topk.quotient(i));
    write_entry_at(p, start, lds.hits.rank(token - tokens.first, expert_idx), i, expert_idx, token);
  });
}

// From lds.counts to blocks and padding, by all threads of the one workgroup that does so.
__device__ __forceinline__ void assign_and_pad(const OpusParams& p, int num_local,
                                               const OpusLds& lds) {
  const uint32_t first_local = local_experts<true, 1>(p.shape, p.sort.expert_mask, threadIdx.x);
  assign_blocks<true, 1>(p.shape, num_local, first_local, true, leaves_out<true>(p.shape, p.sort),
                         uniform_wave_idx(), blockDim.x, lds.sort, p.sort,
                         [&](int e) { return ExpertCounts<1>{{lds.counts[e]}, {0}}; });
  __syncthreads();
  write_padding<true>(p.shape, num_local, lds.sort.tails, p.sort, threadIdx.x, blockDim.x);
}

__device__ __forceinline__ void sort_in_one_block(const OpusParams& p, int num_local,
                                                  char* lds_base) {
  const OpusLds lds = opus_lds(p, lds_base);
  clear_words(lds.counts, p.shape.num_experts);
  __syncthreads();
  count_entries(p, {0, num_local}, lds.counts);
  __syncthreads();
  assign_and_pad(p, num_local, lds);
  for (int tile = 0; tile < p.num_tiles; ++tile) {
    if (tile > 0) advance_starts(p, lds);
    __syncthreads();
    lds.clear_tile();
    __syncthreads();
    scatter_tile(p, tile_tokens(p, tile, num_local), lds);
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kSortThreads) moe_sorting_oneshot_kernel(OpusParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  wait_for_earlier_launch();
  let_next_launch_begin();
  const int num_local = local_tokens(p.sort.num_local_tokens, p.shape.num_tokens);
  if (blockIdx.x == 0) {
    sort_in_one_block(p, num_local, lds_base);
  } else {
    zero_moe_buf(p.sort, num_local, 1);
  }
}

__global__ void __launch_bounds__(kSortThreads) moe_sorting_count_kernel(OpusParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  wait_for_earlier_launch();
  let_next_launch_begin();
  const int num_local = local_tokens(p.sort.num_local_tokens, p.shape.num_tokens);
  if (blockIdx.x >= static_cast<unsigned>(p.num_tiles)) {
    zero_moe_buf(p.sort, num_local, p.num_tiles);
    return;
  }
  uint32_t* const lds_counts = reinterpret_cast<uint32_t*>(lds_base);
  clear_words(lds_counts, p.shape.num_experts);
  __syncthreads();
  count_entries(p, tile_tokens(p, blockIdx.x, num_local), lds_counts);
  __syncthreads();
  uint32_t* const tile_counts =
      p.workspace + static_cast<int64_t>(blockIdx.x) * p.shape.num_experts;
  for (int e = threadIdx.x; e < p.shape.num_experts; e += blockDim.x)
    tile_counts[e] = lds_counts[e];
}

// Replaces an expert's counts in all tiles, `stride` words apart, by the sums over the tiles before;
// returns the sum over all. Counts are loaded several at once, as each takes as long as all.
__device__ __forceinline__ uint32_t sum_over_tiles(uint32_t* counts, int64_t stride,
                                                   int num_tiles) {
  constexpr int kAtOnce = 16;
  uint32_t sum = 0;
  AITER_LOOP
  for (int first = 0; first < num_tiles; first += kAtOnce) {
    uint32_t loaded[kAtOnce];
    AITER_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      loaded[j] = first + j < num_tiles ? counts[(first + j) * stride] : 0;
    }
    AITER_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + j < num_tiles) counts[(first + j) * stride] = sum;
      sum += loaded[j];
    }
  }
  return sum;
}

__global__ void __launch_bounds__(kSortThreads) moe_sorting_assign_kernel(OpusParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  wait_for_earlier_launch();
  let_next_launch_begin();
  const OpusLds lds = opus_lds(p, lds_base);
  const int num_experts = p.shape.num_experts;
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    lds.counts[e] = sum_over_tiles(p.workspace + e, num_experts, p.num_tiles);
  }
  __syncthreads();
  const int num_local = local_tokens(p.sort.num_local_tokens, p.shape.num_tokens);
  assign_and_pad(p, num_local, lds);
  uint32_t* const starts = p.workspace + static_cast<int64_t>(p.num_tiles) * num_experts;
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) starts[e] = lds.sort.starts[e];
}

__global__ void __launch_bounds__(kSortThreads) moe_sorting_scatter_kernel(OpusParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  wait_for_earlier_launch();
  let_next_launch_begin();
  const OpusLds lds = opus_lds(p, lds_base);
  const int num_experts = p.shape.num_experts;
  const int num_local = local_tokens(p.sort.num_local_tokens, p.shape.num_tokens);
  const uint32_t* const offsets = p.workspace + static_cast<int64_t>(blockIdx.x) * num_experts;
  const uint32_t* const starts = p.workspace + static_cast<int64_t>(p.num_tiles) * num_experts;
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    lds.sort.starts[e] = advanced(starts[e], offsets[e]);
  }
  lds.clear_tile();
  __syncthreads();
  scatter_tile(p, tile_tokens(p, blockIdx.x, num_local), lds);
}

}  // namespace aiter
