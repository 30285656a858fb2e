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

constexpr int kMaxSetWords = 32;
constexpr int kBitsPerWord = 32;
constexpr int kMaxSetExperts = kBitsPerWord * kMaxSetWords;

// A set of up to kMaxSetExperts experts, as bits in LDS on 16-byte boundaries: those in `words` and,
// unless that is null, in `also`.
struct ExpertSet {
  uint32_t* words;  // [kMaxSetWords]
  const uint32_t* also;

  __device__ __forceinline__ void clear() const {
    if (threadIdx.x < kMaxSetWords) words[threadIdx.x] = 0;
  }
  // Of more than kMaxSetExperts experts, several are one member.
  __device__ __forceinline__ void add(uint32_t expert_idx) const {
    atomicOr(&words[expert_idx / kBitsPerWord % kMaxSetWords], 1u << (expert_idx % kBitsPerWord));
  }
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
    const uint32_t word_idx = expert_idx / kBitsPerWord;
    uint32_t word = words[word_idx];
    if (also != nullptr) word &= also[word_idx];
    return (word >> (expert_idx % kBitsPerWord) & 1) != 0;
  }
  // Members below the expert.
  __device__ __forceinline__ uint32_t rank(uint32_t expert_idx) const {
    uint32_t sum = 0;
    AITER_LOOP
    for (uint32_t first = 0; first <= expert_idx; first += 4 * kBitsPerWord) {
      const FourWords four = four_from(first);
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
      const FourWords four = four_from(first);
      AITER_UNROLL
      for (int i = 0; i < 4; ++i) sum += __popc(four.word[i]);
    }
    return sum;
  }

 private:
  // The words with the experts from `first` on, a multiple of 4 * kBitsPerWord.
  __device__ __forceinline__ FourWords four_from(uint32_t first) const {
    FourWords four = *reinterpret_cast<const FourWords*>(words + first / kBitsPerWord);
    if (also != nullptr) {
      const FourWords other = *reinterpret_cast<const FourWords*>(also + first / kBitsPerWord);
      AITER_UNROLL
      for (int i = 0; i < 4; ++i) four.word[i] &= other.word[i];
    }
    return four;
  }
};

// What top-k leaves beside the bitmask: the experts that are hit, and those of expert_mask.
struct SingleBlocks {
  ExpertSet hit, local;  // `local` counts where there is an expert_mask

  static __device__ __forceinline__ SingleBlocks in(uint32_t* lds_sets, bool has_mask) {
    uint32_t* const lds_local = lds_sets + kMaxSetWords;
    return {{lds_sets, has_mask ? lds_local : nullptr}, {lds_local, nullptr}};
  }
  // By all threads; `is_first_local` is is_local() of the thread's first expert, asked for early.
  __device__ __forceinline__ void post_mask(int num_experts, const int32_t* expert_mask,
                                            bool is_first_local) const {
    if (expert_mask == nullptr) return;
    AITER_LOOP
    for (int first = 0; first < num_experts; first += blockDim.x) {
      const int e = first + static_cast<int>(threadIdx.x);
      local.post(first, first == 0 ? is_first_local : e < num_experts && is_local(expert_mask, e));
    }
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
// E <= kMaxSetExperts. entry_at(i) is the entry i of num_entries; `hits` and `sets` know all of them. Needs
// a barrier before.
template <typename EntryAt>
__device__ __forceinline__ void write_single_blocks(const SortShape& shape, int num_local,
                                                    const HitMask& hits, const SingleBlocks& sets,
                                                    const SortParams& out, int num_entries,
                                                    EntryAt entry_at) {
  const ExpertSet &hit = sets.hit, &local = sets.local;
  AITER_LOOP
  for (int first = 0; first == 0 || first < num_entries; first += blockDim.x) {
    const int i = first + static_cast<int>(threadIdx.x);
    Entry entry{};
    uint32_t block = 0, rank = 0;
    bool is_kept = i < num_entries;
    if (is_kept) {
      entry = entry_at(i);
      is_kept = hit.has(entry.expert_idx);
      block = hit.rank(entry.expert_idx);
      rank = hits.rank(entry.token, entry.expert_idx);
    }
    if (first == 0) {
      const uint32_t num_blocks = hit.count(shape.num_experts);
      fill_with_padding(shape, num_local, num_blocks * shape.block_size, out);
      if (threadIdx.x == 0) write_num_valid_ids(shape, out, num_blocks, num_local);
      __syncthreads();
    }
    if (!is_kept) continue;
    write_entry(out, block * shape.block_size + rank, entry);
    if (rank == 0) {
      const bool has_mask = out.expert_mask != nullptr;
      out.sorted_expert_ids[block] =
          static_cast<int32_t>(has_mask ? local.rank(entry.expert_idx) : entry.expert_idx);
    }
  }
}

}  // namespace aiter
