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
// bf16 hidden states and weights in rows on 16-byte boundaries have instances of their own; other kinds on such
// boundaries share two, which ask for the kind at every chunk; and rows anywhere are read item by item, slowly.
//
// NOTE: dot-product instructions are not taken (v_dot2_f32_bf16, tensor cores): how they round between the products of
// an instruction is not the same on all of them.
#pragma once

#include "row_rule.h"

namespace aiter {

constexpr int kProductItems = 8;     // of a chunk
constexpr int kPartialSums = 128;    // lanes of a team
constexpr int kSumNeighbours = 32;   // partial sums that are added first
constexpr int kMaxTileLogits = 32;   // of the tiles of a launch that routes as well
constexpr int kMaxProductTeams = 4;  // of a workgroup
constexpr int kSumsOfTeam = kPartialSums / kSumNeighbours;

// LDS of a workgroup of `num_teams`.
constexpr int product_lds_bytes(int num_teams) {
  return num_teams * kSumsOfTeam * kMaxTileLogits * static_cast<int>(sizeof(float));
}

struct TileShape {
  int rows, experts;
};

// How rows are read, of which each takes less time than the next.
enum class ChunksBy : uint32_t { bf16, wide, items };

// The instances of a launch that routes as well, large ones first, and the slowest way to read that each is there
// for; router_product_alone.h has the others.
struct TileInstance {
  TileShape shape;
  ChunksBy slowest;
};
constexpr TileInstance kTiles[] = {{{8, 4}, ChunksBy::bf16},
                                   {{4, 4}, ChunksBy::bf16},
                                   {{4, 1}, ChunksBy::wide},
                                   {{1, 1}, ChunksBy::items}};

struct RouterProduct {
  const unsigned char* hidden;
  const unsigned char* weight;
  const void* bias;
  float* logits;
  int64_t hidden_stride, weight_stride;  // in bytes
  int64_t logits_stride;                 // in items
  int width, num_experts;                // D', E'
  FloatKind hidden_kind, weight_kind, bias_kind;
  ChunksBy by;
  TileShape tile;  // of an instance
  int row_tiles;   // for M rows
  int num_tiles;
  int tiles_per_block;
};

// Rows of bf16 on 16-byte boundaries.
struct Bf16Chunks {
  using Raw = FourWords;

  static constexpr bool kHasChunks = true;
  __device__ __forceinline__ uint32_t chunk_bytes() const { return sizeof(FourWords); }
  __device__ __forceinline__ Raw load(const unsigned char* row, int chunk) const {
    return reinterpret_cast<const FourWords*>(row)[chunk];
  }
  __device__ __forceinline__ Raw zeros(bool negative) const {
    const uint32_t two = negative ? 0x80008000u : 0u;
    return {{two, two, two, two}};
  }
  __device__ __forceinline__ float item(const Raw& raw, int i) const {
    const uint32_t word = raw.word[i / 2];
    return bit_cast<float>(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
  }
  __device__ __forceinline__ float single(const unsigned char* row, int d) const {
    return to_float(Bf16{reinterpret_cast<const uint16_t*>(row)[d]});
  }
};

// Rows of any kind on 16-byte boundaries.
struct WideChunks {
  FloatKind kind;
  struct Raw {
    float items[kProductItems];
  };

  static constexpr bool kHasChunks = true;
  __device__ __forceinline__ uint32_t chunk_bytes() const {
    return sizeof(FourWords) * (kind == FloatKind::f32 ? 2 : 1);
  }
  __device__ __forceinline__ Raw load(const unsigned char* row, int chunk) const {
    const FourWords* const fours = reinterpret_cast<const FourWords*>(row);
    Raw raw;
    if (kind == FloatKind::f32) {
      const FourWords low = fours[2 * chunk], high = fours[2 * chunk + 1];
      AITER_UNROLL
      for (int i = 0; i < kProductItems; ++i) {
        raw.items[i] = bit_cast<float>(i < 4 ? low.word[i] : high.word[i - 4]);
      }
      return raw;
    }
    const FourWords four = fours[chunk];
    AITER_UNROLL
    for (int i = 0; i < kProductItems; ++i) {
      const auto bits = static_cast<uint16_t>(four.word[i / 2] >> (i % 2 * 16));
      raw.items[i] = kind == FloatKind::bf16 ? to_float(Bf16{bits}) : to_float(F16{bits});
    }
    return raw;
  }
  __device__ __forceinline__ Raw zeros(bool negative) const {
    Raw raw;
    AITER_UNROLL
    for (int i = 0; i < kProductItems; ++i) raw.items[i] = negative ? -0.0f : 0.0f;
    return raw;
  }
  __device__ __forceinline__ float item(const Raw& raw, int i) const { return raw.items[i]; }
  __device__ __forceinline__ float single(const unsigned char* row, int d) const {
    return load_float(row, kind, d);
  }
};

// Rows of any kind, anywhere.
struct Items {
  FloatKind kind;

  static constexpr bool kHasChunks = false;
  __device__ __forceinline__ float single(const unsigned char* row, int d) const {
    return load_float(row, kind, d);
  }
};

// Of a team.
struct Tile {
  int first_row, first_expert;
  int num_rows;  // of all, as many as count
};

// The rows of a matrix that are a tile's, the last one in the place of those behind it.
struct TileRows {
  const unsigned char* first;
  uint32_t stride;  // in bytes; a tile is shorter than 4 GiB
  int last;

  static __device__ __forceinline__ TileRows of(const unsigned char* matrix, int64_t stride,
                                                int first_row, int num_rows) {
    return {matrix + first_row * stride, static_cast<uint32_t>(stride), num_rows - 1 - first_row};
  }
  // NOTE: offsets that are kept from round to round take more scalar registers than AMD GPUs have.
  __device__ __forceinline__ TileRows with_new_offsets() const {
    return {first, stride, anew(last)};
  }
  __device__ __forceinline__ const unsigned char* at(int i) const {
    return first + static_cast<uint32_t>(i < last ? i : last) * stride;
  }
};

template <int kRows, int kExperts>
__device__ __forceinline__ void add_item(const float (&of_row)[kRows],
                                         const float (&of_expert)[kExperts],
                                         float (&sums)[kRows * kExperts]) {
  AITER_UNROLL
  for (int i = 0; i < kRows * kExperts; ++i) {
    sums[i] = fmaf(of_row[i / kExperts], of_expert[i % kExperts], sums[i]);
  }
}

// Item by item, the chunks `chunk`, chunk + kPartialSums, ...
template <int kRows, int kExperts, typename Hidden, typename Weight>
__device__ __forceinline__ void add_items(const RouterProduct& p, const Hidden& hidden,
                                          const Weight& weight, const TileRows& rows,
                                          const TileRows& experts, int chunk,
                                          float (&sums)[kRows * kExperts]) {
  AITER_LOOP
  for (; chunk < (p.width + kProductItems - 1) / kProductItems; chunk += kPartialSums) {
    const int behind = kProductItems * (chunk + 1);
    AITER_LOOP
    for (int d = kProductItems * chunk; d < (behind < p.width ? behind : p.width); ++d) {
      float of_row[kRows], of_expert[kExperts];
      AITER_UNROLL
      for (int r = 0; r < kRows; ++r) of_row[r] = hidden.single(rows.at(r), d);
      AITER_UNROLL
      for (int x = 0; x < kExperts; ++x) of_expert[x] = weight.single(experts.at(x), d);
      add_item<kRows, kExperts>(of_row, of_expert, sums);
    }
  }
}

// A chunk of every row of a tile, as a lane holds them.
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
  __device__ __forceinline__ void add_to(const Hidden& hidden, const Weight& weight,
                                         float (&sums)[kRows * kExperts]) const {
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
};

// Adds to sums[kExperts * r + x] what lane `partial` of a team adds up for row r and expert x of the tile. kAtOnce
// chunks of every row are on their way at once.
template <int kRows, int kExperts, int kAtOnce, typename Hidden, typename Weight>
__device__ __forceinline__ void add_products(const RouterProduct& p, const Hidden& hidden,
                                             const Weight& weight, const Tile& tile, int partial,
                                             float (&sums)[kRows * kExperts]) {
  TileRows rows = TileRows::of(p.hidden, p.hidden_stride, tile.first_row, tile.num_rows);
  TileRows experts = TileRows::of(p.weight, p.weight_stride, tile.first_expert, p.num_experts);
  // The chunk from which on items are taken one by one: the one that is not whole, if it is this lane's.
  int chunk = partial;
  if constexpr (Hidden::kHasChunks) {
    const int num_whole = p.width / kProductItems;
    AITER_LOOP
    for (; chunk < num_whole; chunk += kAtOnce * kPartialSums) {
      rows = rows.with_new_offsets();
      experts = experts.with_new_offsets();
      Round<kRows, kExperts, Hidden, Weight> rounds[kAtOnce];
      AITER_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const int there = chunk + u * kPartialSums < num_whole ? chunk + u * kPartialSums : chunk;
        rounds[u].load(hidden, weight, rows, experts, there);
      }
      AITER_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        if (chunk + u * kPartialSums >= num_whole) break;
        rounds[u].add_to(hidden, weight, sums);
      }
    }
    chunk = partial == num_whole % kPartialSums ? num_whole : p.width;
  }
  add_items<kRows, kExperts>(p, hidden, weight, rows, experts, chunk, sums);
}

// Adds the sums of kSumNeighbours neighbouring lanes, those kDistance lanes apart first. A lane that has more than one
// gives half of them to the other, and keeps the rest: what remains is sums[0] of the logit that is returned, and
// sums[1] of the next where there are two logits for every lane.
template <int kDistance, int kCount, int kAll>
__device__ __forceinline__ int add_neighbours(float (&sums)[kAll]) {
  if constexpr (kDistance == 0) {
    return 0;
  } else if constexpr (kCount == 1) {
    sums[0] += bit_cast<float>(wave_exchange<kDistance>(bit_cast<uint32_t>(sums[0])));
    return add_neighbours<kDistance / 2, 1>(sums);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool is_upper = (lane_idx() & kDistance) != 0;
    AITER_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      // NOTE: copies, as of two places compilers choose the address, and keep the sums in memory.
      const float low = sums[i], high = sums[i + kHalf];
      const float given = is_upper ? low : high;
      const float taken = bit_cast<float>(wave_exchange<kDistance>(bit_cast<uint32_t>(given)));
      sums[i] = (is_upper ? high : low) + taken;
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
  const int team = uniform_wave_idx() / (kPartialSums / kWaveSize);
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
  if (p.by == ChunksBy::bf16) {
    const Bf16Chunks chunks;
    if (is(8, 4)) return product_tiles<8, 4, 1>(p, chunks, chunks, num_rows, lds);
    if (is(4, 4)) return product_tiles<4, 4, 1>(p, chunks, chunks, num_rows, lds);
    if (is(4, 1)) return product_tiles<4, 1, 2>(p, chunks, chunks, num_rows, lds);
    return product_tiles<1, 1, 4>(p, chunks, chunks, num_rows, lds);
  }
  if (p.by == ChunksBy::wide) {
    const WideChunks hidden{p.hidden_kind}, weight{p.weight_kind};
    if (is(4, 1)) return product_tiles<4, 1, 1>(p, hidden, weight, num_rows, lds);
    return product_tiles<1, 1, 2>(p, hidden, weight, num_rows, lds);
  }
  product_tiles<1, 1, 1>(p, Items{p.hidden_kind}, Items{p.weight_kind}, num_rows, lds);
}

}  // namespace aiter
