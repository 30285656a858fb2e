// Softmax, top-k, block-padded sort by expert and moe_buf zeroing in one launch.
//
//   gating  [M, E] f32/f16/bf16, inner stride 1, rows `row_stride` items apart
//   sorted_ids, sorted_weights [M*K + E*B - K], sorted_expert_ids [that / B], num_valid_ids [2]
//   moe_buf [n * D] items, rows below n zeroed
//
// The first workgroups route, all others zero moe_buf. On targets that have clusters (cluster.h) up
// to 16 workgroups route, each a range of rows of its own; elsewhere it is one. Phases of a routing
// workgroup, with a barrier between them:
//   1 clear    all threads     the bitmask; before memory is touched, as an earlier launch may still run
//   2 top-k    a wave per row or a few (key_topk.h, group_topk.h, row_topk.h)   slot k: expert, weight and hit bits into LDS
// then, in a workgroup that routes alone while n <= B (single_blocks.h),
//   3 padding  all threads     all blocks, whole
//   4 entries  a thread each   over the padding; expert ids
// and otherwise
//   3 assign   a thread per expert   popcounts of its column, which in a cluster go to all its workgroups;
//                              blocks for the experts, by all workgroups alike
//   4 write    all threads     own entries to start + rank; its share of the padding
//
// Three or four barriers in all, and none for a single token (one_token.h); in a cluster there are two waits
// more, the first of which is over during top-k. What workgroups tell each other is one count per expert,
// through LDS: nothing in global memory is shared, so launches on several streams and graphs that are
// replayed at the same time do not meet.
//
// LDS of a workgroup with m rows: totals or sets of experts 256, inbox 16, bitmask 4*E*ceil(m/32), starts
// and tails 8*E, in a cluster of C 4*C*E for counts, weights 4*m*K, experts 2*m*K bytes, E rounded up to a
// multiple of 4, and 24 bytes a thread where top-k is by keys. For E=128, K=4, 64 KiB and one workgroup that is M up to 1600; max_tokens() tells.
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
#include "expert_sort.h"
#include "key_topk.h"
#include "one_token.h"
#include "single_blocks.h"

namespace aiter {

// Where a routing workgroup keeps what; the end of the last part is `total`.
struct FusedLds {
  uint32_t totals, inbox, hits, starts, tails, counts, rows, weights, experts;  // byte offsets
  size_t total;
};

// Everything the launch choice depends on, and the choice.
struct FusedConfig {
  int tokens_per_block;
  FusedLds lds;
  LaunchShape launch;
};

struct FusedParams {
  const void* gating;
  int64_t row_stride;  // in items of the class of rows
  SortShape shape;
  SortParams sort;
  FusedLds lds;
  int cluster_size;      // workgroups that route
  int tokens_per_block;  // of each of them
  int one_token;         // 1 for the case of one_token.h
  bool need_renorm;
  RowFormat row_format;
};

// E rounded up, so that four experts' words lie on a 16-byte boundary.
__host__ __device__ constexpr int padded_experts(int num_experts) {
  return (num_experts + 3) / 4 * 4;
}

// `row_bytes`: of all waves, for what top-k keeps of rows.
inline FusedLds fused_lds(int tokens_per_block, int num_experts, int topk, int cluster_size,
                          int row_bytes) {
  const size_t num_entries = static_cast<size_t>(tokens_per_block) * topk;
  const size_t per_expert = sizeof(uint32_t) * padded_experts(num_experts);
  size_t end = 0;
  const auto take = [&end](size_t bytes) {
    const size_t begin = end;
    end += bytes;
    return static_cast<uint32_t>(begin);
  };
  FusedLds lds;
  lds.totals = take(sizeof(uint32_t) * 2 * kMaxWavesPerBlock);
  lds.inbox = take(16);
  lds.hits = take(per_expert * hit_words(tokens_per_block));
  lds.starts = take(per_expert);
  lds.tails = take(per_expert);
  lds.counts = take(cluster_size > 1 ? per_expert * cluster_size : 0);
  lds.rows = take(row_bytes);  // on a 16-byte boundary, as all before
  lds.weights = take(sizeof(float) * num_entries);
  lds.experts = take(sizeof(uint16_t) * num_entries);
  lds.total = (end + 15) / 16 * 16;
  return lds;
}

// Where wave_topk leaves the winners of one row.
struct FusedSink {
  uint16_t* experts;  // [K] of this row
  float* weights;
  HitMask hits;
  ExpertSet hit_experts;
  int num_rows, block_size;
  int row;     // of the workgroup's num_rows
  Entry last;  // that this lane put

  __device__ __forceinline__ void put(int k, uint32_t expert_idx, float weight) {
    last = {expert_idx, row, k, weight};
    experts[k] = static_cast<uint16_t>(expert_idx);
    weights[k] = weight;
    hits.set(row, expert_idx);
    // The set is asked for in fewer cases; to tell exactly which makes compilers double what comes behind.
    if (num_rows <= anew(block_size)) hit_experts.add(expert_idx);
  }
  __device__ __forceinline__ void divide(int k, float denominator) { weights[k] /= denominator; }
};

// The counts [C][E] of a cluster's workgroups, which each sends to all.
struct ClusterCounts {
  uint32_t* lds_counts;  // [C][stride]
  Inbox* inbox;
  int stride, rank, size;

  __device__ __forceinline__ void open() const {
    if (threadIdx.x == 0) open_inbox(inbox);
  }
  __device__ __forceinline__ void expect() const {
    if (threadIdx.x == 0) expect_bytes(inbox, sizeof(uint32_t) * stride * size);
  }
  // Every wave has its receivers, every lane its experts, four at a time.
  __device__ __forceinline__ void exchange(const HitMask& hits, int wave) const {
    const int num_waves = static_cast<int>(blockDim.x) / kWaveSize;
    if (wave < size) {
      AITER_LOOP
      for (int e = 4 * lane_idx(); e < stride; e += 4 * kWaveSize) {
        const FourWords four = hits.count_four(e);
        uint32_t* const place = lds_counts + rank * stride + e;
        AITER_LOOP
        for (int to = wave; to < size; to += num_waves) {
          cluster_send(reinterpret_cast<FourWords*>(place), inbox, to, four);
        }
      }
    }
    wait_for_inbox(inbox);
  }
  __device__ __forceinline__ ExpertCount of(int e) const {
    constexpr int kAtOnce = 8;
    ExpertCount sum{0, 0};
    AITER_LOOP
    for (int first = 0; first < size; first += kAtOnce) {
      uint32_t count[kAtOnce];
      AITER_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        count[i] = first + i < size ? lds_counts[(first + i) * stride + e] : 0;
      }
      AITER_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < rank) sum.before += count[i];
        sum.total += count[i];
      }
    }
    return sum;
  }
};

// A routing workgroup, and its LDS.
struct RoutingBlock {
  int rank, cluster_size;
  int wave;
  int first_token, num_rows;  // rows that count
  int num_local;
  bool is_first_local;  // is_local() of the expert threadIdx.x
  HitMask hits;
  SingleBlocks sets;
  float* lds_weights;
  uint16_t* lds_experts;
  uint32_t* lds_totals;
  ClusterCounts counts;
  uint32_t *lds_starts, *lds_tails;

  __device__ __forceinline__ bool is_alone() const {
    return kMaxClusterSize == 1 || cluster_size == 1;
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
template <bool kAny>
__device__ inline void sort_rows(const FusedParams& p, const RoutingBlock& block) {
  const int topk = p.shape.topk;
  const int num_entries = block.num_rows * topk;
  const HitMask& hits = block.hits;
  const auto entry_at = [&](int i) {
    const int row = static_cast<int>(p.shape.by_topk.quotient(i));
    return Entry{block.lds_experts[i], block.first_token + row, i - row * topk,
                 block.lds_weights[i]};
  };
  const bool has_single_blocks = block.is_alone() && block.num_local <= p.shape.block_size &&
                                 p.shape.num_experts <= kMaxSetExperts;
  if (has_single_blocks) {
    write_single_blocks<kAny>(p.shape, block.num_local, hits, block.sets, p.sort, num_entries,
                              entry_at);
    return;
  }

  const bool is_alone = block.is_alone();
  if (!is_alone) {
    cluster_wait();  // all workgroups have started
    block.counts.exchange(hits, block.wave);
  }
  const SortLds sort_lds{block.lds_starts, block.lds_tails, block.lds_totals};
  assign_blocks<kAny>(
      p.shape, block.num_local, block.is_first_local, block.rank == 0, block.wave, sort_lds, p.sort,
      [&](int e) { return is_alone ? ExpertCount{hits.count(e), 0} : block.counts.of(e); });
  __syncthreads();

  AITER_LOOP
  for (int i = threadIdx.x; i < num_entries; i += blockDim.x) {
    const Entry entry = entry_at(i);
    const uint32_t start = sort_lds.starts[entry.expert_idx];
    if (start == kNoSlot) continue;
    const int row = entry.token - block.first_token;
    write_entry<kAny>(p.shape, p.sort, start + hits.rank(row, entry.expert_idx), entry);
  }
  // The last threads pad first, as the first ones have most of the entries.
  write_padding<kAny>(p.shape, block.num_local, sort_lds.tails, p.sort,
                      (block.cluster_size - block.rank) * blockDim.x - 1 - threadIdx.x,
                      block.cluster_size * blockDim.x);
}

// Everything that can be done without memory, while an earlier launch still runs.
template <bool kAny>
__device__ __forceinline__ void begin_block(const FusedParams& p, char* lds_base,
                                            RoutingBlock& block) {
  const auto words = [&](uint32_t offset) {
    return reinterpret_cast<uint32_t*>(lds_base + offset);
  };
  block.cluster_size = kMaxClusterSize > 1 ? p.cluster_size : 1;
  block.rank = kMaxClusterSize > 1 ? static_cast<int>(blockIdx.x) : 0;
  block.wave = uniform_wave_idx();
  block.first_token = block.rank * p.tokens_per_block;
  block.hits = {words(p.lds.hits), padded_experts(p.shape.num_experts),
                hit_words(p.tokens_per_block)};
  block.lds_weights = reinterpret_cast<float*>(lds_base + p.lds.weights);
  block.lds_experts = reinterpret_cast<uint16_t*>(lds_base + p.lds.experts);
  block.lds_totals = words(p.lds.totals);
  block.sets = SingleBlocks::in(block.lds_totals,
                                leaves_out<kAny>(p.shape, p.sort) && !(kAny && p.shape.flat_ids));
  block.lds_starts = words(p.lds.starts);
  block.lds_tails = words(p.lds.tails);
  block.counts = {words(p.lds.counts), reinterpret_cast<Inbox*>(lds_base + p.lds.inbox),
                  block.hits.stride, block.rank, block.cluster_size};
  if (!block.is_alone()) {
    block.counts.open();
    cluster_arrive();
  }
  if (p.one_token == 0) {
    block.hits.clear();
    block.sets.hit.clear();
    __syncthreads();
  }
  if (!block.is_alone()) block.counts.expect();
}

// What memory says beside the logits.
template <bool kAny>
__device__ __forceinline__ void read_locals(const FusedParams& p, RoutingBlock& block) {
  const int num_experts = p.shape.num_experts;
  block.is_first_local =
      static_cast<int>(threadIdx.x) < num_experts && is_local<kAny>(p.shape, p.sort, threadIdx.x);
  block.num_local = local_tokens(p.sort.num_local_tokens, p.shape.num_tokens);
  const int rows_left =
      block.num_local > block.first_token ? block.num_local - block.first_token : 0;
  block.num_rows = rows_left < p.tokens_per_block ? rows_left : p.tokens_per_block;
  block.sets.post_mask<kAny>(p.shape, p.sort, block.is_first_local);
}

template <typename Rows, typename Rule>
__device__ __forceinline__ void route(const FusedParams& p, const Rule& rule, char* lds_base) {
  constexpr bool kAny = Rule::kAnySort;
  const int num_experts = p.shape.num_experts;
  RoutingBlock block;
  begin_block<kAny>(p, lds_base, block);
  const int last_row = p.shape.num_tokens - 1 - block.first_token;
  const auto row_at = [&](int row) {
    const int token = block.first_token + (row < last_row ? row : last_row);
    return static_cast<const typename Rows::Item*>(p.gating) + token * p.row_stride;
  };
  int first_row = block.wave * Rows::kRowsPerWave;
  const int own_row = Rows::row_in_wave();
  wait_for_earlier_launch();
  let_next_launch_begin();

  // Rows that turn out not to count are loaded in vain.
  Rows logits;
  rule.set(logits);
  if constexpr (kUsesLds<Rows>) {
    logits.use(lds_base + p.lds.rows + block.wave * best_keys_lds_bytes(kWaveSize));
  }
  if (first_row < p.tokens_per_block && first_row <= last_row) {
    logits.load(row_at(first_row + own_row), num_experts, p.row_format);
  }
  read_locals<kAny>(p, block);
  const int rows_at_once = static_cast<int>(blockDim.x) / kWaveSize * Rows::kRowsPerWave;
  typename Rule::Sink sink = rule.sink(
      {nullptr, nullptr, block.hits, block.sets.hit, block.num_rows, p.shape.block_size, 0, {}},
      block.first_token);
  AITER_LOOP
  while (first_row < block.num_rows) {
    const int row = first_row + own_row;
    const int entry = row * p.shape.topk;
    sink.experts = block.lds_experts + entry;
    sink.weights = block.lds_weights + entry;
    sink.row = row;
    wave_topk(logits, num_experts, p.shape.topk, p.need_renorm, row < block.num_rows, sink);
    first_row += rows_at_once;
    if (first_row < block.num_rows) {
      logits.load(row_at(first_row + own_row), num_experts, p.row_format);
    } else {
      drop(logits);
    }
  }
  if (anew(p.one_token) != 0) {
    write_one_token<kAny>(p.shape, block.num_local, block.wave, p.sort, sink.last);
    return;
  }
  __syncthreads();
  // Computed anew, since gfx90a has no scalar registers to keep them in during top-k.
  block.hits.stride = padded_experts(anew(p.shape.num_experts));
  block.hits.num_words = hit_words(anew(p.tokens_per_block));
  sort_rows<kAny>(p, block);
}

template <typename Rows>
__global__ void AITER_LAUNCH_BOUNDS(Rows::kMaxThreads)
    fused_topk_moe_sorting_kernel(FusedParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  const unsigned num_routing = kMaxClusterSize > 1 ? p.cluster_size : 1;
  if (blockIdx.x < num_routing) {
    if constexpr (Rows::kIsUsed) route<Rows>(p, NoRule{}, lds_base);
  } else {
    wait_for_earlier_launch();
    let_next_launch_begin();
    zero_moe_buf(p.sort, local_tokens(p.sort.num_local_tokens, p.shape.num_tokens), num_routing);
  }
}

}  // namespace aiter
