// The K best of a row of f32 keys, for groups of lanes that have a row each: K <= 32, E <= 1024.
//
//   winners   the K largest (key_e, -e) in descending order; NaN counts as -inf, -0 as +0
//   keys      lane l of a group of kLanes holds those of the experts 8l ... 8l + 7, 8(kLanes + l) ... + 7 and
//             so on, in kValues registers; NaN where there is no expert
//   result    lane k of the group gets winner k
//
// A row is looked at twice as a whole, and a key costs about four instructions whatever K is:
//
//   1 maxima     the group makes 2 kBest maxima, kBest >= K, each of as many keys
//   2 threshold  the K-th largest of them, or the kBest-th where K is near: at least K keys are as large. A network
//                sorts the maxima in lanes, by halves; the larger of one half and the other one turned round
//                are the kBest best
//   3 candidates keys that are not below it; of random rows there are 1.2 to 1.4 times as many. A lane notes its own
//                as bits, ballots over their number tell it its place in LDS
//   4 order      each lane takes candidates, mostly one at most, asks for their keys again (key_at) as it cannot
//                index its registers, and counts those that are better: that is the slot
//
// Values are compared where there are many, and (key, expert) only where there are few; that is why f32 keys
// take hardly more than 16-bit ones. Rows that have less than kBest maxima above -inf, or more candidates
// than there is room for (many equal keys), are selected again by a step per winner, over keys in registers.
//
// LDS: best_keys_lds_bytes() of each wave, on a 16-byte boundary. It is the wave's own, so that wave_sync() is all
// there is to wait for.
#pragma once

#include "group_topk.h"

namespace aiter {

constexpr int kKeysPerChunk = 8;  // neighbouring experts of a lane

// Rows of fewer keys have not enough maxima, each of eight keys or, in lanes that make two, of four: their
// kBest-th is too low.
__host__ __device__ constexpr int least_keys(int lanes, int best) {
  return (lanes < 2 * best ? 5 : 10) * best;
}

// Candidates that a group has room for, in LDS.
constexpr int kCandidatesPerLane = 3;

__host__ __device__ constexpr int best_keys_lds_bytes(int num_lanes) {
  return num_lanes * kCandidatesPerLane * static_cast<int>(sizeof(uint64_t));
}

template <int kLanes, int kValues, int kBest>
class BestKeys {
 public:
  static constexpr int kRowsPerWave = kWaveSize / kLanes;
  static constexpr int kMaxTopk = kBest;

  static __device__ __forceinline__ int lane_in_group() { return lane_idx() % kLanes; }

  // The expert of register i of this lane.
  static __device__ __forceinline__ int expert_of_register(int i) {
    return (i / kKeysPerChunk * kLanes + lane_in_group()) * kKeysPerChunk + i % kKeysPerChunk;
  }

  // `lds` is the wave's. By all lanes, with num_experts and topk the same for all; key_at(e) gives the key of expert
  // e that the group's lanes have in `keys`, as a float. Destroys `keys`.
  template <typename KeyAt>
  static __device__ __forceinline__ Winner select(float (&keys)[kValues], int num_experts, int topk,
                                                  void* lds, KeyAt key_at) {
    return select_of(
        keys, [&](int expert_idx) { return expert_idx < num_experts; }, topk, lds, key_at);
  }

  // As select(), of the experts for which exists(e); keys of others are NaN.
  template <typename Exists, typename KeyAt>
  static __device__ __forceinline__ Winner select_of(float (&keys)[kValues], Exists exists,
                                                     int topk, void* lds, KeyAt key_at) {
    uint64_t* const found = of_group(lds);
    const float least = threshold(keys, topk);
    uint32_t own = 0;  // bit i: keys[i] is a candidate
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) own |= keys[i] >= least ? 1u << i : 0u;
    wave_sync();  // what the row before left here has been read
    const int num_found = collect(own, found);
    // NOTE: NaN is as good as -inf, but no candidate. Above -inf there are kBest candidates or more.
    const bool fails = num_found > kRoom || !(least > -__builtin_inff());
    order_candidates(found, fails ? 0 : num_found, topk, key_at);
    if (wave_ballot(fails) != 0) select_by_steps(keys, exists, topk, fails, found);
    wave_sync();
    const int k = lane_in_group() < topk ? lane_in_group() : 0;
    const uint64_t mine = found[k];
    return {static_cast<uint32_t>(mine >> 32), ~static_cast<uint32_t>(mine)};
  }

  // Winner 0, behind select().
  static __device__ __forceinline__ uint32_t best_key(const void* lds) {
    return static_cast<uint32_t>(of_group(const_cast<void*>(lds))[0] >> 32);
  }

  // (x of lane 0 + x of lane 1) + ... `topk` terms within each group, behind select() and best_key().
  static __device__ __forceinline__ float sum_in_order(float x, int topk, void* lds) {
    float* const terms = reinterpret_cast<float*>(of_group(lds));
    wave_sync();
    terms[lane_in_group()] = lane_in_group() < topk ? x : 0.0f;
    wave_sync();
    FourWords four[kBest / 4];
    AITER_UNROLL
    for (int i = 0; i < kBest / 4; ++i) four[i] = reinterpret_cast<const FourWords*>(terms)[i];
    float sum = 0.0f;
    AITER_UNROLL
    for (int i = 0; i < kBest; ++i) sum += bit_cast<float>(four[i / 4].word[i % 4]);
    return sum;
  }

 private:
  static constexpr int kRoom = kCandidatesPerLane * kLanes;
  static constexpr int kMaximaPerLane = 2 * kBest / kLanes;
  static_assert(kMaximaPerLane == 1 || kMaximaPerLane == 2, "halves are of kBest lanes");
  static_assert(kValues <= 32, "a bit for each");

  static __device__ __forceinline__ uint32_t of_group(WaveMask lanes) {
    constexpr uint32_t kAll = static_cast<uint32_t>((uint64_t{1} << kLanes) - 1);
    return static_cast<uint32_t>(lanes >> (lane_idx() / kLanes * kLanes)) & kAll;
  }

  static __device__ __forceinline__ uint64_t* of_group(void* lds) {
    return static_cast<uint64_t*>(lds) + lane_idx() / kLanes * kRoom;
  }

  static __device__ __forceinline__ uint32_t key_of(float key) {
    return ordered_key(ordinary_bits(bit_cast<uint32_t>(key)));
  }

  // Over the lane's registers, or those of one half of each chunk, so that short rows have both.
  enum Part { kFirstHalf, kSecondHalf, kWhole };
  template <Part kPart, int kFirst = 0, int kCount = kPart == kWhole ? kValues : kValues / 2>
  static __device__ __forceinline__ float max_over(const float (&keys)[kValues]) {
    constexpr int kHalf = kKeysPerChunk / 2;
    if constexpr (kCount > 1) {
      return max_but_nan(max_over<kPart, kFirst, kCount / 2>(keys),
                         max_over<kPart, kFirst + kCount / 2, kCount / 2>(keys));
    } else if constexpr (kPart == kWhole) {
      return keys[kFirst];
    } else {
      return keys[kFirst / kHalf * kKeysPerChunk + kPart * kHalf + kFirst % kHalf];
    }
  }

  // Keeps the larger of the lane's and that of lane l ^ kMask where bit kBit of l is not set, else the smaller.
  template <int kMask, int kBit>
  static __device__ __forceinline__ uint32_t ordered(uint32_t x) {
    const uint32_t y = wave_exchange<kMask>(x);
    const uint32_t larger = x > y ? x : y, smaller = x > y ? y : x;
    return (lane_idx() & kBit) != 0 ? smaller : larger;
  }

  template <int kDistance>
  static __device__ __forceinline__ uint32_t ordered_from(uint32_t x) {
    if constexpr (kDistance == 0) {
      return x;
    } else {
      return ordered_from<kDistance / 2>(ordered<kDistance, kDistance>(x));
    }
  }

  // Puts the values of each kSize lanes in descending order: two halves in order, one of them turned round.
  template <int kSize>
  static __device__ __forceinline__ uint32_t sorted(uint32_t x) {
    if constexpr (kSize == 1) {
      return x;
    } else {
      return ordered_from<kSize / 4>(ordered<kSize - 1, kSize / 2>(sorted<kSize / 2>(x)));
    }
  }

  // The least over each kSize lanes.
  template <int kSize>
  static __device__ __forceinline__ uint32_t least_of(uint32_t x) {
    if constexpr (kSize == 1) {
      return x;
    } else {
      x = least_of<kSize / 2>(x);
      const uint32_t y = wave_exchange<kSize - 1>(x);
      return x < y ? x : y;
    }
  }

  static __device__ __forceinline__ float threshold(const float (&keys)[kValues], int topk) {
    uint32_t best;
    if constexpr (kMaximaPerLane == 1) {
      best = sorted<kBest>(key_of(max_over<kWhole>(keys)));
      const uint32_t other = wave_exchange<kLanes - 1>(best);
      best = best > other ? best : other;
    } else {
      best = sorted<kBest>(key_of(max_over<kFirstHalf>(keys)));
      const uint32_t other =
          wave_exchange<kLanes - 1>(sorted<kBest>(key_of(max_over<kSecondHalf>(keys))));
      best = best > other ? best : other;
    }
    if (topk <= kBest * 3 / 4) {  // few of them: in order, so that those behind do not count
      best = ordered_from<kBest / 2>(best);
      if (lane_idx() % kBest >= topk) best = ~0u;
    }
    const uint32_t least = kLanes == kWaveSize ? ~wave_max(~best) : least_of<kBest>(best);
    return bit_cast<float>(bits_of_key(least));
  }

  // Puts the experts of the bits `own` of the group's lanes in the lower halves of found[0], found[1], ..., in any
  // order; returns how many they are, or more than there is room for, and then the places are not right.
  static __device__ __forceinline__ int collect(uint32_t own, uint64_t* found) {
    constexpr int kDigits = 3;  // of a lane's number, of which a ballot tells one of all lanes
    const uint32_t count = __popc(own);
    const uint32_t lanes_below = (1u << lane_in_group()) - 1;
    uint32_t* const words = reinterpret_cast<uint32_t*>(found);
    int place = 0, total = 0;
    AITER_UNROLL
    for (int d = 0; d < kDigits; ++d) {
      const uint32_t lanes = of_group(wave_ballot((count >> d & 1) != 0));
      place += __popc(lanes & lanes_below) << d;
      total += __popc(lanes) << d;
    }
    if (of_group(wave_ballot(count >> kDigits != 0)) != 0) total = kRoom + 1;
    if (total > kRoom) return total;
    AITER_LOOP
    while (own != 0) {
      const int i = highest_bit(own);
      own ^= 1u << i;
      words[2 * place++] = static_cast<uint32_t>(expert_of_register(i));
    }
    return total;
  }

  // From experts in found[0 ... count - 1] to the winners in order, as (key, ~expert), in found[0 ... topk - 1]. Where less
  // winners than lanes are looked for, there are mostly no more candidates than lanes.
  template <typename KeyAt>
  static __device__ __forceinline__ void order_candidates(uint64_t* found, int count, int topk,
                                                          KeyAt key_at) {
    if (kBest < kLanes && wave_ballot(count > kLanes) == 0) {
      order_candidates_of_lanes<1, 8>(found, count, topk, key_at);
    } else {
      order_candidates_of_lanes<kCandidatesPerLane, 4>(found, count, topk, key_at);
    }
  }

  // The same, of up to kEach for each lane, each of which is compared with kAtOnce others at a time.
  template <int kEach, int kAtOnce, typename KeyAt>
  static __device__ __forceinline__ void order_candidates_of_lanes(uint64_t* found, int count,
                                                                   int topk, KeyAt key_at) {
    const int padded = (count + kAtOnce - 1) / kAtOnce * kAtOnce;
    uint64_t own[kEach];
    int slot[kEach];
    wave_sync();
    AITER_UNROLL
    for (int c = 0; c < kEach; ++c) {
      const int place = c * kLanes + lane_in_group();
      own[c] = 0;
      if (place < count) {
        // Nobody has written the other half.
        const uint32_t expert_idx = *reinterpret_cast<const uint32_t*>(found + place);
        own[c] = static_cast<uint64_t>(key_of(key_at(expert_idx))) << 32 | ~expert_idx;
      }
      if (place < padded) found[place] = own[c];
    }
    wave_sync();
    AITER_UNROLL
    for (int c = 0; c < kEach; ++c) {
      slot[c] = topk;
      if (c * kLanes + lane_in_group() >= count) continue;
      uint32_t better = ~0u;  // as it is as good as itself
      AITER_LOOP
      for (int first = 0; first < count; first += kAtOnce) {
        uint64_t other[kAtOnce];
        AITER_UNROLL
        for (int i = 0; i < kAtOnce; i += 2) {
          const FourWords two = *reinterpret_cast<const FourWords*>(found + first + i);
          other[i] = static_cast<uint64_t>(two.word[1]) << 32 | two.word[0];
          other[i + 1] = static_cast<uint64_t>(two.word[3]) << 32 | two.word[2];
        }
        AITER_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          better = counted_if_at_least(better, other[i], own[c]);
        }
      }
      slot[c] = static_cast<int>(better);
    }
    wave_sync();
    AITER_UNROLL
    for (int c = 0; c < kEach; ++c) {
      if (slot[c] < topk) found[slot[c]] = own[c];
    }
  }

  template <int kSize>
  static __device__ __forceinline__ uint32_t largest_of(uint32_t x) {
    return ~least_of<kSize>(~x);
  }

  // Finds the winners of the groups with `fails` one by one, and puts them where order_candidates() does.
  template <typename Exists>
  static __device__ __forceinline__ void select_by_steps(float (&keys)[kValues], Exists exists,
                                                         int topk, bool fails, uint64_t* found) {
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
      best = largest_of<kLanes>(best);
      uint32_t complement = 0;  // of the lane's lowest expert with this key; 0 for none
      AITER_UNROLL
      for (int i = kValues - 1; i >= 0; --i) {
        if (left[i] == best) complement = ~static_cast<uint32_t>(expert_of_register(i));
      }
      complement = largest_of<kLanes>(complement);
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) {
        if (~static_cast<uint32_t>(expert_of_register(i)) == complement) left[i] = 0;
      }
      if (fails && lane_in_group() == 0) found[k] = static_cast<uint64_t>(best) << 32 | complement;
    }
  }
};

}  // namespace aiter
