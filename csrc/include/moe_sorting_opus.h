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
//   1 count     a workgroup per tile: its entries per expert; zeroes its rows of moe_buf, but for those that the next
//               launch does. Left out where the launch that selected has done both
//   2 place     a workgroup per tile: sums over the tiles, blocks, its share of the padding, bits of the tile, entries to
//               start + entries of the tiles before + rank; zeroes the tile's last rows (Tiles::zeroed_first)
// Each has a team that sorts and a last wave that zeroes, which waits for nobody (device/team.h).
//
// A tile of many entries is placed in order: its ids and weights come to LDS, where the entries are listed by expert,
// token and slot; neighbouring lanes then store neighbours of the list, most of them to neighbouring slots. Placing
// M = 65,536 alone, 128/4, 256/8, 512/10, 896/16, takes 9.9, 14, 17, 28 us instead of 13, 24, 30, 48 (H100, 2026-11-27,
// the strict clock of a C++ program). Where LDS takes only parts of a tile of fewer than two entries an expert, stores
// would have no neighbours, and entries go where they belong one by one.
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
//
// Long because both ways to sort share their parts, and a tile is placed in one sequence between barriers.
#pragma once

#include "target.h"
#include "tile_counts.h"

namespace aiter {

// The launch choice is the same on every device, as the workspace size must not depend on it.
constexpr int kSortLdsWords =
    15 * 1024;  // 60 KiB: what every target gives a workgroup, less scratch
constexpr int kSortThreads = 1024;
constexpr int kTileThreads = 512;  // multi-phase

// Whether entries of a tile may be put in order in LDS before they are stored, and how few are not worth it. Nothing that
// we have tells what it would bring on AMD.
constexpr bool kOrdersEntries = !kTargetIsRocm;
constexpr int kFewEntries = 1024;

struct OpusParams {
  const int32_t* topk_ids;
  const float* topk_weights;
  SortShape shape;
  SortParams sort;
  int part_words;  // bitmask words per expert: of so many tokens at a time
  // Multi-phase only:
  TileCounts counts;
  int num_zeroed;  // of a tile's tokens, those whose rows of moe_buf the launch that counts zeroes
};

// LDS, behind the page of zeros of a launch that zeroes: totals [2][kMaxWavesPerBlock], whether a part has repeats,
// counts [E], starts [E], bitmask [part_words][E]. An expert's tail takes the place of its count.
struct OpusLds {
  uint32_t* counts;
  SortLds sort;
  HitMask hits;
  Team team;  // that sorts

  __device__ __forceinline__ uint32_t* repeats() const {
    return sort.totals + 2 * kMaxWavesPerBlock;
  }
  // Before a part; needs a barrier behind.
  __device__ __forceinline__ void clear_part() const {
    hits.clear(team.num_threads);
    if (threadIdx.x == 0) *repeats() = 0;
  }
};

__host__ __device__ inline size_t opus_lds_bytes(int num_experts, int part_words) {
  return sizeof(uint32_t) *
         (static_cast<size_t>(num_experts) * (2 + part_words) + 2 * kMaxWavesPerBlock + 1);
}

__device__ __forceinline__ OpusLds opus_lds(const OpusParams& p, char* lds_base, Team team) {
  uint32_t* const totals = reinterpret_cast<uint32_t*>(lds_base);
  uint32_t* const counts = totals + 2 * kMaxWavesPerBlock + 1;
  uint32_t* const starts = counts + p.shape.num_experts;
  return {counts,
          {starts, counts, totals},
          HitMask{starts + p.shape.num_experts, p.shape.num_experts, p.part_words},
          team};
}

constexpr uint32_t kNoExpert = 0xffffffffu;

__device__ __forceinline__ TokenRange tile_tokens(const OpusParams& p, int tile, int num_local) {
  const Tiles& tiles = p.counts.tiles;
  return tokens_there(static_cast<int64_t>(tile) * tiles.tokens, tiles.tokens, num_local);
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
__device__ __forceinline__ void for_each_entry(const OpusParams& p, Team team, EntryRange entries,
                                               F f) {
  constexpr uint32_t kAtOnce = 4;
  AITER_LOOP
  for (uint32_t first = entries.first + threadIdx.x; first < entries.last;
       first += kAtOnce * team.num_threads) {
    uint32_t ids[kAtOnce];
    AITER_UNROLL
    for (uint32_t j = 0; j < kAtOnce; ++j) {
      const uint32_t i = first + j * team.num_threads;
      ids[j] = i < entries.last ? static_cast<uint32_t>(p.topk_ids[i]) : kNoExpert;
    }
    AITER_UNROLL
    for (uint32_t j = 0; j < kAtOnce; ++j) {
      if (ids[j] < static_cast<uint32_t>(p.shape.num_experts))
        f(first + j * team.num_threads, ids[j]);
    }
  }
}

__device__ __forceinline__ void count_entries(const OpusParams& p, Team team, TokenRange tokens,
                                              uint32_t* lds_counts) {
  for_each_entry(p, team, entries_of(p, tokens),
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
  for (int e = threadIdx.x; e < p.shape.num_experts; e += lds.team.num_threads) {
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
    lds.team.sync();
    lds.hits.clear(lds.team.num_threads);
    lds.team.sync();
    for_each_entry(p, lds.team, piece, [&](uint32_t i, uint32_t expert_idx) {
      lds.hits.set(static_cast<int>(i - piece.first), expert_idx);
    });
    lds.team.sync();
    for_each_entry(p, lds.team, piece, [&](uint32_t i, uint32_t expert_idx) {
      const uint32_t start = lds.sort.starts[expert_idx];
      if (start == kNoSlot) return;
      const uint32_t rank = lds.hits.rank(static_cast<int>(i - piece.first), expert_idx);
      write_entry_at(p, start, rank, i, expert_idx, static_cast<int>(p.shape.by_topk.quotient(i)),
                     p.topk_weights[i]);
    });
    lds.team.sync();
  }
}

// A part of a tile in LDS, behind what OpusLds has: the entries' ids and weights and, in the order of expert, token and
// slot, which entry it is.
struct PartLds {
  uint32_t* ids;
  float* weights;
  uint16_t* order;
  uint32_t* firsts;  // [E] place in this order of the expert's first entry; where tails were
};

__host__ __device__ inline size_t part_lds_bytes(int part_words, int topk) {
  constexpr size_t kBytesPerEntry = sizeof(uint32_t) + sizeof(float) + sizeof(uint16_t);
  return sizeof(FourWords) + kBytesPerEntry * kTokensPerWord * part_words * topk;
}

__device__ __forceinline__ PartLds part_lds(const OpusParams& p, const OpusLds& lds,
                                            char* lds_base) {
  constexpr size_t kBoundary = sizeof(FourWords);
  const size_t taken = opus_lds_bytes(p.shape.num_experts, p.part_words);
  const int num_entries = kTokensPerWord * p.part_words * p.shape.topk;
  uint32_t* const ids =
      reinterpret_cast<uint32_t*>(lds_base + (taken + kBoundary - 1) / kBoundary * kBoundary);
  float* const weights = reinterpret_cast<float*>(ids + num_entries);
  return {ids, weights, reinterpret_cast<uint16_t*>(weights + num_entries), lds.sort.tails};
}

// Copies words to LDS, by a team: four at a time if they begin on a 16-byte boundary, as `to` does.
__device__ __forceinline__ void copy_words(Team team, uint32_t* to, const uint32_t* from,
                                           uint32_t count) {
  constexpr uint32_t kAtOnce = 4;
  const uint32_t num_threads = team.num_threads;
  const bool is_wide = reinterpret_cast<uintptr_t>(from) % sizeof(FourWords) == 0;
  const uint32_t num_wide = is_wide ? count / 4 : 0;
  AITER_LOOP
  for (uint32_t first = threadIdx.x; first < num_wide; first += kAtOnce * num_threads) {
    FourWords words[kAtOnce];
    AITER_UNROLL
    for (uint32_t j = 0; j < kAtOnce; ++j) {
      const uint32_t i = first + j * num_threads;
      if (i < num_wide) words[j] = reinterpret_cast<const FourWords*>(from)[i];
    }
    AITER_UNROLL
    for (uint32_t j = 0; j < kAtOnce; ++j) {
      const uint32_t i = first + j * num_threads;
      if (i < num_wide) reinterpret_cast<FourWords*>(to)[i] = words[j];
    }
  }
  AITER_LOOP
  for (uint32_t i = 4 * num_wide + threadIdx.x; i < count; i += num_threads) to[i] = from[i];
}

__device__ __forceinline__ void copy_part(const OpusParams& p, TokenRange tokens,
                                          const OpusLds& lds, const PartLds& part) {
  const EntryRange entries = entries_of(p, tokens);
  const uint32_t count = entries.last - entries.first;
  copy_words(lds.team, part.ids, reinterpret_cast<const uint32_t*>(p.topk_ids) + entries.first,
             count);
  copy_words(lds.team, reinterpret_cast<uint32_t*>(part.weights),
             reinterpret_cast<const uint32_t*>(p.topk_weights) + entries.first, count);
}

// Gives the experts the places of their first entries in the order of a part, those with a start. Returns how many entries
// these have. Needs a barrier behind.
__device__ __forceinline__ uint32_t find_firsts(const OpusParams& p, const OpusLds& lds,
                                                const PartLds& part) {
  const int num_experts = p.shape.num_experts, num_threads = lds.team.num_threads;
  const int per_thread = (num_experts + num_threads - 1) / num_threads;
  const int first = per_thread * static_cast<int>(threadIdx.x);
  const int last = first + per_thread < num_experts ? first + per_thread : num_experts;
  uint32_t sum = 0;
  AITER_LOOP
  for (int e = first; e < last; ++e) {
    const uint32_t count = lds.sort.starts[e] == kNoSlot ? 0 : lds.hits.count(e);
    part.firsts[e] = count;
    sum += count;
  }
  WavePrefix places = wave_prefix_sum(sum);
  post_total(lds.sort.totals, places);
  lds.team.sync();
  places = over_workgroup(lds.sort.totals, num_threads / kWaveSize, places);
  uint32_t place = places.below;
  AITER_LOOP
  for (int e = first; e < last; ++e) {
    const uint32_t count = part.firsts[e];
    part.firsts[e] = place;
    place += count;
  }
  return places.total;
}

// As place_part(), of a part that copy_part() has copied and everybody sees. Neighbouring lanes write neighbouring entries
// of the part's order, most of them to neighbouring slots.
__device__ __forceinline__ void place_in_order(const OpusParams& p, TokenRange tokens,
                                               const OpusLds& lds, const PartLds& part) {
  const EntryRange entries = entries_of(p, tokens);
  const uint32_t count = entries.last - entries.first;
  const uint32_t num_experts = p.shape.num_experts, num_threads = lds.team.num_threads;
  uint32_t repeats = 0;
  AITER_LOOP
  for (uint32_t i = threadIdx.x; i < count; i += num_threads) {
    const uint32_t expert_idx = part.ids[i];
    if (expert_idx >= num_experts) continue;
    repeats |= lds.hits.set_again(static_cast<int>(p.shape.by_topk.quotient(i)), expert_idx);
  }
  if (repeats != 0) atomicOr(lds.repeats(), 1u);
  lds.team.sync();
  if (*lds.repeats() != 0) {
    place_repeats(p, entries, lds);
    return;
  }
  const uint32_t num_ordered = find_firsts(p, lds, part);
  lds.team.sync();
  AITER_LOOP
  for (uint32_t i = threadIdx.x; i < count; i += num_threads) {
    const uint32_t expert_idx = part.ids[i];
    if (expert_idx >= num_experts || lds.sort.starts[expert_idx] == kNoSlot) continue;
    const uint32_t rank = lds.hits.rank(p.shape.by_topk.quotient(i), expert_idx);
    part.order[part.firsts[expert_idx] + rank] = static_cast<uint16_t>(i);
  }
  lds.team.sync();
  AITER_LOOP
  for (uint32_t place = threadIdx.x; place < num_ordered; place += num_threads) {
    const uint32_t i = part.order[place];
    const uint32_t expert_idx = part.ids[i];
    const int token = tokens.first + static_cast<int>(p.shape.by_topk.quotient(i));
    write_entry_at(p, lds.sort.starts[expert_idx], place - part.firsts[expert_idx],
                   entries.first + i, expert_idx, token, part.weights[i]);
  }
}

// Writes the entries of these tokens behind the starts. clear_part() must be done, and all threads there. Starts
// and bitmask are such that advance_starts() makes them those of the next part.
__device__ __forceinline__ void place_part(const OpusParams& p, TokenRange tokens,
                                           const OpusLds& lds) {
  const EntryRange entries = entries_of(p, tokens);
  uint32_t repeats = 0;
  for_each_entry(p, lds.team, entries, [&](uint32_t i, uint32_t expert_idx) {
    const int token = static_cast<int>(p.shape.by_topk.quotient(i)) - tokens.first;
    repeats |= lds.hits.set_again(token, expert_idx);
  });
  if (repeats != 0) atomicOr(lds.repeats(), 1u);
  lds.team.sync();
  if (*lds.repeats() != 0) {
    place_repeats(p, entries, lds);
    return;
  }
  for_each_entry(p, lds.team, entries, [&](uint32_t i, uint32_t expert_idx) {
    const uint32_t start = lds.sort.starts[expert_idx];
    if (start == kNoSlot) return;
    const int token = static_cast<int>(p.shape.by_topk.quotient(i));
    write_entry_at(p, start, lds.hits.rank(token - tokens.first, expert_idx), i, expert_idx, token,
                   p.topk_weights[i]);
  });
}

// Writes the entries of a range of tokens behind the starts, in parts, each by place(tokens). clear_part() must be done,
// and all threads there.
template <typename Place>
__device__ __forceinline__ void place_parts(const OpusParams& p, TokenRange tokens,
                                            const OpusLds& lds, Place place) {
  const int per_part = p.part_words * kTokensPerWord;
  AITER_LOOP
  for (int64_t first = tokens.first; first < tokens.last; first += per_part) {
    if (first > tokens.first) {
      lds.team.sync();
      advance_starts(p, lds);
      lds.team.sync();
      lds.clear_part();
      lds.team.sync();
    }
    place(tokens_there(first, per_part, tokens.last));
  }
}

__device__ __forceinline__ void sort_in_one_block(const OpusParams& p, int num_local,
                                                  char* lds_base) {
  const Team team{static_cast<int>(blockDim.x)};
  const OpusLds lds = opus_lds(p, lds_base, team);
  for (int e = threadIdx.x; e < p.shape.num_experts; e += blockDim.x) lds.counts[e] = 0;
  lds.clear_part();
  __syncthreads();
  count_entries(p, team, {0, num_local}, lds.counts);
  __syncthreads();
  const uint32_t first_local = local_experts<true, 1>(p.shape, p.sort.expert_mask, threadIdx.x);
  assign_blocks<true, 1>(p.shape, num_local, first_local, true, leaves_out<true>(p.shape, p.sort),
                         uniform_wave_idx(), blockDim.x, lds.sort, p.sort,
                         [&](int e) { return ExpertCounts<1>{{lds.counts[e]}, {0}}; });
  __syncthreads();
  write_padding<true>(p.shape, num_local, lds.sort.tails, p.sort, threadIdx.x, blockDim.x);
  place_parts(p, {0, num_local}, lds, [&](TokenRange part) { place_part(p, part, lds); });
}

__global__ void AITER_LAUNCH_BOUNDS(kSortThreads) moe_sorting_oneshot_kernel(OpusParams p) {
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

// The team that counts or places, in a launch whose last wave zeroes if `zeroes`.
__device__ __forceinline__ Team tile_team(bool zeroes) {
  return {static_cast<int>(blockDim.x) - (zeroes ? kWaveSize : 0)};
}

__global__ void AITER_LAUNCH_BOUNDS(kTileThreads) moe_sorting_count_kernel(OpusParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  const TileCounter counter(p.counts, lds_base);
  counter.begin();
  wait_for_earlier_launch();
  let_next_launch_begin();
  const int num_local = local_tokens(p.sort.num_local_tokens, p.shape.num_tokens);
  const TokenRange tokens = tile_tokens(p, blockIdx.x, num_local);
  const Team team = tile_team(true);
  if (static_cast<int>(threadIdx.x) >= team.num_threads) {
    counter.zero(p.sort.moe_buf, p.sort.row_bytes,
                 tokens_there(tokens.first, p.num_zeroed, num_local));
    return;
  }
  count_entries(p, team, tokens, counter.counts);
  counter.finish(team);
}

// Places the entries of the tile blockIdx.x.
template <bool kInOrder>
__device__ __forceinline__ void place_tile(const OpusParams& p, char* lds_base) {
  const int tile = blockIdx.x;
  const bool is_first = tile == 0;
  const bool zeroes = p.num_zeroed < p.counts.tiles.tokens;
  const Team team = tile_team(zeroes);
  char* const own_lds = lds_base + (zeroes ? kZeroPageBytes : 0);
  const OpusLds lds = opus_lds(p, own_lds, team);
  if (zeroes) {
    fill_zero_page(lds_base);
    __syncthreads();
  }
  if (static_cast<int>(threadIdx.x) >= team.num_threads) {
    // NOTE: does not wait for the launch before, which began behind all that came before it, and leaves these rows alone.
    const TokenRange tokens =
        tile_tokens(p, tile, local_tokens(p.sort.num_local_tokens, p.shape.num_tokens));
    zero_rows(p.sort.moe_buf, p.sort.row_bytes, {tokens.first + p.num_zeroed, tokens.last},
              lds_base);
    return;
  }
  lds.clear_part();
  wait_for_earlier_launch();
  let_next_launch_begin();
  const int num_local = local_tokens(p.sort.num_local_tokens, p.shape.num_tokens);
  const TokenRange tokens = tile_tokens(p, tile, num_local);
  // Of few entries each thread has one, which is on its way while experts get their blocks.
  const EntryRange entries = entries_of(p, tokens);
  const bool has_few = !kInOrder && tokens.last - tokens.first <= p.part_words * kTokensPerWord &&
                       entries.last - entries.first <= static_cast<uint32_t>(team.num_threads);
  const uint32_t own = entries.first + threadIdx.x;
  uint32_t own_id = kNoExpert;
  float own_weight = 0.0f;
  if (has_few && tokens.first < tokens.last && own < entries.last) {
    own_id = static_cast<uint32_t>(p.topk_ids[own]);
    own_weight = p.topk_weights[own];
  }
  const PartLds part = part_lds(p, lds, own_lds);
  if (kInOrder && tokens.first < tokens.last) {
    copy_part(p, tokens_there(tokens.first, p.part_words * kTokensPerWord, tokens.last), lds, part);
  }
  const uint32_t first_local = local_experts<true, 1>(p.shape, p.sort.expert_mask, threadIdx.x);
  assign_blocks<true, 1>(
      p.shape, num_local, first_local, is_first, is_first && leaves_out<true>(p.shape, p.sort),
      uniform_wave_idx(), team.num_threads, lds.sort, p.sort,
      [&](int e) { return p.counts.of(tile, e); }, [&] { team.sync(); });
  const int own_token = static_cast<int>(p.shape.by_topk.quotient(own));
  const bool has_own = own_id < static_cast<uint32_t>(p.shape.num_experts);
  if (has_own && lds.hits.set_again(own_token - tokens.first, own_id) != 0) {
    atomicOr(lds.repeats(), 1u);
  }
  team.sync();
  write_padding<true>(p.shape, num_local, lds.sort.tails, p.sort,
                      tile * team.num_threads + threadIdx.x, gridDim.x * team.num_threads);
  if constexpr (kInOrder) {
    place_parts(p, tokens, lds, [&](TokenRange of_part) {
      if (of_part.first > tokens.first) {
        copy_part(p, of_part, lds, part);
        team.sync();
      }
      place_in_order(p, of_part, lds, part);
    });
  } else if (!has_few || *lds.repeats() != 0) {
    if (has_few) team.sync();  // as what all have just read is set again
    place_parts(p, tokens, lds, [&](TokenRange of_part) {
      place_part(p, of_part, lds);  // which finds the same repeats
    });
  } else if (has_own && lds.sort.starts[own_id] != kNoSlot) {
    const uint32_t rank = lds.hits.rank(own_token - tokens.first, own_id);
    write_entry_at(p, lds.sort.starts[own_id], rank, own, own_id, own_token, own_weight);
  }
}

template <bool kInOrder>
__global__ void AITER_LAUNCH_BOUNDS(kTileThreads + kMaxWaveSize)
    moe_sorting_place_kernel(OpusParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  place_tile<kInOrder>(p, lds_base);
}

}  // namespace aiter
