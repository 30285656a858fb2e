// Softmax, top-k, block-padded sort by expert and moe_buf zeroing in one launch.
//
//   gating  [M, E] f32/f16/bf16, inner stride 1, rows `row_stride` items apart
//   sorted_ids, sorted_weights [M*K + E*B - K], sorted_expert_ids [that / B], num_valid_ids [2]
//   moe_buf [n * D] items, rows below n zeroed
//
// Workgroup 0 routes, all others zero moe_buf. Routing, in phases with a barrier between them:
//   1 clear    all threads     the token x expert bitmask
//   2 top-k    a wave per row  row_topk.h; slot k: expert, weight and hit bit into LDS
//   3 count    a thread per expert   popcounts of its column of the bitmask
//   4 assign   a thread per expert   scan over padded counts: first slot, expert id of its blocks
//   5 write    all threads     entries to start + rank, padding behind every expert's last entry
//
// LDS: bitmask 4*E*ceil(M/32), weights 4*M*K, counts and starts 8*E, scan 128, experts 2*M*K bytes.
// For E=128, K=4 and 64 KiB that is M up to 1600; max_tokens() tells.
#pragma once

#include "expert_sort.h"
#include "row_topk.h"

namespace aiter {

// Everything the launch choice depends on, and the choice.
struct FusedConfig {
  int row_values;        // registers of logits per lane; 0: rows are read from memory
  unsigned num_threads;  // of a workgroup
  unsigned num_blocks;   // workgroups
  size_t lds_bytes;
};

struct FusedParams {
  const void* gating;
  int64_t row_stride;  // in items
  SortShape shape;
  SortParams sort;
  bool need_renorm;
};

struct FusedLds {
  size_t hits, weights, counts, starts, scan, experts, total;  // byte offsets
};

__host__ __device__ inline FusedLds fused_lds(const SortShape& shape) {
  const size_t num_entries = static_cast<size_t>(shape.num_tokens) * shape.topk;
  FusedLds lds;
  lds.hits = 0;
  lds.weights = lds.hits + sizeof(uint32_t) * hit_words(shape.num_tokens) * shape.num_experts;
  lds.counts = lds.weights + sizeof(float) * num_entries;
  lds.starts = lds.counts + sizeof(uint32_t) * shape.num_experts;
  lds.scan = lds.starts + sizeof(uint32_t) * shape.num_experts;
  lds.experts = lds.scan + sizeof(uint32_t) * kMaxWavesPerBlock;
  lds.total = (lds.experts + sizeof(uint16_t) * num_entries + 15) / 16 * 16;
  return lds;
}

// Where wave_topk leaves the winners of one row.
struct FusedSink {
  uint16_t* experts;  // [K] of this row
  float* weights;
  HitMask hits;
  const int32_t* expert_mask;
  int token;

  __device__ __forceinline__ void put(int k, uint32_t expert_idx, float weight) {
    const bool local = is_local(expert_mask, expert_idx);
    experts[k] = static_cast<uint16_t>(local ? expert_idx : kNoExpert);
    weights[k] = weight;
    if (local) hits.set(token, expert_idx);
  }
  __device__ __forceinline__ void divide(int k, float denominator) { weights[k] /= denominator; }
};

template <typename T, int kValues>
__device__ __forceinline__ void route(const FusedParams& p, int num_local, char* lds_base) {
  const int num_waves = static_cast<int>(blockDim.x) / kWaveSize;
  const int topk = p.shape.topk;
  const FusedLds lds = fused_lds(p.shape);
  const HitMask hits{reinterpret_cast<uint32_t*>(lds_base + lds.hits), p.shape.num_experts,
                     hit_words(num_local)};
  float* const lds_weights = reinterpret_cast<float*>(lds_base + lds.weights);
  uint32_t* const lds_counts = reinterpret_cast<uint32_t*>(lds_base + lds.counts);
  uint32_t* const lds_starts = reinterpret_cast<uint32_t*>(lds_base + lds.starts);
  uint32_t* const lds_scan = reinterpret_cast<uint32_t*>(lds_base + lds.scan);
  uint16_t* const lds_experts = reinterpret_cast<uint16_t*>(lds_base + lds.experts);

  hits.clear();
  __syncthreads();

  for (int token = wave_idx(); token < num_local; token += num_waves) {
    FusedSink sink{lds_experts + token * topk, lds_weights + token * topk, hits, p.sort.expert_mask,
                   token};
    wave_topk<T, kValues>(static_cast<const T*>(p.gating) + token * p.row_stride,
                          p.shape.num_experts, topk, p.need_renorm, sink);
  }
  __syncthreads();

  for (int e = threadIdx.x; e < p.shape.num_experts; e += blockDim.x) lds_counts[e] = hits.count(e);
  __syncthreads();

  assign_blocks(p.shape, num_local, lds_counts, lds_starts, lds_scan, p.sort);
  __syncthreads();

  for (int i = threadIdx.x; i < num_local * topk; i += blockDim.x) {
    const uint32_t expert_idx = lds_experts[i];
    if (expert_idx == kNoExpert) continue;
    const int token = i / topk;
    const uint32_t slot = lds_starts[expert_idx] + hits.rank(token, expert_idx);
    write_entry(p.sort, slot, token, i % topk, lds_weights[i]);
  }
  write_padding(p.shape, num_local, lds_counts, lds_starts, p.sort, threadIdx.x, blockDim.x);
}

// Long rows want more registers than a lane of the largest workgroup gets.
__host__ __device__ constexpr int fused_max_threads(int row_values) {
  return row_values > 16 ? 512 : 1024;
}

template <typename T, int kValues>
__global__ void __launch_bounds__(fused_max_threads(kValues))
    fused_topk_moe_sorting_kernel(FusedParams p) {
  AITER_DYNAMIC_LDS(lds_base);
  const int num_local = local_tokens(p.sort.num_local_tokens, p.shape.num_tokens);
  if (blockIdx.x == 0) {
    if constexpr (kRowIsUsed<kValues>) route<T, kValues>(p, num_local, lds_base);
  } else {
    zero_moe_buf(p.sort, num_local, 1);
  }
}

}  // namespace aiter
