// Softmax, top-k, block-padded sort by expert and moe_buf zeroing in one launch.
//
//   gating  [M, E] f32/f16/bf16, inner stride 1, rows `row_stride` items apart
//   sorted_ids, sorted_weights [M*K + E*B - K], sorted_expert_ids [that / B], num_valid_ids [2]
//   moe_buf [n * D] items, rows below n zeroed
//
// Long because of what was measured and rejected, and because all phases are a workgroup's, which has one state.
//
// The first workgroups route, all others zero moe_buf. On targets that have clusters (cluster.h) up
// to 16 workgroups route, each a range of rows of its own; elsewhere one, or up to 64 that select, each from a
// range of rows, and hand over to the last of them, which sorts alone. Phases of a routing workgroup, with a
// barrier between them:
//   1 clear    all threads     the bitmask: before memory is touched where an earlier launch may still run, and
//                              elsewhere while the logits are on their way
//   2 top-k    a wave per row or a few (key_topk.h, group_topk.h, row_topk.h)   slot k: expert, weight and hit bits into LDS
// then, in a workgroup that routes alone while n <= B (single_blocks.h),
//   3 padding  all threads     all blocks, whole
//   4 entries  a thread each   over the padding; expert ids
// and otherwise
//   3 assign   a thread per one or two experts   counts of the experts, popcounts of their columns or, in a cluster, what
//                              top-k has counted and sends to all workgroups; blocks for the experts, by all alike
//   4 write    all threads     own entries to start + rank, in a cluster with the expert ids of their blocks; its
//                              share of the padding
//
// Three or four barriers in all, and none for a single token (one_token.h); in a cluster there are two waits
// more, the first of which is over during top-k. What workgroups of a cluster tell each other is one count per
// expert, through LDS.
//
// A hand-over (device/handover.h) comes between 2 and 3: ids and weights of all slots of a row, by rule or not, go
// from LDS to the first M*K places of sorted_ids and sorted_weights, which nobody has written yet, and the last
// workgroup has those of all rows, and their hit bits, in LDS before it writes there. What it leaves behind
// num_valid_ids[0] is undefined. Beside the outputs workgroups share a ticket, which is the stream's or the
// record's own: launches on several streams and graphs that are replayed at the same time do not meet. top-k
// outputs are each workgroup's own rows. LDS has to hold all rows; and in the slot format with zero experts, where
// E*B < K leaves fewer than M*K places, nothing is handed over, by choice or as an error if asked for.
//
// Before its first load of logits a kernel knows 14 words of arguments (FusedFirst), which it has loaded at once or,
// on gfx942 and gfx950, has found in registers. num_local_tokens, the mask and the other arguments are loaded at
// the same time as logits, and what is asked for behind top-k is loaded again, for 60 cycles, rather than kept.
// By the timing model of op_tests/rocm (gfx942, 128/4, bf16, us for M = 1, 4, 16, 64, 122): arguments in one
// struct, up to four loads one behind the other 2.20, 2.58, 2.64, 4.29, 6.33; arguments loaded at once 1.61 (M = 1),
// 2.38 (4), 2.44 (16), 4.34 (64); the number of threads from an argument too, which blockDim.x is not (485 cycles
// behind top-k), and loops that are not interleaved 1.62, 2.14, 2.20, 3.94. The first load is issued in cycle 196
// there instead of 1272 to 1617. Rejected: padding of all slots that may come to be used, by waves without rows
// while others select (2.11, 2.14, 3.92 us for M = 4, 16, 64, beside 2.18, 2.24 and 4.12 without it in the same
// state of the rest): it writes behind num_valid_ids[0]. docs/rocm.md has the cycles of every phase.
//
// LDS of a workgroup with m rows: totals or sets of experts 256, inbox 16, bitmask 4*E*ceil(m/32), starts
// and tails 8*E, in a cluster of C 2*C*E for counts, weights 4*m*K, experts 2*m*K bytes, E rounded up to a
// multiple of 4 (of 8 for counts), and 24 bytes a thread where top-k is by keys. For E=128, K=4, 64 KiB and one workgroup that is M up to 1600; max_tokens() tells.
//
// What steps brought, in us per call on an H100 (graph slope, bf16, 2026-11-23), by the best number of
// workgroups:
//                                              E=128 K=4, M =  1     64    1024   E=256 K=8  1     64    1024
//   a wave per row, a step per winner, up to 8 workgroups   2.41   4.11   12.39             2.76   4.82   19.08
//   no fence behind "all have started"                      2.43   3.73   11.90             2.78   4.50   18.55
//   up to 16 workgroups                                     2.43   3.73    8.54             2.78   4.50   12.45
//   rows in groups of lanes, single blocks, inboxes         2.08   2.93    5.23             2.36   3.30    9.58
//   LDS cleared before waiting for the launch before;
//     entries to threads without experts                    1.77   2.52    4.74             2.06   3.16    8.02
//   NaN and -0 found by floating-point instructions         1.66   2.45    4.47             1.97   3.11    7.43
//   one token in registers, hit experts set during top-k    1.34   2.39    4.93             1.42   2.99    7.35
//   hit experts set only where they may be asked for        1.33   2.44    4.51             1.45   3.04    7.43
//
// Counts of a cluster by LDS atomics during top-k, two in a word, instead of popcounts behind it that each wave makes
// for a receiver; two experts a thread where there are many; expert ids with the entries (strict clock, 2026-11-27; bits unchanged):
//   E=896 K=16, M = 1, 16, 64, 256   2.90 6.47 7.68 10.3 -> 3.07 5.59 6.85 8.6
//   E=512 K=10                       2.58 4.83 5.59 7.20 -> 2.58 4.47 5.03 6.3
//   E=256 K=8                        1.92 3.21 3.67 4.66 -> 1.88 3.16 3.34 4.3
//   E=128 K=4                        1.70 2.28 3.03 3.42 -> 1.66 2.18 3.02 3.37
// What is sent takes about 0.1 cycles a byte: words took 2,300 cycles for 8 workgroups and 5,200 for 16 with E=896.
// Bytes instead of halves: 8.3 us for E=896, M = 256, but more to unpack, 3.67 for E=128, M = 64.
// The mask's words are not so much as compared before top-k where there is no mask (DeepSeek-V3's rule, M = 1: 3.15
// -> 3.05).
// Rejected: kernels with all arguments in one struct on targets that have no argument registers (1.71 -> 1.75 us for
// E=128, M = 1, 2.88 -> 3.20 for E=896: nvcc then loads them where they are used).
//
// Rejected: more waves than rows, experts and entries need (32 instead of 4 to 12: 2.08 -> 2.48 us, M=1);
// 2 or 4 workgroups, which talk as long as 8 do; all compute units and a ticket or a barrier in global memory
// (0.9 us for the hand-over alone, 128 workgroups, and state that has to be reset); rereading code for a cold
// instruction cache as the culprit (running everything twice in a launch took the same time both times);
// a step per winner where one wave has all rows (1.60 -> 1.72 us, M=4); finding the first row's address before
// waiting for the launch before, held there by a prefetch (2.40 -> 2.48 us, M=64); leaving the loop over
// rows from within (1.51 -> 1.65 us, M=4; nvcc then has parts of it twice); kernels for which E, K, B and
// the absence of a mask are constants, rendered for a list of shapes (1.36 -> 1.38 us for M=1, 1.52 -> 1.37 for
// M=4, 2.40 -> 2.34 for M=64, 6.87 -> 6.58 for M=2048, for a kernel more per shape and dtype); more zeroing
// workgroups than compute units (4.55 -> 4.50 us, M=1024, which takes 4.45 with nothing to zero).
#pragma once

#include "device/cluster.h"
#include "device/handover.h"
#include "expert_sort.h"
#include "key_topk.h"
#include "one_token.h"
#include "single_blocks.h"

namespace aiter {

// Where a routing workgroup keeps what in LDS, as byte offsets; the rest follows from the number of rows. Those that
// the first instructions need are the same in all launches.
struct FusedLds {
  static constexpr uint32_t kTotals = 0;
  static constexpr uint32_t kInbox = kTotals + sizeof(uint32_t) * 2 * kMaxWavesPerBlock;
  static constexpr uint32_t kHits = kInbox + 16;
  uint32_t counts, rows, weights;
};

// Everything the launch choice depends on, and the choice.
struct FusedConfig {
  int tokens_per_block;
  FusedLds lds;
  LaunchShape launch;
};

// What a kernel needs before its logits are on their way. These are arguments of their own and the first ones, 14
// words in all, so that they can be there when the kernel begins (aiter/jit/rocm_flags.py).
struct FusedFirst {
  const void* gating;
  int64_t row_stride;               // in items of the class of rows
  const int32_t* num_local_tokens;  // as in SortParams, and so is
  const int32_t* expert_mask;       // this one
  int num_tokens, num_experts;      // as in SortShape, and so is
  int topk;                         // this one
  int tokens_per_block;             // of each routing workgroup
  int num_threads;                  // of a workgroup
  uint32_t flags;                   // kNeedRenorm ... kDrops; LogitType << 6; num_routing << 8

  static constexpr uint32_t kNeedRenorm = 1;
  static constexpr uint32_t kWideRows = 2;   // RowFormat::wide
  static constexpr uint32_t kOneToken = 4;   // the case of one_token.h
  static constexpr uint32_t kHandsOver = 8;  // workgroups hand over through memory
  static constexpr uint32_t kDrops = 16;     // experts that are left out have no blocks
  static constexpr int kTypeShift = 6, kRoutingShift = 8;
  __device__ __forceinline__ bool is(uint32_t flag) const { return (flags & flag) != 0; }
  __device__ __forceinline__ bool hands_over() const { return kCanHandOver && is(kHandsOver); }
  __device__ __forceinline__ RowFormat row_format() const {
    return {is(kWideRows) ? 1u : 0u, static_cast<LogitType>(flags >> kTypeShift & 3)};
  }
  // Workgroups that route.
  __device__ __forceinline__ int num_routing() const {
    return static_cast<int>(flags >> kRoutingShift);
  }
  // Rows that a routing workgroup keeps in LDS: its own, or all, of which any may be the last.
  __device__ __forceinline__ int lds_rows() const {
    return hands_over() ? num_tokens : tokens_per_block;
  }
};

// The rest, which comes while logits do.
struct FusedParams {
  SortShape shape;
  SortParams sort;
  FusedLds lds;
  uint32_t* ticket;  // for kHandsOver
};

// E rounded up, so that what LDS holds of all experts ends on a 16-byte boundary.
__host__ __device__ constexpr int padded_experts(int num_experts) {
  return static_cast<int>((static_cast<uint32_t>(num_experts) + 3) / 4 * 4);
}

// Experts that a thread gives their blocks.
template <typename Rows>
constexpr int kExpertsPerThread = experts_per_thread(Rows::kPlaces, kWaveSize);

// Words of a workgroup's counts, two in a word, which are sent four words at a time. Sums over a cluster are of no
// more bits, so that its tokens are at most kMaxClusterTokens.
__host__ __device__ constexpr int counts_stride(int num_experts) {
  return static_cast<int>((static_cast<uint32_t>(num_experts) + 7) / 8 * 4);
}
constexpr int kMaxClusterTokens = 0xffff;

struct FusedLdsPlan {
  FusedLds lds;
  size_t total;  // bytes
};

// `row_bytes`: of all waves, for what top-k keeps of rows.
inline FusedLdsPlan plan_fused_lds(int num_rows, int num_experts, int topk, int cluster_size,
                                   int row_bytes) {
  const size_t num_entries = static_cast<size_t>(num_rows) * topk;
  const size_t per_expert = sizeof(uint32_t) * padded_experts(num_experts);
  // Behind the bitmask the starts and the tails.
  size_t end = FusedLds::kHits + per_expert * (hit_words(num_rows) + 2);
  const auto take = [&end](size_t bytes) {
    const size_t begin = end;
    end += bytes;
    return static_cast<uint32_t>(begin);
  };
  FusedLdsPlan plan;
  const size_t counts_bytes = sizeof(uint32_t) * counts_stride(num_experts);
  plan.lds.counts = take(cluster_size > 1 ? counts_bytes * cluster_size : 0);
  plan.lds.rows = take(row_bytes);  // on a 16-byte boundary, as all before
  plan.lds.weights = take(sizeof(float) * num_entries);
  take(sizeof(uint16_t) * num_entries);  // experts
  plan.total = (end + 15) / 16 * 16;
  return plan;
}

// Where wave_topk leaves the winners of one row.
struct FusedSink {
  uint16_t* experts;  // [K] of this row
  float* weights;
  HitMask hits;
  ExpertSet hit_experts;
  uint32_t* counts;  // in a cluster the workgroup's own, else null
  int num_rows, block_size;
  int row;     // of the workgroup's num_rows
  Entry last;  // that this lane put

  __device__ __forceinline__ void put(int k, uint32_t expert_idx, float weight) {
    last = {expert_idx, row, k, weight};
    experts[k] = static_cast<uint16_t>(expert_idx);
    weights[k] = weight;
    hits.set(row, expert_idx);
    if (kMaxClusterSize > 1 && counts != nullptr) {
      atomicAdd(&counts[expert_idx / 2], 1u << 16 * (expert_idx % 2));
    }
    // The set is asked for in fewer cases; to tell exactly which makes compilers double what comes behind.
    if (num_rows <= anew(block_size)) hit_experts.add(expert_idx);
  }
  __device__ __forceinline__ void divide(int k, float denominator) { weights[k] /= denominator; }
};

// The counts [C][E] of a cluster's workgroups, two in a word, which each sends to all others.
struct ClusterCounts {
  uint32_t* lds_counts;  // [C][stride]
  Inbox* inbox;
  int stride, rank, size;

  __device__ __forceinline__ uint32_t* own() const { return lds_counts + rank * stride; }
  __device__ __forceinline__ void clear_own(int num_threads) const {
    AITER_LOOP
    for (int i = threadIdx.x; i < stride; i += num_threads) own()[i] = 0;
  }
  __device__ __forceinline__ uint32_t expected_bytes() const {
    return sizeof(uint32_t) * stride * (size - 1);
  }
  // Every wave has its receivers, every lane its words.
  __device__ __forceinline__ void exchange(int wave, int num_threads) const {
    const int num_waves = num_threads / kWaveSize;
    FourWords* const words = reinterpret_cast<FourWords*>(own());
    AITER_LOOP
    for (int to = wave; to < size; to += num_waves) {
      if (to == rank) continue;
      AITER_LOOP
      for (int i = lane_idx(); i < stride / 4; i += kWaveSize) {
        cluster_send(words + i, inbox, to, words[i]);
      }
    }
    wait_for_inbox(inbox);
  }
  // Of the experts e ... e + kAtOnce - 1, which are in a word.
  template <int kAtOnce>
  __device__ __forceinline__ ExpertCounts<kAtOnce> of(int e) const {
    constexpr int kLoads = 8;
    const uint32_t* const column = lds_counts + e / 2;
    uint32_t sum = 0, before = 0;
    int r = 0;
    AITER_LOOP
    for (; r + kLoads <= size; r += kLoads) {
      uint32_t two[kLoads];
      AITER_UNROLL
      for (int i = 0; i < kLoads; ++i) two[i] = column[(r + i) * stride];
      AITER_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        if (r + i == rank) before = sum;
        sum += two[i];
      }
    }
    AITER_LOOP
    for (; r < size; ++r) {
      if (r == rank) before = sum;
      sum += column[r * stride];
    }
    ExpertCounts<kAtOnce> counts;
    AITER_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int shift = 16 * ((e + i) % 2);
      counts.total[i] = sum >> shift & 0xffff;
      counts.before[i] = before >> shift & 0xffff;
    }
    return counts;
  }
};

// A routing workgroup, and what it clears in LDS.
struct RoutingBlock {
  int rank, cluster_size;
  int wave;
  int first_token, num_rows;  // rows that count
  int lds_rows;               // that LDS has a place for
  int num_local;
  int num_threads;
  HitMask hits;
  SingleBlocks sets;
  ClusterCounts counts;

  __device__ __forceinline__ bool is_alone() const {
    return kMaxClusterSize == 1 || cluster_size == 1;
  }
  template <typename Weight>
  __device__ __forceinline__ uint16_t* experts_behind(Weight* lds_weights, int topk) const {
    return reinterpret_cast<uint16_t*>(const_cast<float*>(lds_weights + lds_rows * topk));
  }
};

// What a kernel of plain softmax and the slot format has beside FusedParams, of which there is nothing; see
// fused_topk_moe_sorting_rules.h for the other kind.
struct NoRule {
  static constexpr bool kAnySort = false;  // kAny of expert_sort.h
  using Sink = FusedSink;

  template <typename Rows>
  __device__ __forceinline__ void set(Rows&) const {}
  __device__ __forceinline__ Sink sink(const FusedSink& of_rows, int) const { return of_rows; }
};

// Phases 3 to 5. The same for all kernels, so compilers that do not inline everything have it once.
template <bool kAny, int kAtOnce>
__device__ inline void sort_rows(const FusedParams& p, const RoutingBlock& block,
                                 uint32_t first_local, char* lds_base) {
  const auto words = [&](uint32_t offset) {
    return reinterpret_cast<uint32_t*>(lds_base + offset);
  };
  const float* const lds_weights = reinterpret_cast<float*>(lds_base + p.lds.weights);
  const uint16_t* const lds_experts = block.experts_behind(lds_weights, p.shape.topk);
  const int topk = p.shape.topk;
  const int num_entries = block.num_rows * topk;
  const HitMask& hits = block.hits;
  const auto entry_at = [&](int i) {
    const int row = static_cast<int>(p.shape.by_topk.quotient(i));
    return Entry{lds_experts[i], block.first_token + row, i - row * topk, lds_weights[i]};
  };
  const bool has_single_blocks = block.is_alone() && block.num_local <= p.shape.block_size &&
                                 p.shape.num_experts <= kMaxSetExperts;
  if (has_single_blocks) {
    write_single_blocks<kAny>(p.shape, block.num_local, hits, block.sets, p.sort, num_entries,
                              block.num_threads, entry_at);
    return;
  }

  uint32_t* const lds_starts = hits.words + hits.stride * hits.num_words;
  const SortLds sort_lds{lds_starts, lds_starts + hits.stride, words(FusedLds::kTotals)};
  const bool is_alone = block.is_alone();
  if (!is_alone) {
    cluster_wait();  // all workgroups have started
    block.counts.exchange(block.wave, block.num_threads);
  }
  const bool is_first = block.rank == 0;
  const bool has_mask = leaves_out<kAny>(p.shape, p.sort);
  const bool ids_with_entries = !is_alone && !has_mask;
  assign_blocks<kAny, kAtOnce>(
      p.shape, block.num_local, first_local, is_first, is_first && !ids_with_entries, block.wave,
      block.num_threads, sort_lds, p.sort, [&](int e) {
        return is_alone ? hits.template counts<kAtOnce>(e) : block.counts.template of<kAtOnce>(e);
      });
  __syncthreads();

  AITER_LOOP
  for (int i = threadIdx.x; i < num_entries; i += block.num_threads) {
    const Entry entry = entry_at(i);
    const uint32_t start = sort_lds.starts[entry.expert_idx];
    if (start == kNoSlot) continue;
    const int row = entry.token - block.first_token;
    const uint32_t slot = start + hits.rank(row, entry.expert_idx);
    write_entry_and_id<kAny>(p.shape, p.sort, slot, entry, ids_with_entries);
  }
  // The last threads pad first, as the first ones have most of the entries.
  write_padding<kAny>(p.shape, block.num_local, sort_lds.tails, p.sort,
                      (block.cluster_size - block.rank) * block.num_threads - 1 - threadIdx.x,
                      block.cluster_size * block.num_threads);
}

// `place`: of the workgroup among those that route.
template <bool kAny>
__device__ __forceinline__ RoutingBlock routing_block(const FusedFirst& first, const FusedParams& p,
                                                      int place, char* lds_base) {
  const auto words = [&](uint32_t offset) {
    return reinterpret_cast<uint32_t*>(lds_base + offset);
  };
  RoutingBlock block;
  const bool is_clustered = kMaxClusterSize > 1 && !first.hands_over();
  block.cluster_size = is_clustered ? first.num_routing() : 1;
  block.rank = is_clustered ? place : 0;
  block.wave = uniform_wave_idx();
  block.num_threads = workgroup_threads(first.num_threads);
  block.first_token = place * first.tokens_per_block;
  block.lds_rows = first.lds_rows();
  block.hits = {words(FusedLds::kHits), padded_experts(first.num_experts),
                hit_words(block.lds_rows)};
  block.sets = SingleBlocks::in(words(FusedLds::kTotals),
                                kAny ? first.is(FusedFirst::kDrops) : first.expert_mask != nullptr);
  if (kMaxClusterSize > 1) {
    block.counts = {words(p.lds.counts), reinterpret_cast<Inbox*>(words(FusedLds::kInbox)),
                    counts_stride(first.num_experts), block.rank, block.cluster_size};
  }
  return block;
}

// Clears what top-k sets in LDS, and opens the inbox: all that needs no memory.
__device__ __forceinline__ void clear_lds(const FusedFirst& first, const RoutingBlock& block) {
  const bool is_alone = block.is_alone();
  if (!is_alone) {
    if (threadIdx.x == 0) open_inbox(block.counts.inbox);
    cluster_arrive();
    block.counts.clear_own(block.num_threads);
  }
  if (!first.is(FusedFirst::kOneToken)) {
    block.hits.clear(block.num_threads);
    block.sets.clear();
    __syncthreads();
  }
  if (!is_alone && threadIdx.x == 0) {
    expect_bytes(block.counts.inbox, block.counts.expected_bytes());
  }
}

// Leaves what top-k has found in memory, in the slots of the outputs that nobody has written yet. True in the
// last workgroup, which then has the rows of all in LDS, where its own ones are.
__device__ __forceinline__ bool take_over(const FusedParams& p, RoutingBlock& block,
                                          int num_routing, char* lds_base) {
  const uint32_t topk = p.shape.topk;
  float* const lds_weights = reinterpret_cast<float*>(lds_base + p.lds.weights);
  uint16_t* const lds_experts = block.experts_behind(lds_weights, topk);
  const uint32_t first_own = block.first_token * topk;
  const uint32_t behind_own = first_own + block.num_rows * topk;
  __syncthreads();
  AITER_LOOP
  for (uint32_t i = first_own + threadIdx.x; i < behind_own; i += block.num_threads) {
    p.sort.sorted_ids[i] = lds_experts[i];
    p.sort.sorted_weights[i] = lds_weights[i];
  }
  release_to_device();
  __syncthreads();
  uint32_t* const lds_is_last = reinterpret_cast<uint32_t*>(lds_base + FusedLds::kInbox);
  const uint32_t last = static_cast<uint32_t>(num_routing) - 1;
  if (threadIdx.x == 0) *lds_is_last = arrive(p.ticket, num_routing) == last ? 1 : 0;
  __syncthreads();
  if (*lds_is_last == 0) return false;
  acquire_from_device();

  block.first_token = 0;
  block.num_rows = block.num_local;
  constexpr uint32_t kAtOnce = 4;
  const uint32_t num_entries = block.num_rows * topk;
  AITER_LOOP
  for (uint32_t first = threadIdx.x; first < num_entries; first += kAtOnce * block.num_threads) {
    uint32_t experts[kAtOnce], weights[kAtOnce];
    AITER_UNROLL
    for (uint32_t j = 0; j < kAtOnce; ++j) {
      const uint32_t i = first + j * block.num_threads;
      const uint32_t there = i < num_entries ? i : first;
      experts[j] = static_cast<uint32_t>(p.sort.sorted_ids[there]);
      weights[j] = bit_cast<uint32_t>(p.sort.sorted_weights[there]);
    }
    AITER_UNROLL
    for (uint32_t j = 0; j < kAtOnce; ++j) {
      // NOTE: also where they are not used: what leaves this loop in flight is waited for by workgroups
      // that never come here, together with their stores.
      const uint32_t expert_idx = awaited(experts[j]);
      const float weight = bit_cast<float>(awaited(weights[j]));
      const uint32_t i = first + j * block.num_threads;
      if (i < num_entries) {
        lds_experts[i] = static_cast<uint16_t>(expert_idx);
        lds_weights[i] = weight;
        block.hits.set(static_cast<int>(p.shape.by_topk.quotient(i)), expert_idx);
        if (block.num_rows <= p.shape.block_size) block.sets.hit.add(expert_idx);
      }
    }
  }
  return true;
}

template <typename Rows, typename Rule>
__device__ __forceinline__ void route(const FusedFirst& first, const FusedParams& p,
                                      const Rule& rule, int place, char* lds_base) {
  constexpr bool kAny = Rule::kAnySort;
  constexpr int kAtOnce = kExpertsPerThread<Rows>;
  RoutingBlock block = routing_block<kAny>(first, p, place, lds_base);
  const int rows_there = first.num_tokens - block.first_token;
  const int last_row = rows_there - 1;
  const auto row_at = [&](int row) {
    const uint32_t token = block.first_token + (row < last_row ? row : last_row);
    return static_cast<const typename Rows::Item*>(first.gating) + token * first.row_stride;
  };
  int first_row = block.wave * Rows::kRowsPerWave;
  const int own_row = Rows::row_in_wave();
  if (kLaunchesOverlap) clear_lds(first, block);
  wait_for_earlier_launch();
  let_next_launch_begin();

  // What memory says, of which nothing waits for another. Rows that turn out not to count are loaded in vain.
  Rows logits;
  rule.set(logits);
  if (first_row < (rows_there < first.tokens_per_block ? rows_there : first.tokens_per_block)) {
    logits.load(row_at(first_row + own_row), first.num_experts, first.row_format());
  }
  const int said_tokens =
      first.num_local_tokens != nullptr ? scalar_load(first.num_local_tokens) : first.num_tokens;
  const FusedParams& early = loaded_anew(p, sizeof(FusedFirst));
  // Words of the mask for the thread's first experts; 0 where there is no such expert.
  const int num_masked = kAny ? early.shape.num_real : first.num_experts;
  const int first_expert = kAtOnce * static_cast<int>(threadIdx.x);
  uint32_t mask[kAtOnce] = {};
  if (first.expert_mask != nullptr) {
    AITER_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (first_expert + i < num_masked) mask[i] = first.expert_mask[first_expert + i];
    }
  }
  if constexpr (kUsesLds<Rows>) {
    logits.use(lds_base + early.lds.rows + block.wave * best_keys_lds_bytes(kWaveSize));
  }
  float* const lds_weights = reinterpret_cast<float*>(lds_base + early.lds.weights);
  uint16_t* const lds_experts = block.experts_behind(lds_weights, first.topk);
  if (!kLaunchesOverlap) clear_lds(first, block);

  block.num_local = clamp_tokens(anew(said_tokens), first.num_tokens);
  const int rows_left =
      block.num_local > block.first_token ? block.num_local - block.first_token : 0;
  block.num_rows = rows_left < first.tokens_per_block ? rows_left : first.tokens_per_block;
  const int rows_at_once = first.num_threads / kWaveSize * Rows::kRowsPerWave;
  // A row's place in LDS: among the workgroup's own, or, as it may be the last, among all.
  const bool hands_over = first.hands_over();
  const int first_place = hands_over ? block.first_token : 0;
  const int num_kept = hands_over ? block.num_local : block.num_rows;
  typename Rule::Sink sink = rule.sink({nullptr,
                                        nullptr,
                                        block.hits,
                                        block.sets.hit,
                                        block.is_alone() ? nullptr : block.counts.own(),
                                        num_kept,
                                        early.shape.block_size,
                                        0,
                                        {}},
                                       block.first_token - first_place);
  AITER_LOOP
  while (first_row < block.num_rows) {
    const int row = first_row + own_row;
    sink.row = first_place + row;
    const int entry = sink.row * first.topk;
    sink.experts = lds_experts + entry;
    sink.weights = lds_weights + entry;
    wave_topk(logits, first.num_experts, first.topk, first.is(FusedFirst::kNeedRenorm),
              row < block.num_rows, sink);
    first_row += rows_at_once;
    if (first_row < block.num_rows) {
      logits.load(row_at(first_row + own_row), first.num_experts, first.row_format());
    } else {
      drop(logits);
    }
  }
  uint32_t first_local = 0;
  AITER_UNROLL
  for (int i = 0; i < kAtOnce; ++i) {
    if (awaited(mask[i]) != 0) first_local |= 1u << i;
  }
  const FusedParams& rest = loaded_anew(p, sizeof(FusedFirst));
  // NOTE: also loaded again, as AMD GPUs have no scalar registers to keep these in during top-k.
  const FusedFirst& again = loaded_anew(first, 0);
  block.num_threads = workgroup_threads(again.num_threads);
  if ((anew(static_cast<int>(first.flags)) & FusedFirst::kOneToken) != 0) {
    write_one_token<kAny>(rest.shape, block.num_local, block.wave, block.num_threads, rest.sort,
                          sink.last);
    return;
  }
  if (first.hands_over()) {
    if (!take_over(rest, block, again.num_routing(), lds_base)) return;
  }
  if (again.expert_mask == nullptr) {
    first_local = local_experts<kAny, kAtOnce>(rest.shape, nullptr, kAtOnce * threadIdx.x);
  }
  block.sets.add_mask<kAny, kAtOnce>(rest.shape, rest.sort, first_local, block.num_threads);
  __syncthreads();
  block.hits.stride = padded_experts(again.num_experts);
  block.hits.num_words = hit_words(anew(block.lds_rows));
  sort_rows<kAny, kAtOnce>(rest, block, first_local, lds_base);
}

// What the workgroups do that do not route.
__device__ __forceinline__ void zero_rows(const FusedFirst& first, const FusedParams& p) {
  wait_for_earlier_launch();
  let_next_launch_begin();
  zero_moe_buf(p.sort, local_tokens(first.num_local_tokens, first.num_tokens),
               blockIdx.x - first.num_routing(), gridDim.x - first.num_routing());
}

template <typename Rows>
__global__ void AITER_LAUNCH_BOUNDS(Rows::kMaxThreads)
    fused_topk_moe_sorting_kernel(const void* gating, int64_t row_stride,
                                  const int32_t* num_local_tokens, const int32_t* expert_mask,
                                  int num_tokens, int num_experts, int topk, int tokens_per_block,
                                  int num_threads, uint32_t flags, FusedParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  const FusedFirst first{gating,      row_stride, num_local_tokens, expert_mask, num_tokens,
                         num_experts, topk,       tokens_per_block, num_threads, flags};
  if (AITER_UNLIKELY(blockIdx.x >= static_cast<unsigned>(first.num_routing()))) {
    return zero_rows(first, p);
  }
  if constexpr (Rows::kIsUsed) {
    route<Rows>(first, p, NoRule{}, static_cast<int>(blockIdx.x), lds_base);
  }
}

}  // namespace aiter
