// The block-padded counting sort by expert, as pieces that one workgroup runs in LDS: what the
// fused launch, the oneshot sort and the multi-phase sort share.
//
//   experts with c_e > 0 entries get ceil(c_e / B) blocks of B slots, experts ascending
//   entry (t, k) of expert e goes to slot  start_e + (number of tokens before t that chose e)
//   slots start_e + c_e ... up to the next block hold padding: id (K << 24) | n, weight 0
//
// Ranks come from a token x expert bitmask, one bit per (token, expert): the number of tokens
// before t is a popcount over the words before t's and the bits below t's. That needs M*E/8 bytes, is
// stable by construction, and no entry waits for another. Words are stored [word][expert], so that
// lanes that walk over experts hit different LDS banks.
//
// A thread per expert assigns the blocks. While no expert can have more than one block (n <= B, most
// of decode), a ballot takes the place of the prefix sum. It leaves a list of tails, the places where
// padding begins; all threads then write padding together, four slots per store. Rejected: a thread per
// slot of all E*B, which looks at 4096 slots where a token's 4 experts have 124 to pad (E=128, K=4,
// B=32).
//
// Rejected as well: a token x expert table of words (32 times the LDS); atomic counters for ranks
// (their order is the order of arrival, not the token order that the format asks for).
#pragma once

#include "device/numeric.h"
#include "device/wave.h"

namespace aiter {

constexpr int kTokensPerWord = 32;
constexpr int kSlotShift = 24;  // sorted_ids: token in the bits below, slot above
constexpr uint32_t kNoSlot = 0xffffffffu;

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
};

// M, or what the device says in num_local_tokens.
__device__ __forceinline__ int local_tokens(const int32_t* num_local_tokens, int num_tokens) {
  if (num_local_tokens == nullptr) return num_tokens;
  const int n = num_local_tokens[0];
  return n < 0 ? 0 : (n < num_tokens ? n : num_tokens);
}

__host__ __device__ constexpr int hit_words(int num_tokens) {
  return (num_tokens + kTokensPerWord - 1) / kTokensPerWord;
}

// The token x expert bitmask in LDS.
struct HitMask {
  uint32_t* words;  // [num_words][num_experts]
  int num_experts;
  int num_words;

  __device__ __forceinline__ void clear() const {
    AITER_LOOP
    for (int i = threadIdx.x; i < num_experts * num_words; i += blockDim.x) words[i] = 0;
  }
  __device__ __forceinline__ void set(int token, uint32_t expert_idx) const {
    atomicOr(&words[(token / kTokensPerWord) * num_experts + expert_idx],
             1u << (token % kTokensPerWord));
  }
  __device__ __forceinline__ uint32_t count(int expert_idx) const {
    uint32_t sum = 0;
    AITER_LOOP
    for (int w = 0; w < num_words; ++w) sum += __popc(words[w * num_experts + expert_idx]);
    return sum;
  }
  // Tokens before `token` that chose the expert.
  __device__ __forceinline__ uint32_t rank(int token, uint32_t expert_idx) const {
    const uint32_t* column = words + expert_idx;
    uint32_t sum = 0;
    AITER_LOOP
    for (int w = 0; w < token / kTokensPerWord; ++w) sum += __popc(column[w * num_experts]);
    const uint32_t below = (1u << (token % kTokensPerWord)) - 1;
    return sum + __popc(column[token / kTokensPerWord * num_experts] & below);
  }
};

__device__ __forceinline__ bool is_local(const int32_t* expert_mask, uint32_t expert_idx) {
  return expert_mask == nullptr || expert_mask[expert_idx] != 0;
}

// Where a workgroup keeps what it knows of every expert, in LDS.
struct SortLds {
  uint32_t* starts;  // [E] slot of its first entry of the expert; kNoSlot if expert_mask drops it
  uint32_t* tails;   // [E] slots where padding begins, up to the end of the block; kNoSlot: none
  uint32_t* totals;  // [2][kMaxWavesPerBlock]
};

// Entries of an expert, in all and before the workgroup's first.
struct ExpertCount {
  uint32_t total, before;
};

// Waves of the workgroup up to the last that has one of the first `num_threads` threads, and a multiple
// of what over_workgroup() takes at once, as the workgroup's own number of waves is.
__device__ __forceinline__ int active_waves(int num_threads) {
  constexpr int kThreadsAtOnce = kTotalsAtOnce * kWaveSize;
  const int wanted = (num_threads + kThreadsAtOnce - 1) / kThreadsAtOnce * kTotalsAtOnce;
  const int present = static_cast<int>(blockDim.x) / kWaveSize;
  return wanted < present ? wanted : present;
}

// Writes the expert id of every block, each lane for its expert; the blocks of an expert that has many
// are written by the whole wave.
__device__ __forceinline__ void write_expert_ids(int32_t* sorted_expert_ids, uint32_t first_block,
                                                 uint32_t num_blocks, uint32_t id,
                                                 bool at_most_one) {
  constexpr uint32_t kMaxOwnBlocks = 4;
  AITER_LOOP
  for (uint32_t b = 0; b < num_blocks && b < kMaxOwnBlocks; ++b) {
    sorted_expert_ids[first_block + b] = static_cast<int32_t>(id);
  }
  if (at_most_one) return;
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

// Gives every expert its blocks: fills lds.starts and lds.tails, and writes sorted_expert_ids and
// num_valid_ids if `writes`. count_of(e) is called once for every expert that counts, by the thread
// e % blockDim.x; `is_first_local` is is_local() of the thread's first expert, asked for early.
// Returns the number of tails; with `compact` there is one per block, which wants n <= B, else one
// per expert. Needs a barrier before and after.
template <typename CountOf>
__device__ __forceinline__ uint32_t assign_blocks(const SortShape& shape, int num_local,
                                                  bool is_first_local, bool compact, bool writes,
                                                  const SortLds& lds, const SortParams& out,
                                                  CountOf count_of) {
  uint32_t blocks_before = 0;
  uint32_t local_before = 0;
  AITER_LOOP
  for (int first = 0; first < shape.num_experts; first += blockDim.x) {
    const int e = first + static_cast<int>(threadIdx.x);
    const bool exists = e < shape.num_experts;
    const bool local = exists && (first == 0 ? is_first_local
                                             : is_local(out.expert_mask, static_cast<uint32_t>(e)));
    ExpertCount count{0, 0};
    if (local) count = count_of(e);
    uint32_t num_blocks = count.total != 0 ? 1 : 0;
    if (!compact) num_blocks = shape.by_block_size.quotient(count.total + shape.block_size - 1);

    WavePrefix blocks = compact ? wave_rank(num_blocks != 0) : wave_prefix_sum(num_blocks);
    WavePrefix locals{static_cast<uint32_t>(e - first), 0};
    uint32_t* const local_totals = lds.totals + kMaxWavesPerBlock;
    if (first != 0) __syncthreads();
    post_total(lds.totals, blocks);
    if (out.expert_mask != nullptr) {
      locals = wave_rank(local);
      post_total(local_totals, locals);
    }
    __syncthreads();
    const int num_waves = active_waves(shape.num_experts - first);
    blocks = over_workgroup(lds.totals, num_waves, blocks);
    if (out.expert_mask != nullptr) locals = over_workgroup(local_totals, num_waves, locals);

    const uint32_t first_block = blocks_before + blocks.below;
    const uint32_t start = first_block * shape.block_size;
    const uint32_t end = start + count.total;
    const uint32_t tail = count.total != num_blocks * shape.block_size ? end : kNoSlot;
    if (exists) lds.starts[e] = local ? start + count.before : kNoSlot;
    if (exists && !compact) lds.tails[e] = tail;
    if (exists && compact && num_blocks != 0) lds.tails[first_block] = tail;
    if (writes) {
      const uint32_t local_id = out.expert_mask != nullptr ? local_before + locals.below : e;
      write_expert_ids(out.sorted_expert_ids, first_block, num_blocks, local_id, compact);
    }
    blocks_before += blocks.total;
    local_before += locals.total;
  }
  if (writes && threadIdx.x == 0) {
    out.num_valid_ids[0] = static_cast<int32_t>(blocks_before * shape.block_size);
    out.num_valid_ids[1] = num_local;
  }
  return compact ? blocks_before : shape.num_experts;
}

struct alignas(16) FourWords {
  uint32_t word[4];
};

// Writes the padding behind every tail, worker `worker` of `num_workers`.
__device__ __forceinline__ void write_padding(const SortShape& shape, int num_local,
                                              const uint32_t* lds_tails, uint32_t num_tails,
                                              const SortParams& out, uint32_t worker,
                                              uint32_t num_workers) {
  const uint32_t id =
      static_cast<uint32_t>(shape.topk) << kSlotShift | static_cast<uint32_t>(num_local);
  const uint32_t block_size = shape.block_size;
  const uint32_t width = shape.wide_stores ? 4 : 1;
  AITER_LOOP
  for (uint32_t i = worker * width; i < num_tails * block_size; i += num_workers * width) {
    const uint32_t tail_idx = shape.by_block_size.quotient(i);
    const uint32_t tail = lds_tails[tail_idx];
    if (tail == kNoSlot) continue;
    const uint32_t slot = (shape.by_block_size.quotient(tail) - tail_idx) * block_size + i;
    if (slot >= tail && shape.wide_stores) {
      *reinterpret_cast<FourWords*>(out.sorted_ids + slot) = {{id, id, id, id}};
      *reinterpret_cast<FourWords*>(out.sorted_weights + slot) = FourWords{};
    } else {
      AITER_LOOP
      for (uint32_t s = slot < tail ? tail : slot; s < slot + width; ++s) {
        out.sorted_ids[s] = static_cast<int32_t>(id);
        out.sorted_weights[s] = 0.0f;
      }
    }
  }
}

__device__ __forceinline__ void write_entry(const SortParams& out, uint32_t slot, int token, int k,
                                            float weight) {
  out.sorted_ids[slot] =
      static_cast<int32_t>(static_cast<uint32_t>(k) << kSlotShift | static_cast<uint32_t>(token));
  out.sorted_weights[slot] = weight;
}

// Zeroes `num_bytes` from `data` on, worker `worker` of `num_workers`; any alignment, any length.
__device__ __forceinline__ void zero_bytes(unsigned char* data, uint64_t num_bytes, uint64_t worker,
                                           uint64_t num_workers) {
  const uint64_t to_boundary = (16 - reinterpret_cast<uintptr_t>(data) % 16) % 16;
  const uint64_t head = to_boundary < num_bytes ? to_boundary : num_bytes;
  const uint64_t num_vectors = (num_bytes - head) / 16;
  const uint64_t tail = (num_bytes - head) % 16;
  FourWords* vectors = reinterpret_cast<FourWords*>(data + head);
  for (uint64_t i = worker; i < num_vectors; i += num_workers) vectors[i] = FourWords{};
  if (worker < head) data[worker] = 0;
  if (worker < tail) data[num_bytes - 1 - worker] = 0;
}

// Zeroes moe_buf with the workgroups from `first_block` on.
__device__ __forceinline__ void zero_moe_buf(const SortParams& sort, int num_local,
                                             unsigned first_block) {
  const uint64_t worker =
      static_cast<uint64_t>(blockIdx.x - first_block) * blockDim.x + threadIdx.x;
  zero_bytes(sort.moe_buf, num_local * sort.row_bytes, worker,
             static_cast<uint64_t>(gridDim.x - first_block) * blockDim.x);
}

}  // namespace aiter
