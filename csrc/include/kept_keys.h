// The K best of a row of f32 keys, each with a score that is kept beside it, by 32 lanes: K <= 32, up to 1,024 keys.
//
//   winners   the K largest (key_e, -e) in descending order; NaN is not eligible and comes last, by lowest e
//   keys      lane l of the row holds those of the experts 8l ... 8l + 7, 8(32 + l) ... + 7 and so on
//   result    lane k gets winner k, and its score unless the row was selected by steps
//
// best_keys.h's idea, for keys that cost too much to be made again:
//
//   1 maxima     one of each lane, or two where K > 16, with the lane in their lowest bits, so that they differ
//   2 threshold  each lane counts the maxima that are larger than its own, and the one that finds K - 1 knows the
//                threshold: at least K keys are as large. Where so many lanes have no eligible key, it is the
//                lowest of all
//   3 candidates key, score and expert of every key that is not below it, in LDS; ballots over the number of a
//                lane's candidates tell it where
//   4 order      each lane counts the candidates that are better than its own: that is the slot
//
// Rows with less than K candidates or more than there is room for, 48, are selected by a step per winner.
//
// Rejected: a branch for equal keys in step 4, which takes 1,160 instead of 480 cycles (H100, 2026-11-26, K=8).
//
// LDS: that of best_keys.h, 24 bytes a lane.
#pragma once

#include "best_keys.h"

namespace aiter {

// How many of four are set. Added to each other first, so that a count does not wait for each of them.
__device__ __forceinline__ int num_set(bool a, bool b, bool c, bool d) {
  return ((a ? 1 : 0) + (b ? 1 : 0)) + ((c ? 1 : 0) + (d ? 1 : 0));
}

template <int kValues, int kBest>
class KeptKeys {
 public:
  static constexpr int kLanes = kMinWaveSize;
  static constexpr int kRowsPerWave = kWaveSize / kLanes;

  static __device__ __forceinline__ int lane_in_row() { return lane_idx() % kLanes; }
  static __device__ __forceinline__ int expert_of_register(int i) {
    return (i / kKeysPerChunk * kLanes + lane_in_row()) * kKeysPerChunk + i % kKeysPerChunk;
  }

  struct Result {
    Winner winner;  // `stored`: ordered_float() of the key
    float score;    // of the winner
    bool has_score;
  };

  // `lds` is the wave's. By all lanes; topk is the same for all.
  template <typename Exists>
  static __device__ __forceinline__ Result select(const float (&keys)[kValues],
                                                  const float (&scores)[kValues], Exists exists,
                                                  int topk, void* lds) {
    Candidate* const found =
        reinterpret_cast<Candidate*>(static_cast<char*>(lds) + lane_idx() / kLanes * kBytesOfRow);
    const float least = threshold(keys, topk, reinterpret_cast<uint32_t*>(found));
    uint32_t own = 0;  // bit i: keys[i] is a candidate
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) own |= keys[i] >= least ? 1u << i : 0u;
    wave_sync();
    const int count = collect(own, keys, scores, found);
    const bool fails = count > kRoom || count < topk;
    wave_sync();
    order(found, fails ? 0 : count, topk);
    if (AITER_UNLIKELY(wave_ballot(fails) != 0)) select_by_steps(keys, exists, topk, fails, found);
    wave_sync();
    const int k = lane_in_row() < topk ? lane_in_row() : 0;
    const Candidate mine = found[k];
    const uint32_t stored =
        fails ? bit_cast<uint32_t>(mine.key) : ordered_key(bit_cast<uint32_t>(mine.key + 0.0f));
    return {{stored, mine.expert_idx}, mine.score, !fails};
  }

 private:
  struct alignas(16) Candidate {
    float key, score;
    uint32_t expert_idx, unused;
  };
  static constexpr int kCandidatesOfLane = 2;
  static constexpr int kAtOnce = 8;  // candidates that one is compared with
  static constexpr int kBytesOfRow = best_keys_lds_bytes(kLanes);
  static constexpr int kRoom = kBytesOfRow / static_cast<int>(sizeof(Candidate));
  static_assert(kRoom % kAtOnce == 0 && kRoom > kMinWaveSize && kRoom <= kCandidatesOfLane * kLanes,
                "candidates of a row");
  static constexpr int kMaximaPerLane = kBest > 16 ? 2 : 1;
  static constexpr uint32_t kLowBits = kMaximaPerLane * kLanes - 1;
  static constexpr uint32_t kNone = 0x007fffffu;  // the key of -inf, as which NaN counts

  static __device__ __forceinline__ uint32_t key_of(float key) {
    return ordered_key(ordinary_bits(bit_cast<uint32_t>(key)));
  }
  static __device__ __forceinline__ uint32_t of_row(WaveMask lanes) {
    return static_cast<uint32_t>(lanes >> (lane_idx() / kLanes * kLanes));
  }

  // Over kCount registers from kFirst on.
  template <int kFirst, int kCount>
  static __device__ __forceinline__ float max_over(const float (&keys)[kValues]) {
    if constexpr (kCount == 1) {
      return keys[kFirst];
    } else {
      return max_but_nan(max_over<kFirst, kCount / 2>(keys),
                         max_over<kFirst + kCount / 2, kCount / 2>(keys));
    }
  }

  static __device__ __forceinline__ float threshold(const float (&keys)[kValues], int topk,
                                                    uint32_t* maxima) {
    uint32_t own[kMaximaPerLane];
    int larger[kMaximaPerLane];
    wave_sync();
    AITER_UNROLL
    for (int m = 0; m < kMaximaPerLane; ++m) {
      constexpr int kCount = kValues / kMaximaPerLane;
      const float max =
          m == 0 ? max_over<0, kCount>(keys) : max_over<kValues - kCount, kCount>(keys);
      const uint32_t place = m * kLanes + lane_in_row();
      own[m] = (key_of(max) & ~kLowBits) | place;
      larger[m] = 0;
      maxima[place] = own[m];
    }
    wave_sync();
    AITER_UNROLL
    for (int first = 0; first < kMaximaPerLane * kLanes; first += 4) {
      const FourWords four = *reinterpret_cast<const FourWords*>(maxima + first);
      AITER_UNROLL
      for (int m = 0; m < kMaximaPerLane; ++m) {
        larger[m] += num_set(four.word[0] > own[m], four.word[1] > own[m], four.word[2] > own[m],
                             four.word[3] > own[m]);
      }
    }
    uint32_t least = 0;
    AITER_UNROLL
    for (int m = 0; m < kMaximaPerLane; ++m) {
      const uint32_t lanes = of_row(wave_ballot(larger[m] == topk - 1));
      if (lanes != 0) least = maxima[m * kLanes + highest_bit(lanes)];
    }
    least &= ~kLowBits;
    return bit_cast<float>(bits_of_key(least > kNone ? least : kNone + 1));
  }

  // Puts the candidates of the bits `own` of the row's lanes in found[0], found[1], ..., in any order; returns how
  // many they are, or more than there is room for.
  static __device__ __forceinline__ int collect(uint32_t own, const float (&keys)[kValues],
                                                const float (&scores)[kValues], Candidate* found) {
    constexpr int kDigits = 3;  // of a lane's number, of which a ballot tells one of all lanes
    const uint32_t count = __popc(own);
    const uint32_t lanes_below = (1u << lane_in_row()) - 1;
    int place = 0, total = 0;
    AITER_UNROLL
    for (int d = 0; d < kDigits; ++d) {
      const uint32_t lanes = of_row(wave_ballot((count >> d & 1) != 0));
      place += __popc(lanes & lanes_below) << d;
      total += __popc(lanes) << d;
    }
    if (of_row(wave_ballot(count >> kDigits != 0)) != 0) total = kRoom + 1;
    if (total > kRoom) return total;
    Candidate* next = found + place;
    AITER_UNROLL
    for (int i = kValues - 1; i >= 0; --i) {
      if ((own >> i & 1) == 0) continue;
      next->key = keys[i];
      next->score = scores[i];
      ++next;
    }
    AITER_LOOP
    for (next = found + place; own != 0; ++next) {  // registers are indexed by constants only
      const int i = highest_bit(own);
      own ^= 1u << i;
      next->expert_idx = static_cast<uint32_t>(expert_of_register(i));
      next->unused = 0;  // as candidates are read whole
    }
    // What order() reads behind the last one: a key that is no better than any.
    const int behind = total + lane_in_row();
    if (lane_in_row() < kAtOnce - 1 && behind < kRoom) {
      found[behind] = {__builtin_nanf(""), 0.0f, 0, 0};
    }
    return total;
  }

  // Puts the candidates in found[0 ... count - 1] in order, those of the first `topk` places.
  static __device__ __forceinline__ void order(Candidate* found, int count, int topk) {
    Candidate own[kCandidatesOfLane];
    int slot[kCandidatesOfLane];
    AITER_UNROLL
    for (int c = 0; c < kCandidatesOfLane; ++c) {
      const int place = c * kLanes + lane_in_row();
      slot[c] = topk;
      if (place >= count) continue;
      own[c] = found[place];
      int better = 0;
      AITER_LOOP
      for (int first = 0; first < count; first += kAtOnce) {
        Candidate other[kAtOnce];
        AITER_UNROLL
        for (int i = 0; i < kAtOnce; ++i) other[i] = found[first + i];
        bool is_better[kAtOnce];
        AITER_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          // NOTE: & and |, of which compilers make no branches.
          const int wins_tie = static_cast<int>(other[i].key == own[c].key) &
                               static_cast<int>(other[i].expert_idx < own[c].expert_idx);
          is_better[i] = (static_cast<int>(other[i].key > own[c].key) | wins_tie) != 0;
        }
        AITER_UNROLL
        for (int i = 0; i < kAtOnce; i += 4) {
          better += num_set(is_better[i], is_better[i + 1], is_better[i + 2], is_better[i + 3]);
        }
      }
      slot[c] = better;
    }
    wave_sync();
    AITER_UNROLL
    for (int c = 0; c < kCandidatesOfLane; ++c) {
      if (slot[c] >= topk) continue;
      found[slot[c]] = own[c];
    }
  }

  template <int kMask>
  static __device__ __forceinline__ uint32_t larger_of(uint32_t x) {
    const uint32_t y = wave_exchange<kMask>(x);
    return x > y ? x : y;
  }
  static __device__ __forceinline__ uint32_t largest(uint32_t x) {
    return larger_of<31>(larger_of<15>(larger_of<7>(larger_of<3>(larger_of<1>(x)))));
  }

  // Finds the winners of the rows with `fails` one by one, and puts them, with their keys as integers, where
  // order() does.
  template <typename Exists>
  static __device__ __forceinline__ void select_by_steps(const float (&keys)[kValues],
                                                         Exists exists, int topk, bool fails,
                                                         Candidate* found) {
    uint32_t left[kValues];
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      left[i] = exists(expert_of_register(i)) ? key_of(keys[i]) : 0;
    }
    AITER_LOOP
    for (int k = 0; k < topk; ++k) {
      uint32_t best = 0;
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) best = left[i] > best ? left[i] : best;
      best = largest(best);
      uint32_t complement = 0;  // of the lane's lowest expert with this key; 0 for none
      AITER_UNROLL
      for (int i = kValues - 1; i >= 0; --i) {
        if (left[i] == best) complement = ~static_cast<uint32_t>(expert_of_register(i));
      }
      complement = largest(complement);
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) {
        if (~static_cast<uint32_t>(expert_of_register(i)) == complement) left[i] = 0;
      }
      if (fails && lane_in_row() == 0) found[k] = {bit_cast<float>(best), 0.0f, ~complement, 0};
    }
  }
};

}  // namespace aiter
