// The sort by expert where no expert can have more than one block: n <= B, most of decode.
//
// Then the set of experts that are hit, bits in LDS that top-k has set, says everything: its size is the
// number of blocks, and the number of its members below an expert is that expert's block. The workgroup fills
// all blocks with padding, which needs no more than their number, and behind a barrier puts the entries over
// it, each at B * block + rank of the token (expert_sort.h). With an expert_mask the set is what it shares with
// the mask's.
//
// Measured on an H100 (2026-11-23), E=128, K=4: 1.53 us for M=4 and 2.07 for M=32. Making the set behind top-k,
// by a thread per expert and a barrier more, took 1.71 and 2.28; that and looking an expert up in one pass and
// counting the set in another 1.56 and 2.04. Rejected: finding the slots that entries will leave, which takes a
// search per block.
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
  // Adds those of the experts from e on whose bit is set, which do not cross a word.
  __device__ __forceinline__ void add_bits(uint32_t e, uint32_t bits) const {
    if (bits != 0 && e < kMaxSetExperts) {
      atomicOr(&words[e / kBitsPerWord], bits << e % kBitsPerWord);
    }
  }
  __device__ __forceinline__ bool has(uint32_t expert_idx) const {
    return (words[expert_idx / kBitsPerWord] >> (expert_idx % kBitsPerWord) & 1) != 0;
  }
  struct Position {
    uint32_t below, total;  // members below the expert, members in all
  };
  __device__ __forceinline__ Position position(uint32_t expert_idx, int num_experts) const {
    const uint32_t word_idx = expert_idx / kBitsPerWord;
    const uint32_t low_bits = (1u << (expert_idx % kBitsPerWord)) - 1;
    Position sum{0, 0};
    AITER_LOOP
    for (uint32_t first = 0; first * kBitsPerWord < static_cast<uint32_t>(num_experts);
         first += 4) {
      const FourWords four = four_from(first);
      AITER_UNROLL
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t word = four.word[i];
        sum.total += __popc(word);
        sum.below += __popc(first + i < word_idx    ? word
                            : first + i == word_idx ? word & low_bits
                                                    : 0);
      }
    }
    return sum;
  }

 private:
  // Four words from word `first` on, a multiple of 4.
  __device__ __forceinline__ FourWords four_from(uint32_t first) const {
    FourWords four = *reinterpret_cast<const FourWords*>(words + first);
    if (also != nullptr) {
      const FourWords other = *reinterpret_cast<const FourWords*>(also + first);
      AITER_UNROLL
      for (int i = 0; i < 4; ++i) four.word[i] &= other.word[i];
    }
    return four;
  }
};

// What top-k leaves beside the bitmask: the experts that are hit, and those of expert_mask.
struct SingleBlocks {
  ExpertSet hit, local;  // `local` counts where experts are left out

  // `drops`: experts that are left out have no blocks.
  static __device__ __forceinline__ SingleBlocks in(uint32_t* lds_sets, bool drops) {
    uint32_t* const lds_local = lds_sets + kMaxSetWords;
    return {{lds_sets, drops ? lds_local : nullptr}, {lds_local, nullptr}};
  }
  __device__ __forceinline__ void clear() const {
    hit.clear();
    local.clear();
  }
  // By all threads; `first_local` is local_experts() of the thread's first kAtOnce, asked for early.
  template <bool kAny, int kAtOnce>
  __device__ __forceinline__ void add_mask(const SortShape& shape, const SortParams& out,
                                           uint32_t first_local, int num_threads) const {
    if (!leaves_out<kAny>(shape, out)) return;
    uint32_t bits = first_local;
    AITER_LOOP
    for (int e = kAtOnce * threadIdx.x; e < shape.num_experts;) {
      local.add_bits(e, bits);
      e += kAtOnce * num_threads;
      if (e < shape.num_experts) bits = local_experts<kAny, kAtOnce>(shape, out.expert_mask, e);
    }
  }
};

// Makes padding of the first `num_slots` slots, by one workgroup.
template <bool kAny>
__device__ __forceinline__ void fill_with_padding(const SortShape& shape, int num_local,
                                                  uint32_t num_slots, const SortParams& out,
                                                  int num_threads) {
  const uint32_t id = padding_id<kAny>(shape, num_local);
  if (shape.wide_stores) {
    AITER_LOOP
    for (uint32_t i = 4 * threadIdx.x; i < num_slots; i += 4 * num_threads) pad_four(out, i, id);
  } else {
    AITER_LOOP
    for (uint32_t i = threadIdx.x; i < num_slots; i += num_threads) {
      out.sorted_ids[i] = static_cast<int32_t>(id);
      out.sorted_weights[i] = 0.0f;
    }
  }
}

// The whole rest of the sort by one workgroup where no expert can have more than one block: n <= B, and
// E <= kMaxSetExperts. entry_at(i) is the entry i of num_entries; `hits` and `sets` know all of them. Needs
// a barrier before.
template <bool kAny = false, typename EntryAt>
__device__ __forceinline__ void write_single_blocks(const SortShape& shape, int num_local,
                                                    const HitMask& hits, const SingleBlocks& sets,
                                                    const SortParams& out, int num_entries,
                                                    int num_threads, EntryAt entry_at) {
  const bool has_mask = leaves_out<kAny>(shape, out);
  const bool drops = has_mask && !(kAny && shape.flat_ids);
  AITER_LOOP
  for (int first = 0; first == 0 || first < num_entries; first += num_threads) {
    const int i = first + static_cast<int>(threadIdx.x);
    Entry entry{};
    uint32_t rank = 0;
    bool is_kept = i < num_entries;
    if (is_kept) {
      entry = entry_at(i);
      rank = hits.rank(entry.token, entry.expert_idx);
      is_kept = !drops || sets.local.has(entry.expert_idx);
    }
    const ExpertSet::Position block = sets.hit.position(entry.expert_idx, shape.num_experts);
    if (first == 0) {
      fill_with_padding<kAny>(shape, num_local, block.total * shape.block_size, out, num_threads);
      if (threadIdx.x == 0) write_num_valid_ids(shape, out, block.total, num_local);
      __syncthreads();
    }
    if (!is_kept) continue;
    write_entry<kAny>(shape, out, block.below * shape.block_size + rank, entry);
    if (rank == 0) {
      uint32_t id = has_mask ? sets.local.position(entry.expert_idx, shape.num_experts).below
                             : entry.expert_idx;
      if (kAny && has_mask && !sets.local.has(entry.expert_idx)) id = kNoExpertId;
      out.sorted_expert_ids[block.below] = static_cast<int32_t>(id);
    }
  }
}

}  // namespace aiter
