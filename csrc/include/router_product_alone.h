// The router's product in a launch of its own: the same bits as router_product.h, whose sums and helpers these are.
//
// A workgroup is one team with one tile, and a tile has a kernel, so that lanes have all registers (255 on CUDA GPUs) and code
// is short. With few tokens the time is that of instructions one behind the other, so there are few: chunks lie at constant
// distances behind one pointer a row; lanes that have no chunk in the last round have zeros from before its load; which
// tile is a multiplication; and a bias is loaded with the chunks, but looked at behind the sums.
//
// Where launches overlap, the rows of the weight are asked for before the launch in front is over, as far as the level 2
// cache: they are cold in every layer of a model. What they hold is read behind the wait, as that launch might write it.
// It costs up to 0.1 us where the weight is in that cache already. Where it is not, it saves 0.1 to 0.4 us by the strict
// clock, and 0.3 to 0.9 by the overlapping one.
//
// What was measured, us of the product and the fused launch behind it, bf16, a bias (H200, strict clock of a C++ program,
// whose graphs read less than PyTorch's: docs/benchmarking.md; one binary each, 2026-11-27), for M = 1, 4, 16, 64. Of
// these 7168 x 256, M = 16, alone has become slower, and not from memory:
//                                         2880 x 128, K=4         7168 x 256, K=8         4096 x 512, K=10
//   before there were few instructions    3.27 4.13 4.92 7.13     4.47 5.74 7.71 13.4     5.26 6.37 9.51 17.4
//   this                                  3.15 3.76 4.57 7.00     3.98 5.29 7.91 13.1     4.79 5.98 9.08 17.4
//   before, weights from memory           3.48 4.24 5.04 7.58     5.23 7.19 8.80 14.6     6.07 7.40 10.8 18.3
//   this, weights from memory             3.32 3.87 4.62 7.07     4.81 5.86 8.55 13.5     5.54 6.64 9.49 17.6
//
// A profile (ncu, by instruction) said what there was to gain: of 1 x 7168 x 256, 1,246 instructions of a wave where 420
// add up, as selects put zeros in the place of chunks, copies kept them and every load had its own 64-bit address; a
// division of 35; and one trip to the level 2 cache more, for the bias whose kind was branched on. A sixth of the time
// of one token is the first look at the kernel's arguments, 300 to 400 cycles, which every launch has.
//
// From M = 16 on several things take the time at once: of 64 x 256 logits of 7,168 items (10 us), arithmetic takes 3.5 us at
// the GPU's peak, and the 59 MB that tiles of 8 x 8 load, of which 45 come from the level 2 cache, 6 to 9 us at the 5 to
// 7 TB/s that it gives; schedulers issue in two of three cycles. Tensor cores, which cuBLAS has, read less and compute
// faster, and round otherwise.
//
// Rejected, us of the product alone beside what was there then:
//   - a quarter of the partial sums for each of four workgroups of a cluster, whose waves have tiles of their own side by
//     side, sums exchanged by st.async. Of M = 64 it reads 29 MB from the level 2 cache instead of 45, by its counters, but
//     the busiest compute unit has half as much work again as the average one (7168 x 256, M = 4, 16, 64: 4.3, 6.9, 14.8
//     instead of 4.0, 4.9, 10.4), and two waves that miss on the same line at a time take longer than two lines;
//   - the same with all chunks in LDS by cp.async, which nobody waits for but by an mbarrier a round: 4.2, 6.0, 16.2;
//   - rows in LDS by bulk copies, all of them or a ring of 2 to 7 rounds with a wave that fills it: 5.0, 6.0, 11.5, and
//     3.7 instead of 3.2 for M = 1: such a copy comes some 400 cycles later than a load;
//   - one launch in a cluster of 16, each workgroup with eight experts of 128, logits to the first one's LDS: 2.9 us for
//     M = 1 and 3.5 for M = 4 until they are there, without any routing, where both launches take 3.1 and 3.8;
//   - chunks through LDS by cp.async, shared by the teams of a workgroup, a ring of 4 or 8 rounds: 25 instructions for a
//     copy where a load is one, and teams that wait for each other;
//   - two teams side by side in a workgroup, for half as many workgroups: 2.7 instead of 2.3 for 2880 x 128, M = 4, 6.9
//     instead of 5.1 for 7168 x 256, M = 16, and equal where a compute unit has two teams anyway;
//   - one kernel with all tiles (764 bytes of spills);
//   - products in a branch for the lanes that have a chunk in the last round: compilers move the loads there as well, so that
//     every round waits for its own.
#pragma once

#include "device/cluster.h"
#include "expert_sort.h"
#include "router_product.h"

namespace aiter {

// Large ones first.
constexpr TileInstance kTilesAlone[] = {{{8, 8}, ChunksBy::bf16}, {{8, 4}, ChunksBy::bf16},
                                        {{4, 4}, ChunksBy::bf16}, {{4, 2}, ChunksBy::bf16},
                                        {{4, 1}, ChunksBy::wide}, {{2, 2}, ChunksBy::bf16},
                                        {{1, 2}, ChunksBy::bf16}, {{1, 1}, ChunksBy::items}};

// LDS of a workgroup.
constexpr int lds_bytes_alone(TileShape tile) {
  return kSumsOfTeam * tile.rows * tile.experts * static_cast<int>(sizeof(float));
}

// Rounds that a lane holds the chunks of, at most `wanted`.
template <int kRows, int kExperts, typename Chunks>
constexpr int held_rounds(int wanted) {
  constexpr int kWords = sizeof(Round<kRows, kExperts, Chunks, Chunks>) / sizeof(uint32_t);
  const int fit = (kHeldRegisters - kRows * kExperts) / kWords;
  return fit < 1 ? 1 : fit < wanted ? fit : wanted;
}

// All whole chunks. Those of kHeld rounds are held or on their way. In a round in which not all lanes have a chunk, the
// others have zeros that no sum changes by: s = fma(0, -0, s) for every s.
template <int kRows, int kExperts, int kHeld, typename Hidden, typename Weight>
__device__ __forceinline__ void add_rounds(const RouterProduct& p, const Hidden& hidden,
                                           const Weight& weight, TileRows rows, TileRows experts,
                                           float (&sums)[kRows * kExperts]) {
  const int partial = static_cast<int>(threadIdx.x);
  const int num_chunks = p.width / kProductItems;
  const int num_full_rounds = num_chunks / kPartialSums;
  const int num_rounds = (num_chunks + kPartialSums - 1) / kPartialSums;
  Round<kRows, kExperts, Hidden, Weight> held[kHeld];
  // NOTE: the distance to the round `first` is a constant, which becomes one of the instruction.
  const auto load = [&](Round<kRows, kExperts, Hidden, Weight>& round, int first, int distance) {
    const int chunk = first * kPartialSums + partial + distance * kPartialSums;
    if (first + distance >= num_full_rounds) {
      AITER_UNROLL
      for (int x = 0; x < kExperts; ++x) round.of_experts[x] = weight.zeros(true);
      AITER_UNROLL
      for (int r = 0; r < kRows; ++r) round.of_rows[r] = hidden.zeros(false);
      if (chunk >= num_chunks) return;
    }
    round.load(hidden, weight, rows, experts, chunk);
  };
  AITER_UNROLL
  for (int u = 0; u < kHeld; ++u) {
    if (u < num_rounds) load(held[u], 0, u);
  }
  AITER_LOOP
  for (int first = 0; first < num_rounds; first += kHeld) {
    rows = rows.with_new_offsets();
    experts = experts.with_new_offsets();
    AITER_UNROLL
    for (int u = 0; u < kHeld; ++u) {
      if (first + u >= num_rounds) break;
      held[u].add_to(hidden, weight, sums);
      if (first + u + kHeld < num_rounds) load(held[u], first, u + kHeld);
    }
  }
}

// The tile of the workgroup, behind the launch in front. `lds_sums`: [kSumsOfTeam][kRows * kExperts].
template <int kRows, int kExperts, int kHeld, typename Hidden, typename Weight>
__device__ __forceinline__ void product_alone(const RouterProduct& p, const Divisor& by_row_tiles,
                                              const Hidden& hidden, const Weight& weight,
                                              int num_rows, float* lds_sums) {
  constexpr int kLogits = kRows * kExperts;
  static_assert(kLogits <= 2 * kSumNeighbours && (kLogits & (kLogits - 1)) == 0,
                "halves of a tile");
  const int partial = static_cast<int>(threadIdx.x);
  const int idx = static_cast<int>(blockIdx.x);
  const int expert_tile = static_cast<int>(by_row_tiles.quotient(idx));
  const Tile tile{(idx - expert_tile * p.row_tiles) * kRows, expert_tile * kExperts, num_rows};
  const TileRows rows = TileRows::of(p.hidden, p.hidden_stride, tile.first_row, num_rows);
  const TileRows experts =
      TileRows::of(p.weight, p.weight_stride, tile.first_expert, p.num_experts);
  if constexpr (Weight::kHasChunks) {
    if (tile.first_row == 0 && partial < kExperts) {
      prefetch_early(experts.at(partial), weight.chunk_bytes() * (p.width / kProductItems));
    }
  }
  wait_for_earlier_launch();
  let_next_launch_begin();
  const int own = partial % kExperts;
  uint32_t bias = 0;
  if (p.bias_kind != FloatKind::none) {
    bias = load_float_bits(p.bias, p.bias_kind,
                           tile.first_expert + (own < experts.last ? own : experts.last));
  }
  float sums[kLogits] = {};
  if constexpr (Hidden::kHasChunks) {
    add_rounds<kRows, kExperts, kHeld>(p, hidden, weight, rows, experts, sums);
    // Item by item, the last chunk, if it is not whole and this lane's.
    const int num_chunks = p.width / kProductItems;
    if (p.width % kProductItems != 0 && partial == num_chunks % kPartialSums) {
      add_items<kRows, kExperts>(p, hidden, weight, rows, experts, num_chunks, sums);
    }
  } else {
    add_items<kRows, kExperts>(p, hidden, weight, rows, experts, partial, sums);
  }
  const int logit = add_neighbours<kSumNeighbours / 2, kLogits>(sums);
  constexpr int kOfLane = kLogits > kSumNeighbours ? kLogits / kSumNeighbours : 1;
  constexpr int kLanesWithSame = kOfLane * kSumNeighbours / kLogits;
  if (partial % kLanesWithSame == 0) {
    AITER_UNROLL
    for (int i = 0; i < kOfLane; ++i) {
      lds_sums[partial / kSumNeighbours * kLogits + logit + i] = sums[i];
    }
  }
  __syncthreads();
  const int row = tile.first_row + partial / kExperts;
  if (partial < kLogits && row < num_rows && own <= experts.last) {
    float sum = (lds_sums[partial] + lds_sums[kLogits + partial]) +
                (lds_sums[2 * kLogits + partial] + lds_sums[3 * kLogits + partial]);
    if (p.bias_kind != FloatKind::none) sum += float_of_bits(bias, p.bias_kind);
    p.logits[row * p.logits_stride + tile.first_expert + own] = sum;
  }
}

}  // namespace aiter
