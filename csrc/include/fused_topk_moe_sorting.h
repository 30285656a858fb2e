// Softmax, top-k, block-padded sort by expert and moe_buf zeroing in one launch.
//
//   gating  [M, E] f32/f16/bf16, inner stride 1, rows `row_stride` items apart
//   sorted_ids, sorted_weights [M*K + E*B - K], sorted_expert_ids [that / B], num_valid_ids [2]
//   moe_buf [n * D] items, rows below n zeroed
//
// The first workgroups route, all others zero moe_buf. On targets that have clusters (cluster.h) up
// to 8 workgroups route, each a range of rows of its own; elsewhere it is one. Phases of a routing
// workgroup, with a barrier between them:
//   1 load     a wave per row  the logits of its first row set off; all threads clear the bitmask
//   2 top-k    a wave per row  row_topk.h; slot k: expert, weight and hit bit into LDS
//   3 assign   a thread per expert   popcounts of its column; in a cluster, the counts go to all its
//                              workgroups; blocks for the experts, by all workgroups alike
//   4 write    all threads     own entries to start + rank; its share of the padding
//
// Five barriers in all, the first of which is passed while logits are on their way; in a cluster two
// of the cluster's, the first of which is passed during top-k. What workgroups tell each other is one
// count per expert, through LDS: nothing in global memory is shared, so launches on several streams
// and graphs that are replayed at the same time do not meet.
//
// LDS of a workgroup with m rows: totals 256, bitmask 4*E*ceil(m/32), weights 4*m*K, starts and tails
// 8*E, in a cluster of C 4*C*E for counts, experts 2*m*K bytes. For E=128, K=4, 64 KiB and one workgroup that
// is M up to 1600; max_tokens() tells.
#pragma once

#include "device/cluster.h"
#include "expert_sort.h"
#include "row_topk.h"

namespace aiter {

// Where a routing workgroup keeps what; the end of the last part is `total`.
struct FusedLds {
  uint32_t totals, hits, weights, starts, tails, counts, experts;  // byte offsets
  size_t total;
};

// Everything the launch choice depends on, and the choice.
struct FusedConfig {
  int row_values;  // registers of logits per lane; 0: rows are read from memory
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
};

inline FusedLds fused_lds(int tokens_per_block, int num_experts, int topk, int cluster_size) {
  const size_t num_entries = static_cast<size_t>(tokens_per_block) * topk;
  const size_t per_expert = sizeof(uint32_t) * num_experts;
  size_t end = 0;
  const auto take = [&end](size_t bytes) {
    const size_t begin = end;
    end += bytes;
    return static_cast<uint32_t>(begin);
  };
  FusedLds lds;
  lds.totals = take(sizeof(uint32_t) * 2 * kMaxWavesPerBlock);
  lds.hits = take(per_expert * hit_words(tokens_per_block));
  lds.weights = take(sizeof(float) * num_entries);
  lds.starts = take(per_expert);
  lds.tails = take(per_expert);
  lds.counts = take(cluster_size > 1 ? per_expert * cluster_size : 0);
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

// The counts [C][E] that a cluster's workgroups send each other; one workgroup keeps its own.
struct ClusterCounts {
  uint32_t* lds_counts;
  int num_experts, rank, size;

  __device__ __forceinline__ void send(int e, uint32_t count) const {
    AITER_LOOP
    for (int to = 0; to < size; ++to) {
      cluster_store(lds_counts + rank * num_experts + e, to, count);
    }
  }
  __device__ __forceinline__ ExpertCount of(int e) const {
    ExpertCount sum{0, 0};
    AITER_LOOP
    for (int from = 0; from < size; ++from) {
      const uint32_t count = lds_counts[from * num_experts + e];
      if (from < rank) sum.before += count;
      sum.total += count;
    }
    return sum;
  }
};

// Phase 4: the workgroup's own entries and its share of the padding.
__device__ __forceinline__ void write_slots(const FusedParams& p, int rank, int cluster_size,
                                            int num_local, int num_rows, uint32_t num_tails,
                                            const HitMask& hits, const SortLds& sort_lds,
                                            const uint16_t* lds_experts, const float* lds_weights) {
  const int topk = p.shape.topk;
  AITER_LOOP
  for (int i = threadIdx.x; i < num_rows * topk; i += blockDim.x) {
    const uint32_t expert_idx = lds_experts[i];
    const uint32_t start = sort_lds.starts[expert_idx];
    if (start == kNoSlot) continue;
    const int row = static_cast<int>(p.shape.by_topk.quotient(i));
    write_entry(p.sort, start + hits.rank(row, expert_idx), rank * p.tokens_per_block + row,
                i - row * topk, lds_weights[i]);
  }
  write_padding(p.shape, num_local, sort_lds.tails, num_tails, p.sort,
                rank * blockDim.x + threadIdx.x, cluster_size * blockDim.x);
}

template <typename T, int kValues>
__device__ __forceinline__ void route(const FusedParams& p, char* lds_base) {
  const int cluster_size = kMaxClusterSize > 1 ? p.cluster_size : 1;
  const int rank = kMaxClusterSize > 1 ? static_cast<int>(blockIdx.x) : 0;
  const int num_waves = static_cast<int>(blockDim.x) / kWaveSize;
  const int topk = p.shape.topk;
  const int first_token = rank * p.tokens_per_block;
  if (cluster_size > 1) cluster_arrive();

  // What comes from memory sets off first; rows that turn out not to count are loaded in vain.
  const T* const rows = static_cast<const T*>(p.gating) + first_token * p.row_stride;
  WaveRow<T, kValues> logits;
  int row = wave_idx();
  if (row < p.tokens_per_block && first_token + row < p.shape.num_tokens) {
    logits.load(rows + row * p.row_stride, p.shape.num_experts);
  }
  const bool is_first_local = static_cast<int>(threadIdx.x) < p.shape.num_experts &&
                              is_local(p.sort.expert_mask, threadIdx.x);
  const int num_local = local_tokens(p.sort.num_local_tokens, p.shape.num_tokens);

  const HitMask hits{reinterpret_cast<uint32_t*>(lds_base + p.lds.hits), p.shape.num_experts,
                     hit_words(p.tokens_per_block)};
  float* const lds_weights = reinterpret_cast<float*>(lds_base + p.lds.weights);
  uint16_t* const lds_experts = reinterpret_cast<uint16_t*>(lds_base + p.lds.experts);
  const SortLds sort_lds{reinterpret_cast<uint32_t*>(lds_base + p.lds.starts),
                         reinterpret_cast<uint32_t*>(lds_base + p.lds.tails),
                         reinterpret_cast<uint32_t*>(lds_base + p.lds.totals)};
  const ClusterCounts counts{reinterpret_cast<uint32_t*>(lds_base + p.lds.counts),
                             p.shape.num_experts, rank, cluster_size};
  hits.clear();
  __syncthreads();

  const int rows_left = num_local > first_token ? num_local - first_token : 0;
  const int num_rows = rows_left < p.tokens_per_block ? rows_left : p.tokens_per_block;
  AITER_LOOP
  while (row < num_rows) {
    FusedSink sink{lds_experts + row * topk, lds_weights + row * topk, hits, row};
    wave_topk(logits, p.shape.num_experts, topk, p.need_renorm, sink);
    row += num_waves;
    if (row < num_rows) logits.load(rows + row * p.row_stride, p.shape.num_experts);
  }
  __syncthreads();

  if (cluster_size > 1) {
    cluster_wait();  // all workgroups have started
    AITER_LOOP
    for (int e = threadIdx.x; e < p.shape.num_experts; e += blockDim.x) {
      counts.send(e, hits.count(e));
    }
    cluster_arrive();
    cluster_wait();
  }
  const bool compact = num_local <= p.shape.block_size;
  const uint32_t num_tails = assign_blocks(
      p.shape, num_local, is_first_local, compact, rank == 0, sort_lds, p.sort,
      [&](int e) { return cluster_size > 1 ? counts.of(e) : ExpertCount{hits.count(e), 0}; });
  __syncthreads();

  write_slots(p, rank, cluster_size, num_local, num_rows, num_tails, hits, sort_lds, lds_experts,
              lds_weights);
}

// Long rows want more registers than a lane of the largest workgroup gets.
__host__ __device__ constexpr int fused_max_threads(int row_values) {
  return row_values > 16 ? 512 : 1024;
}

template <typename T, int kValues>
__global__ void AITER_LAUNCH_BOUNDS(fused_max_threads(kValues))
    fused_topk_moe_sorting_kernel(FusedParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  wait_for_earlier_launch();
  let_next_launch_begin();
  const unsigned num_routing = kMaxClusterSize > 1 ? p.cluster_size : 1;
  if (blockIdx.x < num_routing) {
    if constexpr (kRowIsUsed<kValues>) route<T, kValues>(p, lds_base);
  } else {
    zero_moe_buf(p.sort, local_tokens(p.sort.num_local_tokens, p.shape.num_tokens), num_routing);
  }
}

}  // namespace aiter
