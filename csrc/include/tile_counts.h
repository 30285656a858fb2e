// Entries per expert of every tile of rows: what the launch that selects or counts them leaves to the one that places
// them (moe_sorting_opus.h).
//
// A tile is a range of tokens that a workgroup has in either launch. Where there are clusters, those of neighbouring
// tiles form one and add their counts up in LDS, so that a tile's own place comes of a few rows of sums:
//
//   totals [num_groups][E]   of all tiles of a group, which are one cluster's, or of the tile where there are none
//   before [num_tiles][E]    of the tiles before in the group; only where a group has several
//
// In a cluster every workgroup adds up a slice of the experts, which the others send to it: E words in all, and a
// wait of about 1 us that everything behind top-k takes part in.
//
// Measured on an H100 (2026-11-27, us, the strict clock of a C++ program, chain from bf16 logits without zeroing):
//   groups of two, four, eight tiles         512/10, M = 1024   11.4, 9.1, 8.2    896/16   17.8, 13.0, 11.3
//   tiles in clusters that do not fit beside each other (16 of 8 where 15 fit), M = 65,536, top-k alone
//                                            512/10 134 instead of 76    896/16 165 instead of 95
//   of moe_buf, bytes an entry that the launch that places zeroes, M = 65,536, with zeroing
//     48, 96, 128, 160, 192, 256             256/8   326, 324, -, 322, 320, 318    896/16   236, 232, 229, 224, -, 232
//   without the order of moe_sorting_opus.h, whose loads then wait behind what is zeroed, 192 cost 896/16 5 us more
// The four launches that these two replace (top-k, count, assign, scatter) took 16.4 and 21.5 for M = 1024, with zeroing.
// Rejected unmeasured: an atomic addition of each tile to sums that all share, which somebody has to zero first; a ticket
// for the last workgroup of a group, which nobody else may have at that time (handover_tickets.h).
#pragma once

#include <algorithm>

#include "device/cluster.h"
#include "device/team.h"
#include "expert_sort.h"
#include "rows_ahead.h"

namespace aiter {

// The same on every device, as the size of the workspace must not depend on it.
constexpr int kMaxTiles = 128;
constexpr int kMaxTilesAlone = 64;
constexpr int kFewestTokens = 8;  // of a tile
constexpr int kManyTokens = 64;   // of a tile, a multiple of four beyond

constexpr int kMaxSortExperts = 4096;

struct Tiles {
  int tokens;  // of a tile; the last ones may have less, or none
  int count;   // a multiple of
  int group;   // the tiles of a group

  // In groups, of which there can be `most_groups` at a time, or, for 0, each for itself.
  static Tiles choose(int num_tokens, int most_groups) {
    constexpr int kMostAlone = 16;
    const bool in_groups = most_groups != 0;
    const int most =
        in_groups ? std::min(kMaxTiles, most_groups * kWorkgroupsOfCluster) : kMaxTilesAlone;
    Tiles tiles;
    tiles.tokens = std::max(kFewestTokens, (num_tokens + most - 1) / most);
    if (tiles.tokens > kManyTokens) tiles.tokens = (tiles.tokens + 3) / 4 * 4;
    tiles.count = (num_tokens + tiles.tokens - 1) / tiles.tokens;
    tiles.group = in_groups && tiles.count > kMostAlone ? kWorkgroupsOfCluster : 1;
    tiles.count = (tiles.count + tiles.group - 1) / tiles.group * tiles.group;
    return tiles;
  }
  static Tiles choose(int num_tokens, const DeviceLimits& limits) {
    return choose(num_tokens, limits.most_clusters);
  }
  __host__ __device__ int num_groups() const { return count / group; }
  // Of a tile's tokens the first ones, whose rows of moe_buf the launch that counts zeroes. The one that places zeroes the
  // others in the time that it takes anyway, where zeroing needs no registers and no place in the queue of loads.
  int zeroed_first(int topk, uint64_t row_bytes, const DeviceLimits& limits) const {
    constexpr uint64_t kBytesPerEntry = 192;
    if (!limits.copies_in_bulk || row_bytes == 0) return tokens;
    const uint64_t rest = static_cast<uint64_t>(tokens) * topk * kBytesPerEntry / row_bytes;
    return tokens - static_cast<int>(std::min<uint64_t>(tokens, rest));
  }
  // Of a workspace, per expert.
  int64_t num_words() const { return num_groups() + (group > 1 ? count : 0); }
};

// Of a workspace that is enough on every device.
inline int64_t tile_counts_bytes(int num_tokens, int64_t num_experts) {
  int64_t words = 0;
  for (int groups = 0; groups * kWorkgroupsOfCluster <= kMaxTiles; ++groups) {
    words = std::max(words, Tiles::choose(num_tokens, groups).num_words());
  }
  return words * num_experts * static_cast<int64_t>(sizeof(uint32_t));
}

struct TileCounts {
  uint32_t* totals;  // null: nothing is counted
  uint32_t* before;
  int num_experts;
  Tiles tiles;

  static TileCounts in(uint32_t* workspace, int num_experts, const Tiles& tiles) {
    return {workspace, workspace + static_cast<int64_t>(tiles.num_groups()) * num_experts,
            num_experts, tiles};
  }
  // Words of LDS for the counts of a workgroup: whole slices, which are sent four words at a time.
  __host__ __device__ int num_padded() const {
    const int at_once = 4 * tiles.group;
    return (num_experts + at_once - 1) / at_once * at_once;
  }
  // Of a TileCounter.
  size_t lds_bytes() const {
    return kZeroPageBytes + sizeof(FourWords) +
           sizeof(uint32_t) * num_padded() * (tiles.group > 1 ? 2 : 1);
  }
  // Entries of an expert: in all, and before the tile.
  __device__ __forceinline__ ExpertCounts<1> of(int tile, int e) const {
    constexpr int kAtOnce = 16;
    const int group = tile / tiles.group;
    const int num_groups = tiles.num_groups();
    ExpertCounts<1> counts{};
    if (tiles.group > 1) counts.before[0] = before[static_cast<int64_t>(tile) * num_experts + e];
    // NOTE: places go from one to the next, as scalar registers do not suffice for 16 rows' addresses.
    uint32_t place = e;
    AITER_LOOP
    for (int first = 0; first < num_groups; first += kAtOnce) {
      uint32_t loaded[kAtOnce];
      AITER_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        loaded[j] = first + j < num_groups ? totals[place] : 0;
        place += num_experts;
      }
      AITER_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        counts.total[0] += loaded[j];
        if (first + j < group) counts.before[0] += loaded[j];
      }
    }
    return counts;
  }
};

struct TokenRange {
  int first, last;  // last is excluded
};

// Of the tokens first ... first + count - 1 those that there are.
__device__ __forceinline__ TokenRange tokens_there(int64_t first, int64_t count, int num_tokens) {
  const int64_t last = first + count < num_tokens ? first + count : num_tokens;
  return {static_cast<int>(first), static_cast<int>(last)};
}

// Zeroes moe_buf's rows of these tokens, by a wave; `page` is of zeros (zeroing.h).
__device__ __forceinline__ void zero_rows(unsigned char* moe_buf, uint64_t row_bytes,
                                          TokenRange tokens, char* page) {
  if (tokens.first >= tokens.last) return;
  zero_aside(moe_buf + tokens.first * row_bytes, (tokens.last - tokens.first) * row_bytes, page);
}

// A workgroup that counts the entries of the tile blockIdx.x, and zeroes its first rows of moe_buf.
struct TileCounter {
  const TileCounts& out;
  uint32_t* counts;  // [num_padded] in LDS

  // `lds`: of lds_bytes(), on a 128-byte boundary.
  __device__ __forceinline__ TileCounter(const TileCounts& out_, char* lds)
      : out(out_),
        counts(reinterpret_cast<uint32_t*>(lds + kZeroPageBytes + sizeof(FourWords))),
        page(lds),
        inbox(reinterpret_cast<Inbox*>(lds + kZeroPageBytes)) {}

  __device__ __forceinline__ bool in_cluster() const {
    return kMaxClusterSize > 1 && out.tiles.group > 1;
  }
  // Needs no memory. Then counts can be added to.
  __device__ __forceinline__ void begin() const {
    if (in_cluster()) {
      if (threadIdx.x == 0) open_inbox(inbox);
      cluster_arrive();
    }
    const int num_padded = out.num_padded();
    AITER_LOOP
    for (int i = threadIdx.x; i < num_padded; i += blockDim.x) counts[i] = 0;
    fill_zero_page(page);
    __syncthreads();
    if (in_cluster() && threadIdx.x == 0) {
      const int slice = num_padded / out.tiles.group;
      expect_bytes(inbox, sizeof(uint32_t) * slice * (out.tiles.group - 1));
    }
  }
  // Zeroes moe_buf's rows of these tokens, by a wave.
  __device__ __forceinline__ void zero(unsigned char* moe_buf, uint64_t row_bytes,
                                       TokenRange tokens) const {
    zero_rows(moe_buf, row_bytes, tokens, page);
  }
  // By the team that has counted.
  __device__ __forceinline__ void finish(const Team& team) const {
    const int tile = blockIdx.x;
    team.sync();
    if (!in_cluster()) {
      uint32_t* const totals = out.totals + static_cast<int64_t>(tile) * out.num_experts;
      AITER_LOOP
      for (int e = threadIdx.x; e < out.num_experts; e += team.num_threads) totals[e] = counts[e];
      return;
    }
    const int size = out.tiles.group;
    const int rank = tile % size, first_tile = tile - rank;
    const int num_padded = out.num_padded();
    const int slice = num_padded / size;
    FourWords* const words = reinterpret_cast<FourWords*>(counts);
    FourWords* const received = words + num_padded / 4;  // [size][slice / 4]
    cluster_wait();                                      // all workgroups have started
    AITER_LOOP
    for (int i = threadIdx.x; i < num_padded / 4; i += team.num_threads) {
      const int to = i / (slice / 4);
      FourWords* const place = received + rank * (slice / 4) + i % (slice / 4);
      if (to == rank) {
        *place = words[i];
      } else {
        cluster_send(place, inbox, to, words[i]);
      }
    }
    team.sync();
    wait_for_inbox(inbox);
    const uint32_t* const column = reinterpret_cast<const uint32_t*>(received);
    AITER_LOOP
    for (int i = threadIdx.x; i < slice; i += team.num_threads) {
      const int e = rank * slice + i;
      if (e >= out.num_experts) continue;
      uint32_t sum = 0;
      AITER_LOOP
      for (int r = 0; r < size; ++r) {
        out.before[static_cast<int64_t>(first_tile + r) * out.num_experts + e] = sum;
        sum += column[r * slice + i];
      }
      out.totals[static_cast<int64_t>(first_tile / size) * out.num_experts + e] = sum;
    }
  }

 private:
  char* page;  // of zeros
  Inbox* inbox;
};

// Waves of a launch that selects without counts, and the most threads with them.
constexpr int kWavesPerBlock = 4;
constexpr int kCountingThreads = 512;

// What a launch that selects knows of its workgroups' rows, and of what it does beside for a sort that follows.
struct RowsOfBlock {
  int num_rows;            // a tile's, where they are counted
  int num_zeroed;          // of these the first ones, whose rows of moe_buf are zeroed
  uint32_t counts_offset;  // in LDS
  TileCounts counts;
  const int32_t* num_local_tokens;  // rows behind are neither counted nor zeroed; may be null
  unsigned char* moe_buf;
  uint64_t row_bytes;  // of moe_buf
  AheadShape ahead;

  __device__ __forceinline__ bool is_counting() const { return counts.totals != nullptr; }
  // The waves that take rows. With counts there is one more, which zeroes.
  __device__ __forceinline__ Team team() const {
    return {static_cast<int>(blockDim.x) - (is_counting() ? kWaveSize : 0)};
  }
  __device__ __forceinline__ TokenRange tokens(int num_tokens) const {
    return tokens_there(static_cast<int64_t>(blockIdx.x) * num_rows, num_rows, num_tokens);
  }
};

// What the sink of such a launch counts by.
//
// Rejected: the loop over a wave's rows, of topk_softmax.h and topk_routing.h, as a function of both, by a lambda or by
// the range that it returns: f32 rows spill 7 and 10 scalar registers on gfx90a then instead of 4, 7 on gfx950 instead of 3.
struct EntryCounts {
  uint32_t* counts;  // null: nothing is counted
  int num_experts;   // ids from there on are no entries
  int num_local;     // nor are rows from there on

  __device__ __forceinline__ EntryCounts(const RowsOfBlock& rows, const TileCounter& counter,
                                         int num_tokens)
      : counts(nullptr), num_experts(rows.counts.num_experts), num_local(0) {
    if (!rows.is_counting()) return;
    counts = counter.counts;
    num_local = local_tokens(rows.num_local_tokens, num_tokens);
  }
  // Zeroes the tile's first rows of moe_buf, by a wave.
  __device__ __forceinline__ void zero(const RowsOfBlock& rows, const TileCounter& counter,
                                       TokenRange tokens) const {
    if (rows.ahead.row_bytes == 0) let_loads_begin();
    counter.zero(rows.moe_buf, rows.row_bytes,
                 tokens_there(tokens.first, rows.num_zeroed, num_local));
  }
  __device__ __forceinline__ void add(int64_t row, uint32_t id) const {
    if (counts == nullptr || row >= num_local || id >= static_cast<uint32_t>(num_experts)) return;
    atomicAdd(&counts[id], 1u);
  }
};

}  // namespace aiter
