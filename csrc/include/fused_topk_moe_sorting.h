// Softmax, top-k, block-padded sort by expert and moe_buf zeroing in one launch.
//
//   gating  [M, E] f32/f16/bf16, inner stride 1, rows `row_stride` items apart
//   sorted_ids, sorted_weights [M*K + E*B - K], sorted_expert_ids [that / B], num_valid_ids [2]
//   moe_buf [n * D] items, rows below n zeroed
//
// The first workgroups route, all others zero moe_buf. On targets that have clusters (cluster.h) up
// to 16 workgroups route, each a range of rows of its own; elsewhere it is one. Phases of a routing
// workgroup, with a barrier between them:
//   1 load     a wave per row or a few (group_topk.h, row_topk.h)   the logits of its first rows set off; all
//                              threads clear the bitmask
//   2 top-k    the same        slot k: expert, weight and hit bit into LDS
// then, in a workgroup that routes alone while n <= B,
//   3 blocks   a thread per expert   is it hit? as bits in LDS
//   4 padding  all threads     all blocks, whole; expert ids
//   5 entries  a thread each   over the padding
// and otherwise
//   3 assign   a thread per expert   popcounts of its column, which in a cluster go to all its workgroups;
//                              blocks for the experts, by all workgroups alike
//   4 write    all threads     own entries to start + rank; its share of the padding
//
// Five barriers in all, the first of which is passed while logits are on their way; in a cluster there are
// two waits more, the first of which is over during top-k. What workgroups tell each other is one
// count per expert, through LDS: nothing in global memory is shared, so launches on several streams
// and graphs that are replayed at the same time do not meet.
//
// LDS of a workgroup with m rows: totals or sets of experts 256, inbox 16, bitmask 4*E*ceil(m/32), starts
// and tails 8*E, in a cluster of C 4*C*E for counts, weights 4*m*K, experts 2*m*K bytes, E rounded up to a
// multiple of 4. For E=128, K=4, 64 KiB and one workgroup that is M up to 1599; max_tokens() tells.
#pragma once

#include "device/cluster.h"
#include "expert_sort.h"
#include "group_topk.h"

namespace aiter {

// Where a routing workgroup keeps what; the end of the last part is `total`.
struct FusedLds {
  uint32_t totals, inbox, hits, starts, tails, counts, weights, experts;  // byte offsets
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
  int64_t row_stride;  // in items
  SortShape shape;
  SortParams sort;
  FusedLds lds;
  int cluster_size;      // workgroups that route
  int tokens_per_block;  // of each of them
  bool need_renorm;
  bool wide_rows;  // group_topk.h
};

// E rounded up, so that four experts' words lie on a 16-byte boundary.
__host__ __device__ constexpr int padded_experts(int num_experts) {
  return (num_experts + 3) / 4 * 4;
}

inline FusedLds fused_lds(int tokens_per_block, int num_experts, int topk, int cluster_size) {
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
  int row;  // of the workgroup's

  __device__ __forceinline__ void put(int k, uint32_t expert_idx, float weight) {
    experts[k] = static_cast<uint16_t>(expert_idx);
    weights[k] = weight;
    hits.set(row, expert_idx);
  }
  __device__ __forceinline__ void divide(int k, float denominator) { weights[k] /= denominator; }
};

// The counts [C][E] of a cluster's workgroups, which each sends to all.
struct ClusterCounts {
  uint32_t* lds_counts;  // [C][stride]
  Inbox* inbox;
  int stride, rank, size;

  __device__ __forceinline__ void expect() const {
    if (threadIdx.x == 0) open_inbox(inbox, sizeof(uint32_t) * stride * size);
  }
  // A wave per receiver, four experts per lane.
  __device__ __forceinline__ void send(const HitMask& hits) const {
    const int num_waves = static_cast<int>(blockDim.x) / kWaveSize;
    AITER_LOOP
    for (int to = wave_idx(); to < size; to += num_waves) {
      AITER_LOOP
      for (int e = 4 * lane_idx(); e < stride; e += 4 * kWaveSize) {
        uint32_t* const place = lds_counts + rank * stride + e;
        cluster_send(reinterpret_cast<FourWords*>(place), inbox, to, hits.count_four(e));
      }
    }
    wait_for_inbox(inbox);
  }
  __device__ __forceinline__ ExpertCount of(int e) const {
    constexpr int kAtOnce = 4;
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

template <typename Rows>
__device__ __forceinline__ void route(const FusedParams& p, char* lds_base) {
  const int cluster_size = kMaxClusterSize > 1 ? p.cluster_size : 1;
  const int rank = kMaxClusterSize > 1 ? static_cast<int>(blockIdx.x) : 0;
  const int topk = p.shape.topk;
  const int num_experts = p.shape.num_experts;
  const int first_token = rank * p.tokens_per_block;

  // What comes from memory sets off first; rows that turn out not to count are loaded in vain.
  const int rows_at_once = static_cast<int>(blockDim.x) / kWaveSize * Rows::kRowsPerWave;
  const auto* const rows =
      static_cast<const typename Rows::Item*>(p.gating) + first_token * p.row_stride;
  const int last_row = p.shape.num_tokens - 1 - first_token;
  Rows logits;
  const auto load = [&](int row) {
    logits.load(rows + (row < last_row ? row : last_row) * p.row_stride, num_experts, p.wide_rows);
  };
  int first_row = wave_idx() * Rows::kRowsPerWave;
  const int own_row = Rows::row_in_wave();
  if (first_row < p.tokens_per_block && first_row <= last_row) load(first_row + own_row);
  const bool is_first_local =
      static_cast<int>(threadIdx.x) < num_experts && is_local(p.sort.expert_mask, threadIdx.x);
  const int num_local = local_tokens(p.sort.num_local_tokens, p.shape.num_tokens);

  const HitMask hits{reinterpret_cast<uint32_t*>(lds_base + p.lds.hits),
                     padded_experts(num_experts), hit_words(p.tokens_per_block)};
  float* const lds_weights = reinterpret_cast<float*>(lds_base + p.lds.weights);
  uint16_t* const lds_experts = reinterpret_cast<uint16_t*>(lds_base + p.lds.experts);
  uint32_t* const lds_totals = reinterpret_cast<uint32_t*>(lds_base + p.lds.totals);
  const ClusterCounts counts{reinterpret_cast<uint32_t*>(lds_base + p.lds.counts),
                             reinterpret_cast<Inbox*>(lds_base + p.lds.inbox), hits.stride, rank,
                             cluster_size};
  if (cluster_size > 1) {
    counts.expect();
    cluster_arrive();
  }
  hits.clear();
  __syncthreads();

  const int rows_left = num_local > first_token ? num_local - first_token : 0;
  const int num_rows = rows_left < p.tokens_per_block ? rows_left : p.tokens_per_block;
  AITER_LOOP
  while (first_row < num_rows) {
    const int row = first_row + own_row;
    FusedSink sink{lds_experts + row * topk, lds_weights + row * topk, hits, row};
    wave_topk(logits, num_experts, topk, p.need_renorm, row < num_rows, sink);
    first_row += rows_at_once;
    if (first_row < num_rows) load(first_row + own_row);
  }
  __syncthreads();

  const auto entry_at = [&](int i) {
    const int row = static_cast<int>(p.shape.by_topk.quotient(i));
    return Entry{lds_experts[i], row, i - row * topk, lds_weights[i]};
  };
  if (cluster_size == 1 && num_local <= p.shape.block_size && num_experts <= kMaxSetExperts) {
    write_single_blocks(p.shape, num_local, is_first_local, hits, lds_totals, p.sort,
                        num_rows * topk, entry_at);
    return;
  }

  if (cluster_size > 1) {
    cluster_wait();  // all workgroups have started
    counts.send(hits);
  }
  const SortLds sort_lds{reinterpret_cast<uint32_t*>(lds_base + p.lds.starts),
                         reinterpret_cast<uint32_t*>(lds_base + p.lds.tails), lds_totals};
  assign_blocks(p.shape, num_local, is_first_local, rank == 0, sort_lds, p.sort, [&](int e) {
    return cluster_size > 1 ? counts.of(e) : ExpertCount{hits.count(e), 0};
  });
  __syncthreads();

  AITER_LOOP
  for (int i = threadIdx.x; i < num_rows * topk; i += blockDim.x) {
    const Entry entry = entry_at(i);
    const uint32_t start = sort_lds.starts[entry.expert_idx];
    if (start == kNoSlot) continue;
    write_entry(p.sort, start + hits.rank(entry.token, entry.expert_idx), first_token + entry.token,
                entry.k, entry.weight);
  }
  // The last threads pad first, as the first ones have most of the entries.
  write_padding(p.shape, num_local, sort_lds.tails, p.sort,
                (cluster_size - rank) * blockDim.x - 1 - threadIdx.x, cluster_size * blockDim.x);
}

template <typename Rows>
__global__ void AITER_LAUNCH_BOUNDS(Rows::kMaxThreads)
    fused_topk_moe_sorting_kernel(FusedParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  wait_for_earlier_launch();
  let_next_launch_begin();
  const unsigned num_routing = kMaxClusterSize > 1 ? p.cluster_size : 1;
  if (blockIdx.x < num_routing) {
    if constexpr (Rows::kIsUsed) route<Rows>(p, lds_base);
  } else {
    zero_moe_buf(p.sort, local_tokens(p.sort.num_local_tokens, p.shape.num_tokens), num_routing);
  }
}

}  // namespace aiter
