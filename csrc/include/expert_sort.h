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
// Rejected: a token x expert table of words (32 times the LDS); atomic counters for ranks (their
// order is the order of arrival, not the token order that the format asks for).
#pragma once

#include "device/numeric.h"
#include "device/wave.h"

namespace aiter {

constexpr int kTokensPerWord = 32;
constexpr int kSlotShift = 24;           // sorted_ids: token in the bits below, slot above
constexpr uint32_t kNoExpert = 0xffffu;  // an entry that expert_mask drops

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

struct SortShape {
  int num_tokens;   // M
  int num_experts;  // E
  int topk;         // K
  int block_size;   // B
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
    for (int i = threadIdx.x; i < num_experts * num_words; i += blockDim.x) words[i] = 0;
  }
  __device__ __forceinline__ void set(int token, uint32_t expert_idx) const {
    atomicOr(&words[(token / kTokensPerWord) * num_experts + expert_idx],
             1u << (token % kTokensPerWord));
  }
  __device__ __forceinline__ uint32_t count(int expert_idx) const {
    uint32_t sum = 0;
    for (int w = 0; w < num_words; ++w) sum += __popc(words[w * num_experts + expert_idx]);
    return sum;
  }
  // Tokens before `token` that chose the expert.
  __device__ __forceinline__ uint32_t rank(int token, uint32_t expert_idx) const {
    const uint32_t* column = words + expert_idx;
    uint32_t sum = 0;
    for (int w = 0; w < token / kTokensPerWord; ++w) sum += __popc(column[w * num_experts]);
    const uint32_t below = (1u << (token % kTokensPerWord)) - 1;
    return sum + __popc(column[token / kTokensPerWord * num_experts] & below);
  }
};

__device__ __forceinline__ bool is_local(const int32_t* expert_mask, int expert_idx) {
  return expert_mask == nullptr || expert_mask[expert_idx] != 0;
}

// Gives every expert its blocks. Turns lds_count[e] (entries of expert e) into lds_start[e] (its
// first slot), writes sorted_expert_ids and num_valid_ids. Needs a barrier before and after.
__device__ __forceinline__ void assign_blocks(const SortShape& shape, int num_local,
                                              const uint32_t* lds_count, uint32_t* lds_start,
                                              uint32_t* lds_scratch, const SortParams& out) {
  uint32_t blocks_before = 0;
  uint32_t local_before = 0;
  for (int first = 0; first < shape.num_experts; first += blockDim.x) {
    const int e = first + static_cast<int>(threadIdx.x);
    const bool exists = e < shape.num_experts;
    const uint32_t count = exists ? lds_count[e] : 0;
    const uint32_t num_blocks = (count + shape.block_size - 1) / shape.block_size;
    uint32_t total;
    const uint32_t first_block =
        blocks_before + block_exclusive_sum(num_blocks, lds_scratch, total);
    blocks_before += total;
    uint32_t local_id = e;
    if (out.expert_mask != nullptr) {
      const uint32_t local = exists && is_local(out.expert_mask, e) ? 1 : 0;
      local_id = local_before + block_exclusive_sum(local, lds_scratch, total);
      local_before += total;
    }
    if (exists) lds_start[e] = first_block * shape.block_size;
    for (uint32_t b = 0; b < num_blocks; ++b) {
      out.sorted_expert_ids[first_block + b] = static_cast<int32_t>(local_id);
    }
  }
  if (threadIdx.x == 0) {
    out.num_valid_ids[0] = static_cast<int32_t>(blocks_before * shape.block_size);
    out.num_valid_ids[1] = num_local;
  }
}

// Fills the unused slots of every expert's last block.
__device__ __forceinline__ void write_padding(const SortShape& shape, int num_local,
                                              const uint32_t* lds_count, const uint32_t* lds_start,
                                              const SortParams& out, int first_thread,
                                              int num_threads) {
  const int32_t padding_id = static_cast<int32_t>(static_cast<uint32_t>(shape.topk) << kSlotShift |
                                                  static_cast<uint32_t>(num_local));
  const uint32_t block_size = shape.block_size;
  for (uint32_t i = first_thread; i < shape.num_experts * block_size; i += num_threads) {
    const uint32_t e = i / block_size;
    const uint32_t used = lds_count[e] % block_size;
    const uint32_t slot_in_block = i % block_size;
    if (used == 0 || slot_in_block < used) continue;
    const uint32_t slot = lds_start[e] + lds_count[e] - used + slot_in_block;
    out.sorted_ids[slot] = padding_id;
    out.sorted_weights[slot] = 0.0f;
  }
}

__device__ __forceinline__ void write_entry(const SortParams& out, uint32_t slot, int token, int k,
                                            float weight) {
  out.sorted_ids[slot] =
      static_cast<int32_t>(static_cast<uint32_t>(k) << kSlotShift | static_cast<uint32_t>(token));
  out.sorted_weights[slot] = weight;
}

struct alignas(16) Zero16 {
  uint32_t word[4];
};

// Zeroes `num_bytes` from `data` on, worker `worker` of `num_workers`; any alignment, any length.
__device__ __forceinline__ void zero_bytes(unsigned char* data, uint64_t num_bytes, uint64_t worker,
                                           uint64_t num_workers) {
  const uint64_t to_boundary = (16 - reinterpret_cast<uintptr_t>(data) % 16) % 16;
  const uint64_t head = to_boundary < num_bytes ? to_boundary : num_bytes;
  const uint64_t num_vectors = (num_bytes - head) / 16;
  const uint64_t tail = (num_bytes - head) % 16;
  Zero16* vectors = reinterpret_cast<Zero16*>(data + head);
  for (uint64_t i = worker; i < num_vectors; i += num_workers) vectors[i] = Zero16{};
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
