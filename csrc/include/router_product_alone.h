// The router's product in a launch of its own: the same bits as router_product.h, whose sums and helpers these are.
//
// A workgroup is one team with one tile, and a tile has a kernel, so that lanes have up to 255 registers and code is
// short. Chunks of up to seven rounds, which is all of 7,168 items, are on their way while a round is multiplied.
//
// What was measured, us of the product and the fused launch behind it (H100, strict clock of
// bench_fused_router_sorting.py, bf16, 2026-11-26), for M = 1, 4, 16, 64:
//                                         2880 x 128, K=4         7168 x 256, K=8         4096 x 512, K=10
//   the code of router_product.h          3.65 4.13 4.62 7.05     4.98 6.04 8.55 14.6     4.98 6.02 9.66 18.3
//   this                                  3.21 4.12 4.69 6.92     4.65 5.95 7.75 13.7     4.92 6.07 9.62 17.3
//   torch.nn.functional.linear            6.95 7.33 7.39 8.51     7.37 7.81 8.65 9.43     7.85 8.60 10.4 11.0
//   this, with a bias                     3.44 4.21 4.73 6.95     4.84 6.14 7.63 13.9     5.14 6.46 9.69 17.4
//   linear, with a bias                   7.36 7.64 7.72 8.82     7.99 8.44 8.94 9.68     8.53 8.95 10.5 11.3
//
// From M = 16 on it is the level 2 cache that takes the time: tiles of 8 x 4 of 16 x 256 logits read 22 MB from it, of
// 64 x 256 91 MB, and it gives 5 to 6 TB/s; tensor cores, which cuBLAS has, need larger tiles and less of that.
//
// Rejected: chunks through LDS by cp.async, shared by the teams of a workgroup, a ring of 4 or 8 rounds (3.82 4.62 5.25
// 7.71, 5.31 6.47 11.2 16.0, 5.48 6.66 10.7 20.1: 25 instructions for a copy where a load is one, and teams that wait
// for each other); teams side by side, that find each other's rows in the level 1 cache (15.3 for 7168 x 256, M = 64);
// one kernel with all tiles (764 bytes of spills, 3.95 to 17.7); products in a branch for the lanes that have a chunk
// in the last round, for which compilers move the loads there as well, so that every round waits for its own.
#pragma once

#include "router_product.h"

namespace aiter {

// Large ones first.
constexpr TileInstance kTilesAlone[] = {{{8, 8}, ChunksBy::bf16}, {{8, 4}, ChunksBy::bf16},
                                        {{4, 4}, ChunksBy::bf16}, {{4, 2}, ChunksBy::bf16},
                                        {{4, 1}, ChunksBy::wide}, {{1, 4}, ChunksBy::bf16},
                                        {{1, 2}, ChunksBy::bf16}, {{1, 1}, ChunksBy::items}};

// LDS of a workgroup.
constexpr int lds_bytes_alone(TileShape tile) {
  return kSumsOfTeam * tile.rows * tile.experts * static_cast<int>(sizeof(float));
}

// The items of a chunk of every row.
template <typename Hidden, typename Weight, int kRows, int kExperts>
__device__ __forceinline__ void add_chunk(const Hidden& hidden, const Weight& weight,
                                          const typename Hidden::Raw (&of_rows)[kRows],
                                          const typename Weight::Raw (&of_experts)[kExperts],
                                          float (&sums)[kRows * kExperts]) {
  AITER_UNROLL
  for (int i = 0; i < kProductItems; ++i) {
    float of_row[kRows], of_expert[kExperts];
    AITER_UNROLL
    for (int r = 0; r < kRows; ++r) of_row[r] = hidden.item(of_rows[r], i);
    AITER_UNROLL
    for (int x = 0; x < kExperts; ++x) of_expert[x] = weight.item(of_experts[x], i);
    add_item<kRows, kExperts>(of_row, of_expert, sums);
  }
}

// Items that no sum changes by, s = fma(-0, 0, s) for every s, in the place of those that are not there.
__device__ __forceinline__ FourWords or_zeros(const Bf16Chunks&, bool is_there,
                                              const FourWords& raw, bool negative) {
  const uint32_t zeros = negative ? 0x80008000u : 0u;
  FourWords chosen;
  AITER_UNROLL
  for (int i = 0; i < 4; ++i) chosen.word[i] = is_there ? raw.word[i] : zeros;
  return chosen;
}
__device__ __forceinline__ WideChunks::Raw or_zeros(const WideChunks&, bool is_there,
                                                    const WideChunks::Raw& raw, bool negative) {
  const float zero = negative ? -0.0f : 0.0f;
  WideChunks::Raw chosen;
  AITER_UNROLL
  for (int i = 0; i < kProductItems; ++i) chosen.items[i] = is_there ? raw.items[i] : zero;
  return chosen;
}

// What lanes load in a round: a chunk of each row of a tile.
template <int kRows, int kExperts, typename Hidden, typename Weight>
struct Round {
  typename Hidden::Raw of_rows[kRows];
  typename Weight::Raw of_experts[kExperts];

  __device__ __forceinline__ void load(const Hidden& hidden, const Weight& weight,
                                       const TileRows& rows, const TileRows& experts, int chunk) {
    AITER_UNROLL
    for (int x = 0; x < kExperts; ++x) of_experts[x] = weight.load(experts.at(x), chunk);
    AITER_UNROLL
    for (int r = 0; r < kRows; ++r) of_rows[r] = hidden.load(rows.at(r), chunk);
  }
  // For sums that stay as they are.
  __device__ __forceinline__ void drop_unless(const Hidden& hidden, const Weight& weight,
                                              bool is_there) {
    AITER_UNROLL
    for (int x = 0; x < kExperts; ++x) {
      of_experts[x] = or_zeros(weight, is_there, of_experts[x], false);
    }
    AITER_UNROLL
    for (int r = 0; r < kRows; ++r) of_rows[r] = or_zeros(hidden, is_there, of_rows[r], true);
  }
};

// All whole chunks. Those of kAhead rounds are on their way while one is multiplied; a lane that has no chunk in the
// last round multiplies zeros.
template <int kRows, int kExperts, int kAhead, typename Hidden, typename Weight>
__device__ __forceinline__ void add_rounds(const RouterProduct& p, const Hidden& hidden,
                                           const Weight& weight, TileRows rows, TileRows experts,
                                           float (&sums)[kRows * kExperts]) {
  constexpr int kSlots = kAhead == 0 ? 1 : kAhead;
  const int partial = static_cast<int>(threadIdx.x);
  const int num_whole = p.width / kProductItems;
  const int num_rounds = (num_whole + kPartialSums - 1) / kPartialSums;
  const auto chunk_of = [&](int round) {
    const int chunk = round * kPartialSums + partial;
    return chunk < num_whole ? chunk : num_whole - 1;
  };
  Round<kRows, kExperts, Hidden, Weight> slots[kSlots];
  if constexpr (kAhead > 0) {
    AITER_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      if (u < num_rounds) slots[u].load(hidden, weight, rows, experts, chunk_of(u));
    }
  }
  AITER_LOOP
  for (int first = 0; first < num_rounds; first += kSlots) {
    rows = rows.with_new_offsets();
    experts = experts.with_new_offsets();
    AITER_UNROLL
    for (int u = 0; u < kSlots; ++u) {
      const int round = first + u;
      if (round >= num_rounds) break;
      if constexpr (kAhead == 0) slots[u].load(hidden, weight, rows, experts, chunk_of(round));
      auto current = slots[u];
      if (kAhead > 0 && round + kAhead < num_rounds) {
        slots[u].load(hidden, weight, rows, experts, chunk_of(round + kAhead));
      }
      current.drop_unless(hidden, weight, round * kPartialSums + partial < num_whole);
      add_chunk(hidden, weight, current.of_rows, current.of_experts, sums);
    }
  }
}

// The tile of the workgroup. `lds_sums`: [kSumsOfTeam][kRows * kExperts].
template <int kRows, int kExperts, int kAhead, typename Hidden, typename Weight>
__device__ __forceinline__ void product_alone(const RouterProduct& p, const Hidden& hidden,
                                              const Weight& weight, int num_rows, float* lds_sums) {
  constexpr int kLogits = kRows * kExperts;
  static_assert(kLogits <= 2 * kSumNeighbours && (kLogits & (kLogits - 1)) == 0,
                "halves of a tile");
  const int partial = static_cast<int>(threadIdx.x);
  const int idx = static_cast<int>(blockIdx.x);
  const int expert_tile = idx / p.row_tiles;
  const Tile tile{(idx - expert_tile * p.row_tiles) * kRows, expert_tile * kExperts, num_rows};
  const TileRows rows = TileRows::of(p.hidden, p.hidden_stride, tile.first_row, num_rows);
  const TileRows experts =
      TileRows::of(p.weight, p.weight_stride, tile.first_expert, p.num_experts);
  // On its way with the chunks.
  const int own = partial % kExperts;
  float bias = 0.0f;
  if (p.bias_kind != FloatKind::none) {
    bias = load_float(p.bias, p.bias_kind,
                      tile.first_expert + (own < experts.last ? own : experts.last));
  }
  float sums[kLogits] = {};
  // Item by item, the chunk that is not whole, if it is this lane's, or all of them.
  int chunk = partial;
  if constexpr (Hidden::kHasChunks) {
    add_rounds<kRows, kExperts, kAhead>(p, hidden, weight, rows, experts, sums);
    const int num_whole = p.width / kProductItems;
    chunk = partial == num_whole % kPartialSums ? num_whole : p.width;
  }
  add_items<kRows, kExperts>(p, hidden, weight, rows, experts, chunk, sums);
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
    if (p.bias_kind != FloatKind::none) sum += bias;
    p.logits[row * p.logits_stride + tile.first_expert + own] = sum;
  }
}

}  // namespace aiter
