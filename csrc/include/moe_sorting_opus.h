// The block-padded sort by expert of ready top-k ids: the second step of the separate chain.
//
//   topk_ids i32 [M, K], topk_weights f32 [M, K], contiguous; ids outside [0, E) are left out, and ids
//   may repeat in a row: every (token, slot) is an entry of its own
//   outputs as in expert_sort.h; moe_buf rows below n zeroed
//
// Tokens are handled in parts of whole bitmask words, so that LDS does not depend on M.
//
// Oneshot, one launch. Workgroup 0 sorts, the others zero moe_buf:
//   count all entries into LDS, give every expert its blocks, then part by part: its bits, entries to
//   start + rank, start += entries of the part.
//
// Multi-phase, two launches over a workspace of counts per expert and tile of tokens (tile_counts.h):
//   1 count     a workgroup per tile: its entries per expert; zeroes its rows of moe_buf. Left out where the launch that
//               selected has done both
//   2 place     a workgroup per tile: sums over the tiles, blocks, its share of the padding, bits of the tile, entries to
//               start + entries of the tiles before + rank
//
// A bit per (token, expert) cannot count an id that repeats in a row. What was set before a bit is set tells
// of it, and the part is then done once more with a bit per (entry, expert), which needs no such care: the
// entries' order by token, then slot, is the order in memory. A part's bits hold 1/K of its entries at a time,
// so such a part takes about K times as long; without repeats nothing is done twice. Rejected: entries as
// bits always (K times the LDS, or K passes); comparing every id with those before it in its row (K/2 loads
// per entry, repeats or not); distinct counts against all counts (a pass over the experts per part).
//
// Rejected: what the first loads need as arguments of their own, as the other kernels have them (the model of
// op_tests/rocm, gfx942, 128/4, M = 1: 3.64 -> 3.31 us oneshot; but on an H100 3.12 -> 3.31, and 9.37 -> 9.60 for
// M = 1024 in three launches, `python op_tests/bench_moe_sorting_opus.py`, 2026-11-26).
#pragma once

#include "tile_counts.h"

namespace aiter {

// The launch choice is the same on every device, as the workspace size must not depend on it.
constexpr int kSortLdsWords =
    15 * 1024;  // 60 KiB: what every target gives a workgroup, less scratch
constexpr int kSortThreads = 1024;
constexpr int kTileThreads = 512;  // multi-phase

struct OpusParams {
  const int32_t* topk_ids;
  const float* topk_weights;
  SortShape shape;
  SortParams sort;
  int part_words;  // bitmask words per expert: of so many tokens at a time
  // Multi-phase only:
  TileCounts counts;
};

// LDS: totals [2][kMaxWavesPerBlock], whether a part has repeats, counts [E], starts [E], bitmask [part_words][E]. An
// expert's tail takes the place of its count.
struct OpusLds {
  uint32_t* counts;
  SortLds sort;
  HitMask hits;

  __device__ __forceinline__ uint32_t* repeats() const {
    return sort.totals + 2 * kMaxWavesPerBlock;
  }
  // Before a part; needs a barrier behind.
  __device__ __forceinline__ void clear_part() const {
    hits.clear(blockDim.x);
    if (threadIdx.x == 0) *repeats() = 0;
  }
};

__host__ __device__ inline size_t opus_lds_bytes(int num_experts, int part_words) {
  return sizeof(uint32_t) *
         (static_cast<size_t>(num_experts) * (2 + part_words) + 2 * kMaxWavesPerBlock + 1);
}

__device__ __forceinline__ OpusLds opus_lds(const OpusParams& p, char* lds_base) {
  uint32_t* const totals = reinterpret_cast<uint32_t*>(lds_base);
  uint32_t* const counts = totals + 2 * kMaxWavesPerBlock + 1;
  uint32_t* const starts = counts + p.shape.num_experts;
  return {counts,
          {starts, counts, totals},
          HitMask{starts + p.shape.num_experts, p.shape.num_experts, p.part_words}};
}

constexpr uint32_t kNoExpert = 0xffffffffu;

__device__ __forceinline__ TokenRange tile_tokens(const OpusParams& p, int tile, int num_local) {
  const Tiles& tiles = p.counts.tiles;
  return tokens_there(static_cast<int64_t>(tile) * tiles.tokens, tiles.tokens, num_local);
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
                                               uint32_t i, uint32_t expert_idx, int token,
                                               float weight) {
  const int k = static_cast<int>(i) - token * p.shape.topk;
  write_entry_and_id<true>(p.shape, p.sort, start + rank, {expert_idx, token, k, weight},
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

// Writes the entries of a part that has repeats, in pieces of as many entries as the bitmask has bits per
// expert. Leaves starts and bitmask as place_part() does: those of the last piece.
__device__ void place_repeats(const OpusParams& p, EntryRange entries, const OpusLds& lds) {
  const uint32_t per_piece = static_cast<uint32_t>(p.part_words) * kTokensPerWord;
  AITER_LOOP
  for (uint32_t first = entries.first; first < entries.last; first += per_piece) {
    const EntryRange piece{first,
                           entries.last - first < per_piece ? entries.last : first + per_piece};
    if (first != entries.first) advance_starts(p, lds);
    __syncthreads();
    lds.hits.clear(blockDim.x);
    __syncthreads();
    for_each_entry(p, piece, [&](uint32_t i, uint32_t expert_idx) {
      lds.hits.set(static_cast<int>(i - piece.first), expert_idx);
    });
    __syncthreads();
    for_each_entry(p, piece, [&](uint32_t i, uint32_t expert_idx) {
      const uint32_t start = lds.sort.starts[expert_idx];
      if (start == kNoSlot) return;
      const uint32_t rank = lds.hits.rank(static_cast<int>(i - piece.first), expert_idx);
      write_entry_at(p, start, rank, i, expert_idx, static_cast<int>(p.shape.by_topk.quotient(i)),
                     p.topk_weights[i]);
    });
    __syncthreads();
  }
}

// Writes the entries of these tokens behind the starts. clear_part() must be done, and all threads there. Starts
// and bitmask are such that advance_starts() makes them those of the next part.
__device__ __forceinline__ void place_part(const OpusParams& p, TokenRange tokens,
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
    place_repeats(p, entries, lds);
    return;
  }
  for_each_entry(p, entries, [&](uint32_t i, uint32_t expert_idx) {
    const uint32_t start = lds.sort.starts[expert_idx];
    if (start == kNoSlot) return;
    const int token = static_cast<int>(p.shape.by_topk.quotient(i));
    write_entry_at(p, start, lds.hits.rank(token - tokens.first, expert_idx), i, expert_idx, token,
                   p.topk_weights[i]);
  });
}

// Writes the entries of a range of tokens behind the starts, in parts. clear_part() must be done, and all threads there.
__device__ __forceinline__ void place_tokens(const OpusParams& p, TokenRange tokens,
                                             const OpusLds& lds) {
  const int per_part = p.part_words * kTokensPerWord;
  AITER_LOOP
  for (int64_t first = tokens.first; first < tokens.last; first += per_part) {
    if (first > tokens.first) {
      __syncthreads();
      advance_starts(p, lds);
      __syncthreads();
      lds.clear_part();
      __syncthreads();
    }
    place_part(p, tokens_there(first, per_part, tokens.last), lds);
  }
}

__device__ __forceinline__ void sort_in_one_block(const OpusParams& p, int num_local,
                                                  char* lds_base) {
  const OpusLds lds = opus_lds(p, lds_base);
  clear_words(lds.counts, p.shape.num_experts);
  lds.clear_part();
  __syncthreads();
  count_entries(p, {0, num_local}, lds.counts);
  __syncthreads();
  const uint32_t first_local = local_experts<true, 1>(p.shape, p.sort.expert_mask, threadIdx.x);
  assign_blocks<true, 1>(p.shape, num_local, first_local, true, leaves_out<true>(p.shape, p.sort),
                         uniform_wave_idx(), blockDim.x, lds.sort, p.sort,
                         [&](int e) { return ExpertCounts<1>{{lds.counts[e]}, {0}}; });
  __syncthreads();
  write_padding<true>(p.shape, num_local, lds.sort.tails, p.sort, threadIdx.x, blockDim.x);
  place_tokens(p, {0, num_local}, lds);
}

__global__ void __launch_bounds__(kSortThreads) moe_sorting_oneshot_kernel(OpusParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  wait_for_earlier_launch();
  let_next_launch_begin();
  const int num_local = local_tokens(p.sort.num_local_tokens, p.shape.num_tokens);
  if (blockIdx.x == 0) {
    sort_in_one_block(p, num_local, lds_base);
  } else {
    zero_moe_buf(p.sort, num_local, blockIdx.x - 1, gridDim.x - 1);
  }
}

__global__ void __launch_bounds__(kTileThreads) moe_sorting_count_kernel(OpusParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  const TileCounter counter(p.counts, lds_base);
  counter.begin();
  wait_for_earlier_launch();
  let_next_launch_begin();
  const int num_local = local_tokens(p.sort.num_local_tokens, p.shape.num_tokens);
  const TokenRange tokens = tile_tokens(p, blockIdx.x, num_local);
  if (uniform_wave_idx() == 0) {
    counter.zero(p.sort.moe_buf, p.sort.row_bytes, tokens);
  }
  count_entries(p, tokens, counter.counts);
  counter.finish();
}

__global__ void __launch_bounds__(kTileThreads) moe_sorting_place_kernel(OpusParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  const int tile = blockIdx.x;
  const bool is_first = tile == 0;
  const OpusLds lds = opus_lds(p, lds_base);
  lds.clear_part();
  wait_for_earlier_launch();
  let_next_launch_begin();
  const int num_local = local_tokens(p.sort.num_local_tokens, p.shape.num_tokens);
  const TokenRange tokens = tile_tokens(p, tile, num_local);
  // Of few entries each thread has one, which is on its way while experts get their blocks.
  const EntryRange entries = entries_of(p, tokens);
  const bool has_few = tokens.last - tokens.first <= p.part_words * kTokensPerWord &&
                       entries.last - entries.first <= blockDim.x;
  const uint32_t own = entries.first + threadIdx.x;
  uint32_t own_id = kNoExpert;
  float own_weight = 0.0f;
  if (has_few && tokens.first < tokens.last && own < entries.last) {
    own_id = static_cast<uint32_t>(p.topk_ids[own]);
    own_weight = p.topk_weights[own];
  }
  const uint32_t first_local = local_experts<true, 1>(p.shape, p.sort.expert_mask, threadIdx.x);
  assign_blocks<true, 1>(p.shape, num_local, first_local, is_first,
                         is_first && leaves_out<true>(p.shape, p.sort), uniform_wave_idx(),
                         blockDim.x, lds.sort, p.sort, [&](int e) { return p.counts.of(tile, e); });
  const int own_token = static_cast<int>(p.shape.by_topk.quotient(own));
  const bool has_own = own_id < static_cast<uint32_t>(p.shape.num_experts);
  if (has_own && lds.hits.set_again(own_token - tokens.first, own_id) != 0) {
    atomicOr(lds.repeats(), 1u);
  }
  __syncthreads();
  write_padding<true>(p.shape, num_local, lds.sort.tails, p.sort, tile * blockDim.x + threadIdx.x,
                      gridDim.x * blockDim.x);
  if (!has_few || *lds.repeats() != 0) {
    if (has_few) __syncthreads();  // as what all have just read is set again
    place_tokens(p, tokens, lds);  // which finds the same repeats
  } else if (has_own && lds.sort.starts[own_id] != kNoSlot) {
    const uint32_t rank = lds.hits.rank(own_token - tokens.first, own_id);
    write_entry_at(p, lds.sort.starts[own_id], rank, own, own_id, own_token, own_weight);
  }
}

}  // namespace aiter
