// The sort by expert where no expert can have more than one block: n <= B, most of decode.
//
// Then the set of experts that are hit says everything: its size is the number of blocks, and an expert's
// rank in it is its block. The workgroup fills all blocks with padding, which needs no more than their
// number, and behind a barrier puts the entries over it:
//   1 a thread per expert    is it hit? as bits in LDS
//   2 all threads            padding, whole blocks
//   3 a thread per entry     its slot: B * rank of the expert + rank of the token (expert_sort.h)
//
// Measured on an H100 (2026-11-23), from the end of top-k to the end of the workgroup, E=128, K=4: 1,374
// cycles for M=1 and 1,624 for M=32, where assign_blocks and write_padding took 1,960 and 4,190. Rejected:
// finding the slots that entries will leave, which takes a search per block.
#pragma once

#include "expert_sort.h"

namespace aiter {

// A set of up to kMaxSetExperts experts, as bits in LDS on a 16-byte boundary.
constexpr int kMaxSetWords = 32;
constexpr int kBitsPerWord = 32;
constexpr int kMaxSetExperts = kBitsPerWord * kMaxSetWords;

struct ExpertSet {
  uint32_t* words;  // [kMaxSetWords]

  // Says which experts from `first` on are members: of thread t, whether first + t is one. By all
  // threads; they end on a multiple of four words, so that what is read below has been written.
  __device__ __forceinline__ void post(int first, bool is_member) const {
    const WaveMask members = wave_ballot(is_member);
    if (lane_idx() != 0) return;
    AITER_UNROLL
    for (int i = 0; i < kWaveSize / kBitsPerWord; ++i) {
      const int word_idx = (first + static_cast<int>(threadIdx.x)) / kBitsPerWord + i;
      if (word_idx < kMaxSetWords)
        words[word_idx] = static_cast<uint32_t>(members >> (kBitsPerWord * i));
    }
  }
  __device__ __forceinline__ bool has(uint32_t expert_idx) const {
    return (words[expert_idx / kBitsPerWord] >> (expert_idx % kBitsPerWord) & 1) != 0;
  }
  // Members below the expert.
  __device__ __forceinline__ uint32_t rank(uint32_t expert_idx) const {
    uint32_t sum = 0;
    AITER_LOOP
    for (uint32_t first = 0; first <= expert_idx; first += 4 * kBitsPerWord) {
      const FourWords four = *reinterpret_cast<const FourWords*>(words + first / kBitsPerWord);
      AITER_UNROLL
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t begin = first + i * kBitsPerWord;
        const uint32_t below = (1u << (expert_idx % kBitsPerWord)) - 1;
        const uint32_t counted = expert_idx < begin                  ? 0u
                                 : expert_idx < begin + kBitsPerWord ? below
                                                                     : ~0u;
        sum += __popc(four.word[i] & counted);
      }
    }
    return sum;
  }
  // Members below `end`.
  __device__ __forceinline__ uint32_t count(uint32_t end) const {
    uint32_t sum = 0;
    AITER_LOOP
    for (uint32_t first = 0; first < end; first += 4 * kBitsPerWord) {
      const FourWords four = *reinterpret_cast<const FourWords*>(words + first / kBitsPerWord);
      AITER_UNROLL
      for (int i = 0; i < 4; ++i) sum += __popc(four.word[i]);
    }
    return sum;
  }
};

// Makes padding of the first `num_slots` slots, by one workgroup.
__device__ __forceinline__ void fill_with_padding(const SortShape& shape, int num_local,
                                                  uint32_t num_slots, const SortParams& out) {
  const uint32_t id = padding_id(shape, num_local);
  if (shape.wide_stores) {
    AITER_LOOP
    for (uint32_t i = 4 * threadIdx.x; i < num_slots; i += 4 * blockDim.x) pad_four(out, i, id);
  } else {
    AITER_LOOP
    for (uint32_t i = threadIdx.x; i < num_slots; i += blockDim.x) {
      out.sorted_ids[i] = static_cast<int32_t>(id);
      out.sorted_weights[i] = 0.0f;
    }
  }
}

// The whole rest of the sort by one workgroup where no expert can have more than one block: n <= B, and
// E <= kMaxSetExperts. entry_at(i) is the entry i of num_entries; `hits` knows all of them. Needs a
// barrier before.
template <typename EntryAt>
__device__ __forceinline__ void write_single_blocks(const SortShape& shape, int num_local,
                                                    bool is_first_local, const HitMask& hits,
                                                    uint32_t* lds_sets, const SortParams& out,
                                                    int num_entries, EntryAt entry_at) {
  const ExpertSet hit{lds_sets}, local{lds_sets + kMaxSetWords};
  const bool has_mask = out.expert_mask != nullptr;
  AITER_LOOP
  for (int first = 0; first < shape.num_experts; first += blockDim.x) {
    const int e = first + static_cast<int>(threadIdx.x);
    bool is_member = e < shape.num_experts;
    if (has_mask) {
      is_member = is_member && (first == 0 ? is_first_local : is_local(out.expert_mask, e));
      local.post(first, is_member);
    }
    hit.post(first, is_member && hits.any(e));
  }
  // Entries are given to the last threads, as the first ones have experts to look after; what a thread's
  // first entry needs is asked for early.
  const int first_idx = static_cast<int>(blockDim.x - 1 - threadIdx.x);
  Entry entry{};
  uint32_t rank = 0;
  if (first_idx < num_entries) {
    entry = entry_at(first_idx);
    rank = hits.rank(entry.token, entry.expert_idx);
  }
  __syncthreads();

  const uint32_t num_blocks = hit.count(shape.num_experts);
  fill_with_padding(shape, num_local, num_blocks * shape.block_size, out);
  const auto slot_of = [&](const Entry& of, uint32_t rank_in_block) {
    if (!hit.has(of.expert_idx)) return kNoSlot;
    return hit.rank(of.expert_idx) * shape.block_size + rank_in_block;
  };
  uint32_t slot = first_idx < num_entries ? slot_of(entry, rank) : kNoSlot;
  AITER_LOOP
  for (int e = threadIdx.x; e < shape.num_experts; e += blockDim.x) {
    if (hit.has(e)) {
      out.sorted_expert_ids[hit.rank(e)] = static_cast<int32_t>(has_mask ? local.rank(e) : e);
    }
  }
  if (threadIdx.x == 0) write_num_valid_ids(shape, out, num_blocks, num_local);
  __syncthreads();

  if (slot != kNoSlot) write_entry(out, slot, entry.token, entry.k, entry.weight);
  AITER_LOOP
  for (int i = first_idx + blockDim.x; i < num_entries; i += blockDim.x) {
    entry = entry_at(i);
    slot = slot_of(entry, hits.rank(entry.token, entry.expert_idx));
    if (slot != kNoSlot) write_entry(out, slot, entry.token, entry.k, entry.weight);
  }
}

}  // namespace aiter
