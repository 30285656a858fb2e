// The block-padded counting sort by expert, as pieces that one workgroup runs in LDS: what the
// fused launch, the oneshot sort and the multi-phase sort share.
//
// Long because these pieces share one picture of LDS and of the outputs, which a reader needs at once.
//
//   experts with c_e > 0 entries get ceil(c_e / B) blocks of B slots, experts ascending
//   entry (t, k) of expert e goes to slot  start_e + (number of tokens before t that chose e)
//   slots start_e + c_e ... up to the next block hold padding: id (K << 24) | n, weight 0
//
// That is the slot format. With kAny, ids may be flat instead, an entry's t * K + k and padding M * K, and experts
// that expert_mask leaves out then have blocks like others, whose expert id is -1; and the experts from num_real
// on, which compute nothing, are left out like those. Without it kernels have none of these questions.
//
// Ranks come from a token x expert bitmask, one bit per (token, expert): the number of tokens
// before t is a popcount over the words before t's and the bits below t's. That needs M*E/8 bytes, is
// stable by construction, and no entry waits for another. Words are stored [word][expert], so that
// lanes that walk over experts hit different LDS banks.
//
// A thread per one or two neighbouring experts takes part in a prefix sum over the numbers of blocks, which leaves every
// expert's first slot and tail, the place where padding begins, in LDS; all threads then write entries and
// padding, four slots per store. Where no expert can have more than one block, single_blocks.h does it.
//
// Two experts a thread are for rows of more than four waves have threads for: of 896 experts the prefix sums of 28 waves took 3,800 cycles on an H100,
// of 14 waves 1,900, as most of it is the same instructions in every wave (clock64(), M = 16).
//
// Rejected: a token x expert table of words (32 times the LDS); atomic counters for ranks
// (their order is the order of arrival, not the token order that the format asks for). Two experts a thread for 128
// experts, whose two waves do not fill the SIMDs (oneshot sort, H100, M = 1: 3.16 -> 3.38 us); four, which 128
// experts need one wave and no barrier for (fused, M = 64: 3.03 -> 3.67).
#pragma once

#include "device/numeric.h"
#include "device/wave.h"
#include "device/zeroing.h"

namespace aiter {

constexpr int kTokensPerWord = 32;
constexpr int kSlotShift = 24;  // sorted_ids: token in the bits below, slot above
constexpr uint32_t kNoSlot = 0xffffffffu;
constexpr uint32_t kNoExpertId = 0xffffffffu;  // -1: of a block that is no local expert's

// Slot k of a token, and what it weighs.
struct Entry {
  uint32_t expert_idx;
  int token, k;
  float weight;
};

// The arguments that every sort kernel has.
struct SortParams {
  int32_t* sorted_ids;
  float* sorted_weights;
  int32_t* sorted_expert_ids;
  int32_t* num_valid_ids;
  unsigned char* moe_buf;
  uint64_t row_bytes;               // of moe_buf
  const int32_t* expert_mask;       // may be null
  const int32_t* num_local_tokens;  // may be null
};

// Division by a number d that the host knows, for n < 2^31. With 2^s >= d > 2^(s-1) and m = 2^(31+s) / d
// rounded up, n m / 2^(31+s) exceeds n / d by less than n / 2^(31+s) < 2^-s <= 1 / d, which cannot
// reach the next integer; and m fits in 32 bits.
struct Divisor {
  uint32_t magic;  // m
  int shift;       // 31 + s

  static Divisor of(uint32_t divisor) {
    int shift = 31;
    while ((uint64_t{1} << (shift - 31)) < divisor) ++shift;
    return {static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor), shift};
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * magic >> shift);
  }
};

struct SortShape {
  int num_tokens;   // M
  int num_experts;  // E
  int topk;         // K
  int block_size;   // B
  Divisor by_topk, by_block_size;
  bool wide_stores;  // four slots may be stored at once: B % 4 == 0, buffers on 16-byte boundaries
  bool flat_ids;     // these two count with kAny only
  int num_real;      // experts that compute something, which expert_mask is about: the first ones
};

// What the device says in num_local_tokens, as far as it makes sense.
__device__ __forceinline__ int clamp_tokens(int said, int num_tokens) {
  return said < 0 ? 0 : (said < num_tokens ? said : num_tokens);
}

// M, or what the device says in num_local_tokens.
__device__ __forceinline__ int local_tokens(const int32_t* num_local_tokens, int num_tokens) {
  if (num_local_tokens == nullptr) return num_tokens;
  return clamp_tokens(num_local_tokens[0], num_tokens);
}

__host__ __device__ constexpr int hit_words(int num_tokens) {
  return static_cast<int>((static_cast<uint32_t>(num_tokens) + kTokensPerWord - 1) /
                          kTokensPerWord);
}

// Neighbouring experts that a thread handles, of rows with place for `num_places`. Four waves are what a compute unit
// works on at the same time.
__host__ __device__ constexpr int experts_per_thread(int num_places, int wave_size) {
  return num_places <= 4 * wave_size ? 1 : 2;
}

// Entries of kAtOnce neighbouring experts, in all and before the workgroup's first.
template <int kAtOnce>
struct ExpertCounts {
  uint32_t total[kAtOnce], before[kAtOnce];
};

// The token x expert bitmask in LDS.
struct HitMask {
  uint32_t* words;  // [num_words][stride]
  int stride;       // E or more
  int num_words;

  __device__ __forceinline__ void clear(int num_threads) const {
    AITER_LOOP
    for (int i = threadIdx.x; i < stride * num_words; i += num_threads) words[i] = 0;
  }
  __device__ __forceinline__ void set(int token, uint32_t expert_idx) const {
    atomicOr(&words[(token / kTokensPerWord) * stride + expert_idx],
             1u << (token % kTokensPerWord));
  }
  // As set(); not 0 if the bit was set before.
  __device__ __forceinline__ uint32_t set_again(int token, uint32_t expert_idx) const {
    const uint32_t bit = 1u << (token % kTokensPerWord);
    return atomicOr(&words[(token / kTokensPerWord) * stride + expert_idx], bit) & bit;
  }
  __device__ __forceinline__ uint32_t count(int expert_idx) const {
    uint32_t sum = 0;
    AITER_LOOP
    for (int w = 0; w < num_words; ++w) sum += __popc(words[w * stride + expert_idx]);
    return sum;
  }
  __device__ __forceinline__ bool any(int expert_idx) const {
    uint32_t all = 0;
    AITER_LOOP
    for (int w = 0; w < num_words; ++w) all |= words[w * stride + expert_idx];
    return all != 0;
  }
  // Of the experts expert_idx ... expert_idx + kAtOnce - 1, of which those from the stride on count nothing.
  template <int kAtOnce>
  __device__ __forceinline__ ExpertCounts<kAtOnce> counts(int expert_idx) const {
    ExpertCounts<kAtOnce> sum{};
    AITER_LOOP
    for (int w = 0; w < num_words; ++w) {
      AITER_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (expert_idx + i < stride) sum.total[i] += __popc(words[w * stride + expert_idx + i]);
      }
    }
    return sum;
  }
  // Tokens before `token` that chose the expert.
  __device__ __forceinline__ uint32_t rank(uint32_t token, uint32_t expert_idx) const {
    const uint32_t* column = words + expert_idx;
    uint32_t sum = 0;
    AITER_LOOP
    for (uint32_t w = 0; w < token / kTokensPerWord; ++w) sum += __popc(column[w * stride]);
    const uint32_t below = (1u << (token % kTokensPerWord)) - 1;
    return sum + __popc(column[token / kTokensPerWord * stride] & below);
  }
};

__device__ __forceinline__ bool is_local(const int32_t* expert_mask, uint32_t expert_idx) {
  return expert_mask == nullptr || expert_mask[expert_idx] != 0;
}

template <bool kAny>
__device__ __forceinline__ bool leaves_out(const SortShape& shape, const SortParams& out) {
  return out.expert_mask != nullptr || (kAny && shape.num_real < shape.num_experts);
}

template <bool kAny>
__device__ __forceinline__ bool is_local(const SortShape& shape, const SortParams& out,
                                         uint32_t expert_idx) {
  if (kAny && expert_idx >= static_cast<uint32_t>(shape.num_real)) return false;
  return is_local(out.expert_mask, expert_idx);
}

// Where a workgroup keeps what it knows of every expert, in LDS.
struct SortLds {
  uint32_t* starts;  // [E] slot of its first entry of the expert; kNoSlot if expert_mask drops it
  uint32_t* tails;   // [E] slots where padding begins, up to the end of the block; kNoSlot: none
  uint32_t* totals;  // [2][kMaxWavesPerBlock]
};

// Which of the experts e ... e + kAtOnce - 1 exist and are is_local(), as bits.
template <bool kAny, int kAtOnce>
__device__ __forceinline__ uint32_t local_experts(const SortShape& shape,
                                                  const int32_t* expert_mask, int e) {
  const int behind = kAny ? shape.num_real : shape.num_experts;
  uint32_t bits = 0;
  AITER_UNROLL
  for (int i = 0; i < kAtOnce; ++i) {
    if (e + i < behind && is_local(expert_mask, e + i)) bits |= 1u << i;
  }
  return bits;
}

// Of a workgroup's waves those up to the last that has one of the first `num_wanted` threads, and a multiple
// of what over_workgroup() takes at once, as the workgroup's own number of waves is.
__device__ __forceinline__ int active_waves(int num_wanted, int num_threads) {
  constexpr int kThreadsAtOnce = kTotalsAtOnce * kWaveSize;
  const int wanted = (num_wanted + kThreadsAtOnce - 1) / kThreadsAtOnce * kTotalsAtOnce;
  const int present = num_threads / kWaveSize;
  return wanted < present ? wanted : present;
}

// Writes the expert ids of blocks, each lane those of an expert; if there are many, the whole wave does.
__device__ __forceinline__ void write_expert_ids(int32_t* sorted_expert_ids, uint32_t first_block,
                                                 uint32_t num_blocks, uint32_t id) {
  constexpr uint32_t kMaxOwnBlocks = 4;
  AITER_LOOP
  for (uint32_t b = 0; b < num_blocks && b < kMaxOwnBlocks; ++b) {
    sorted_expert_ids[first_block + b] = static_cast<int32_t>(id);
  }
  wave_for_each(num_blocks > kMaxOwnBlocks, [&](int lane) {
    const uint32_t first = wave_read_lane(first_block, lane);
    const uint32_t last = first + wave_read_lane(num_blocks, lane);
    const uint32_t id_of_lane = wave_read_lane(id, lane);
    AITER_LOOP
    for (uint32_t b = first + kMaxOwnBlocks + lane_idx(); b < last; b += kWaveSize) {
      sorted_expert_ids[b] = static_cast<int32_t>(id_of_lane);
    }
  });
}

__device__ __forceinline__ void write_num_valid_ids(const SortShape& shape, const SortParams& out,
                                                    uint32_t num_blocks, int num_local) {
  out.num_valid_ids[0] = static_cast<int32_t>(num_blocks * shape.block_size);
  out.num_valid_ids[1] = num_local;
}

// Gives the experts from e on the blocks from `block` on: fills what LDS holds of them and, if `writes_ids`, writes the
// blocks' ids, of which `id` is that of the first expert that is local.
template <bool kAny, int kAtOnce>
__device__ __forceinline__ void place_experts(const SortShape& shape, int e, uint32_t local,
                                              const ExpertCounts<kAtOnce>& counts,
                                              const uint32_t (&num_blocks)[kAtOnce], uint32_t block,
                                              uint32_t id, bool writes_ids, const SortLds& lds,
                                              const SortParams& out) {
  AITER_UNROLL
  for (int i = 0; i < kAtOnce; ++i) {
    const bool is_there = (local >> i & 1) != 0;
    const uint32_t start = block * shape.block_size;
    const uint32_t total = counts.total[i];
    if (e + i < shape.num_experts) {
      const bool has_start = is_there || (kAny && shape.flat_ids);
      lds.starts[e + i] = has_start ? start + counts.before[i] : kNoSlot;
      lds.tails[e + i] = total != num_blocks[i] * shape.block_size ? start + total : kNoSlot;
    }
    if (writes_ids) {
      write_expert_ids(out.sorted_expert_ids, block, num_blocks[i],
                       kAny && !is_there ? kNoExpertId : id);
    }
    block += num_blocks[i];
    if (is_there) ++id;
  }
}

struct WorkgroupSync {
  __device__ __forceinline__ void operator()() const { __syncthreads(); }
};

// Gives every expert its blocks: fills lds.starts and lds.tails, writes num_valid_ids if `writes`, and
// sorted_expert_ids if `writes_ids`. counts_of(e) is called once for every kAtOnce experts from e on, by the thread
// e / kAtOnce % num_threads; `first_local` is local_experts() of the thread's first ones, asked for early; `wave` is
// uniform_wave_idx(). Waves beyond the last expert only pass the barriers. Needs one before and after.
template <bool kAny, int kAtOnce, typename CountsOf, typename Sync = WorkgroupSync>
__device__ __forceinline__ void assign_blocks(const SortShape& shape, int num_local,
                                              uint32_t first_local, bool writes, bool writes_ids,
                                              int wave, int num_threads, const SortLds& lds,
                                              const SortParams& out, CountsOf counts_of,
                                              Sync sync = {}) {
  uint32_t* const local_totals = lds.totals + kMaxWavesPerBlock;
  const bool has_mask = leaves_out<kAny>(shape, out);
  const bool is_flat = kAny && shape.flat_ids;
  uint32_t blocks_before = 0;
  uint32_t local_before = 0;
  AITER_LOOP
  for (int first = 0; first < shape.num_experts; first += kAtOnce * num_threads) {
    const int e = first + kAtOnce * static_cast<int>(threadIdx.x);
    const int num_left = shape.num_experts - first;
    const int num_waves = active_waves((num_left + kAtOnce - 1) / kAtOnce, num_threads);
    uint32_t local = first_local;
    ExpertCounts<kAtOnce> counts{};
    uint32_t num_blocks[kAtOnce] = {};
    WavePrefix blocks{}, locals{};
    if (first != 0) sync();
    if (wave < num_waves) {
      if (first != 0) local = local_experts<kAny, kAtOnce>(shape, out.expert_mask, e);
      if (e < shape.num_experts) counts = counts_of(e);
      uint32_t sum = 0;
      AITER_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const bool counts_it = is_flat ? e + i < shape.num_experts : (local >> i & 1) != 0;
        if (!counts_it) counts.total[i] = 0;
        num_blocks[i] = shape.by_block_size.quotient(counts.total[i] + shape.block_size - 1);
        sum += num_blocks[i];
      }
      blocks = wave_prefix_sum(sum);
      post_total(lds.totals, blocks);
      if (has_mask) {
        locals = wave_prefix_sum(__popc(local));
        post_total(local_totals, locals);
      }
    }
    sync();
    if (wave >= num_waves) continue;  // only in the last round

    blocks = over_workgroup(lds.totals, num_waves, blocks);
    if (has_mask) locals = over_workgroup(local_totals, num_waves, locals);
    place_experts<kAny>(shape, e, local, counts, num_blocks, blocks_before + blocks.below,
                        has_mask ? local_before + locals.below : e, writes_ids, lds, out);
    blocks_before += blocks.total;
    local_before += locals.total;
  }
  if (writes && threadIdx.x == 0) write_num_valid_ids(shape, out, blocks_before, num_local);
}

template <bool kAny = false>
__device__ __forceinline__ uint32_t padding_id(const SortShape& shape, int num_local) {
  if (kAny && shape.flat_ids) return static_cast<uint32_t>(shape.num_tokens * shape.topk);
  return static_cast<uint32_t>(shape.topk) << kSlotShift | static_cast<uint32_t>(num_local);
}

// Pads four slots from `slot` on, at once.
__device__ __forceinline__ void pad_four(const SortParams& out, uint32_t slot, uint32_t id) {
  *reinterpret_cast<FourWords*>(out.sorted_ids + slot) = {{id, id, id, id}};
  *reinterpret_cast<FourWords*>(out.sorted_weights + slot) = FourWords{};
}

// Pads the slots from `tail` on that are left of its four, which is 1 to 3.
__device__ __forceinline__ void pad_rest(const SortParams& out, uint32_t tail, uint32_t id) {
  struct alignas(8) TwoWords {
    uint32_t word[2];
  };
  uint32_t slot = tail;
  if (slot % 2 != 0) {
    out.sorted_ids[slot] = static_cast<int32_t>(id);
    out.sorted_weights[slot] = 0.0f;
    ++slot;
  }
  if (slot % 4 != 0) {
    *reinterpret_cast<TwoWords*>(out.sorted_ids + slot) = {{id, id}};
    *reinterpret_cast<TwoWords*>(out.sorted_weights + slot) = TwoWords{};
  }
}

// Writes the padding behind every tail, worker `worker` of `num_workers`.
template <bool kAny = false>
__device__ __forceinline__ void write_padding(const SortShape& shape, int num_local,
                                              const uint32_t* lds_tails, const SortParams& out,
                                              uint32_t worker, uint32_t num_workers) {
  const uint32_t id = padding_id<kAny>(shape, num_local);
  const uint32_t block_size = shape.block_size;
  const uint32_t width = shape.wide_stores ? 4 : 1;
  AITER_LOOP
  for (uint32_t i = worker * width; i < shape.num_experts * block_size; i += num_workers * width) {
    const uint32_t expert_idx = shape.by_block_size.quotient(i);
    const uint32_t tail = lds_tails[expert_idx];
    if (tail == kNoSlot) continue;
    const uint32_t slot = (shape.by_block_size.quotient(tail) - expert_idx) * block_size + i;
    if (!shape.wide_stores) {
      if (slot < tail) continue;
      out.sorted_ids[slot] = static_cast<int32_t>(id);
      out.sorted_weights[slot] = 0.0f;
    } else if (slot >= tail) {
      pad_four(out, slot, id);
    } else if (slot + width > tail) {
      pad_rest(out, tail, id);
    }
  }
}

template <bool kAny = false>
__device__ __forceinline__ void write_entry(const SortShape& shape, const SortParams& out,
                                            uint32_t slot, const Entry& entry) {
  uint32_t id = static_cast<uint32_t>(entry.k) << kSlotShift | static_cast<uint32_t>(entry.token);
  if (kAny && shape.flat_ids) id = static_cast<uint32_t>(entry.token * shape.topk + entry.k);
  out.sorted_ids[slot] = static_cast<int32_t>(id);
  out.sorted_weights[slot] = entry.weight;
}

// As write_entry(); the first entry of a block writes the block's expert id too, if `writes_id`.
template <bool kAny>
__device__ __forceinline__ void write_entry_and_id(const SortShape& shape, const SortParams& out,
                                                   uint32_t slot, const Entry& entry,
                                                   bool writes_id) {
  write_entry<kAny>(shape, out, slot, entry);
  const uint32_t block = shape.by_block_size.quotient(slot);
  if (writes_id && block * shape.block_size == slot) {
    out.sorted_expert_ids[block] = static_cast<int32_t>(entry.expert_idx);
  }
}

// Zeroes moe_buf, workgroup `block` of the `num_blocks` that do so.
__device__ __forceinline__ void zero_moe_buf(const SortParams& sort, int num_local, unsigned block,
                                             unsigned num_blocks) {
  const uint64_t worker = static_cast<uint64_t>(block) * blockDim.x + threadIdx.x;
  zero_bytes(sort.moe_buf, num_local * sort.row_bytes, worker,
             static_cast<uint64_t>(num_blocks) * blockDim.x);
}

}  // namespace aiter
