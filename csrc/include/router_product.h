// What are the router's logits? Hidden states times the router's weight, in an order that nothing changes.
//
//   logits[t, e] = sum over d of hidden[t, d] * weight[e, d]  + bias[e]
//
//   hidden  [M, D'] f32/f16/bf16, weight [E', D'] f32/f16/bf16, bias [E'] f32/f16/bf16 or none; rows of both any
//           number of bytes apart. logits [M, E'] f32
//
// The order is the contract's (docs/contract.md), the same for every M, tile, workgroup, wave width and target:
//   chunk c       items 8c to 8c + 7 of a row; the last one may have fewer
//   partial sum p 0 to 127: over the chunks p, p + 128, p + 256, ..., item by item, s = fma(hidden, weight, s) from 0
//   32 neighbours p and p + 16 are added, then p and p + 8, 4, 2, 1
//   the rest      (r0 + r1) + (r2 + r3) of the four that remain, and then the bias
//
// 128 lanes, a *team*, take a tile of kRows x kExperts logits: lane p has partial sum p of each, and so loads its chunk of
// every row and expert once. With 128 partial sums, a single row and expert of 2,880 items are 3 loads of 16 bytes for
// a lane, all on their way at once, and 7,168 are 7. Sums over 32 neighbours halve the logits that a lane has in
// each step: 31 exchanges for a tile of 32, where a reduction of each would take 160. The rest goes through LDS.
//
// Rows and experts behind the last are read as the last one, and not stored. A wave's lanes take neighbouring chunks,
// so loads are whole lines. Tiles are ordered by expert and then by row, so that teams of a workgroup have the
// same experts where there are several tiles of rows.
//
// bf16 hidden states and weights in rows on 16-byte boundaries have instances of their own; all other kinds share two,
// which ask for the kind at every item.
//
// NOTE: dot-product instructions are not taken (v_dot2_f32_bf16, tensor cores): how they round between the products of
// an instruction is not the same on all of them. Nothing here was measured on a GPU so far.
#pragma once

#include "row_rule.h"

namespace aiter {

constexpr int kProductItems = 8;     // of a chunk
constexpr int kPartialSums = 128;    // lanes of a team
constexpr int kSumNeighbours = 32;   // partial sums that are added first
constexpr int kMaxTileLogits = 32;   // of the tiles below
constexpr int kMaxProductTeams = 4;  // of a workgroup
constexpr int kSumsOfTeam = kPartialSums / kSumNeighbours;

// LDS of a workgroup of `num_teams`.
constexpr int product_lds_bytes(int num_teams) {
  return num_teams * kSumsOfTeam * kMaxTileLogits * static_cast<int>(sizeof(float));
}

struct TileShape {
  int rows, experts;
};

// The instances, large ones first; kinds without instances of their own have those that are `for_any`.
struct TileInstance {
  TileShape shape;
  bool for_any;
};
constexpr TileInstance kTiles[] = {
    {{8, 4}, false}, {{4, 4}, true}, {{4, 1}, false}, {{1, 1}, true}};

struct RouterProduct {
  const unsigned char* hidden;
  const unsigned char* weight;
  const void* bias;
  float* logits;
  int64_t hidden_stride, weight_stride;  // in bytes
  int64_t logits_stride;                 // in items
  int width, num_experts;                // D', E'
  FloatKind hidden_kind, weight_kind, bias_kind;
  uint32_t wide;     // rows of both begin on 16-byte boundaries
  uint32_t by_bf16;  // the instances for bf16
  TileShape tile;    // of an instance
  int row_tiles;     // for M rows
  int num_tiles;
  int tiles_per_block;
};

struct RawChunk {
  FourWords half[2];  // of 16-bit items the first
};

__device__ __forceinline__ uint32_t bf16_item(const FourWords& words, int i) {
  const uint32_t word = words.word[i / 2];
  return i % 2 == 0 ? word << 16 : word & 0xffff0000u;
}

// Rows of bf16 on 16-byte boundaries.
struct Bf16Chunks {
  struct Raw {
    FourWords words;
  };
  __device__ __forceinline__ Raw load(const unsigned char* row, int chunk) const {
    return {reinterpret_cast<const FourWords*>(row)[chunk]};
  }
  __device__ __forceinline__ float item(const Raw& raw, int i) const {
    return bit_cast<float>(bf16_item(raw.words, i));
  }
};

// Rows of any kind, anywhere.
struct AnyChunks {
  FloatKind kind;
  bool wide;

  using Raw = RawChunk;
  __device__ __forceinline__ Raw load(const unsigned char* row, int chunk) const {
    Raw raw{};
    if (wide) {
      const FourWords* const fours = reinterpret_cast<const FourWords*>(row);
      if (kind == FloatKind::f32) {
        raw.half[0] = fours[2 * chunk];
        raw.half[1] = fours[2 * chunk + 1];
      } else {
        raw.half[0] = fours[chunk];
      }
      return raw;
    }
    const int first = chunk * kProductItems;
    AITER_UNROLL
    for (int i = 0; i < kProductItems; ++i) {
      if (kind == FloatKind::f32) {
        raw.half[i / 4].word[i % 4] = reinterpret_cast<const uint32_t*>(row)[first + i];
      } else {
        const uint32_t bits = reinterpret_cast<const uint16_t*>(row)[first + i];
        raw.half[0].word[i / 2] |= bits << (i % 2 * 16);
      }
    }
    return raw;
  }
  __device__ __forceinline__ float item(const Raw& raw, int i) const {
    if (kind == FloatKind::f32) return bit_cast<float>(raw.half[i / 4].word[i % 4]);
    const uint32_t high = bf16_item(raw.half[0], i);
    if (kind == FloatKind::bf16) return bit_cast<float>(high);
    return to_float(F16{static_cast<uint16_t>(high >> 16)});
  }
};

// Of a team.
struct Tile {
  int first_row, first_expert;
  int num_rows;  // of all, as many as count
};

// Adds to sums[kExperts * r + x] what lane `partial` of a team adds up for row r and expert x of the tile. kAtOnce
// chunks of every row are on their way at once.
template <int kRows, int kExperts, int kAtOnce, typename Hidden, typename Weight>
__device__ __forceinline__ void add_products(const RouterProduct& p, const Hidden& hidden,
                                             const Weight& weight, const Tile& tile, int partial,
                                             float (&sums)[kRows * kExperts]) {
  const unsigned char* rows[kRows];
  const unsigned char* experts[kExperts];
  AITER_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int row = tile.first_row + r;
    rows[r] = p.hidden + (row < tile.num_rows ? row : tile.num_rows - 1) * p.hidden_stride;
  }
  AITER_UNROLL
  for (int x = 0; x < kExperts; ++x) {
    const int expert_idx = tile.first_expert + x;
    experts[x] =
        p.weight + (expert_idx < p.num_experts ? expert_idx : p.num_experts - 1) * p.weight_stride;
  }
  const int num_whole = p.width / kProductItems;
  AITER_LOOP
  for (int first = partial; first < num_whole; first += kAtOnce * kPartialSums) {
    typename Hidden::Raw row_chunks[kAtOnce][kRows];
    typename Weight::Raw expert_chunks[kAtOnce][kExperts];
    AITER_UNROLL
    for (int u = 0; u < kAtOnce; ++u) {
      const int chunk = first + u * kPartialSums;
      const int there = chunk < num_whole ? chunk : first;
      AITER_UNROLL
      for (int x = 0; x < kExperts; ++x) expert_chunks[u][x] = weight.load(experts[x], there);
      AITER_UNROLL
      for (int r = 0; r < kRows; ++r) row_chunks[u][r] = hidden.load(rows[r], there);
    }
    AITER_UNROLL
    for (int u = 0; u < kAtOnce; ++u) {
      if (first + u * kPartialSums >= num_whole) break;
      AITER_UNROLL
      for (int i = 0; i < kProductItems; ++i) {
        float of_expert[kExperts];
        AITER_UNROLL
        for (int x = 0; x < kExperts; ++x) of_expert[x] = weight.item(expert_chunks[u][x], i);
        AITER_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const float of_row = hidden.item(row_chunks[u][r], i);
          AITER_UNROLL
          for (int x = 0; x < kExperts; ++x) {
            float& sum = sums[kExperts * r + x];
            sum = fmaf(of_row, of_expert[x], sum);
          }
        }
      }
    }
  }
  if (partial != num_whole % kPartialSums) return;
  AITER_LOOP
  for (int d = num_whole * kProductItems; d < p.width; ++d) {
    AITER_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float of_row = load_float(rows[r], p.hidden_kind, d);
      AITER_UNROLL
      for (int x = 0; x < kExperts; ++x) {
        float& sum = sums[kExperts * r + x];
        sum = fmaf(of_row, load_float(experts[x], p.weight_kind, d), sum);
      }
    }
  }
}

// Adds the sums of kSumNeighbours neighbouring lanes, those kDistance lanes apart first. A lane that has more than one
// gives half of them to the other, and keeps the rest: what remains is sums[0], of the logit that is returned.
template <int kDistance, int kCount, int kAll>
__device__ __forceinline__ int add_neighbours(float (&sums)[kAll]) {
  if constexpr (kDistance == 0) {
    static_assert(kCount == 1, "one logit for a lane");
    return 0;
  } else if constexpr (kCount == 1) {
    sums[0] += bit_cast<float>(wave_exchange<kDistance>(bit_cast<uint32_t>(sums[0])));
    return add_neighbours<kDistance / 2, 1>(sums);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool is_upper = (lane_idx() & kDistance) != 0;
    AITER_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      const float kept = is_upper ? sums[i + kHalf] : sums[i];
      const float given = is_upper ? sums[i] : sums[i + kHalf];
      sums[i] = kept + bit_cast<float>(wave_exchange<kDistance>(bit_cast<uint32_t>(given)));
    }
    return (is_upper ? kHalf : 0) + add_neighbours<kDistance / 2, kHalf>(sums);
  }
}

// All tiles of a workgroup, by all its threads, a multiple of kPartialSums. `lds`: product_lds_bytes() of its teams.
template <int kRows, int kExperts, int kAtOnce, typename Hidden, typename Weight>
__device__ inline void product_tiles(const RouterProduct& p, const Hidden& hidden,
                                     const Weight& weight, int num_rows, float* lds) {
  constexpr int kLogits = kRows * kExperts;
  static_assert(kLogits <= kMaxTileLogits && (kLogits & (kLogits - 1)) == 0, "halves of the tile");
  const int num_teams = static_cast<int>(blockDim.x) / kPartialSums;
  const int team = static_cast<int>(threadIdx.x) / kPartialSums;
  const int partial = static_cast<int>(threadIdx.x) % kPartialSums;
  float* const lds_sums = lds + team * kSumsOfTeam * kMaxTileLogits;  // [kSumsOfTeam][kLogits]
  const int first_tile = static_cast<int>(blockIdx.x) * p.tiles_per_block;
  AITER_LOOP
  for (int first = 0; first < p.tiles_per_block; first += num_teams) {
    const int idx = first_tile + first + team;
    const Tile tile{idx % p.row_tiles * kRows, idx / p.row_tiles * kExperts, num_rows};
    const bool is_there =
        first + team < p.tiles_per_block && idx < p.num_tiles && tile.first_row < num_rows;
    if (is_there) {
      float sums[kLogits] = {};
      add_products<kRows, kExperts, kAtOnce>(p, hidden, weight, tile, partial, sums);
      const int logit = add_neighbours<kSumNeighbours / 2, kLogits>(sums);
      constexpr int kLanesWithSame = kSumNeighbours / kLogits;
      if (partial % kLanesWithSame == 0) {
        lds_sums[partial / kSumNeighbours * kLogits + logit] = sums[0];
      }
    }
    __syncthreads();
    const int row = tile.first_row + partial / kExperts;
    const int expert_idx = tile.first_expert + partial % kExperts;
    if (is_there && partial < kLogits && row < num_rows && expert_idx < p.num_experts) {
      float logit = (lds_sums[partial] + lds_sums[kLogits + partial]) +
                    (lds_sums[2 * kLogits + partial] + lds_sums[3 * kLogits + partial]);
      if (p.bias_kind != FloatKind::none) logit += load_float(p.bias, p.bias_kind, expert_idx);
      p.logits[row * p.logits_stride + expert_idx] = logit;
    }
    __syncthreads();
  }
}

// The workgroup's share of the first `num_rows` rows of logits.
__device__ __forceinline__ void multiply(const RouterProduct& p, int num_rows, float* lds) {
  const auto is = [&](int rows, int experts) {
    return p.tile.rows == rows && p.tile.experts == experts;
  };
  if (p.by_bf16 != 0) {
    const Bf16Chunks chunks;
    if (is(8, 4)) return product_tiles<8, 4, 1>(p, chunks, chunks, num_rows, lds);
    if (is(4, 4)) return product_tiles<4, 4, 2>(p, chunks, chunks, num_rows, lds);
    if (is(4, 1)) return product_tiles<4, 1, 3>(p, chunks, chunks, num_rows, lds);
    return product_tiles<1, 1, 4>(p, chunks, chunks, num_rows, lds);
  }
  const AnyChunks hidden{p.hidden_kind, p.wide != 0}, weight{p.weight_kind, p.wide != 0};
  if (is(4, 4)) return product_tiles<4, 4, 1>(p, hidden, weight, num_rows, lds);
  return product_tiles<1, 1, 2>(p, hidden, weight, num_rows, lds);
}

}  // namespace aiter
