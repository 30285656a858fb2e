// Rows of logits by any rule (routing_rule.h), 32 lanes to a row, for K <= 32 and up to 1,024 places.
//
// A place is a candidate where there are no groups; with groups each has a power of two of places from 8 on, of
// which the last may be empty. So the 8 neighbouring places of a lane's chunk are of one group, a group is an
// aligned set of lanes, and places order like candidates.
//
// Long because of what was measured, and as all steps are about the registers of one row.
//
//   1 key    of every register, once the row's softmax is known where it is one
//   2 groups a lane's two largest keys of a chunk, then those of the group's lanes by swaps; the groups' values
//            meet in LDS, where each counts those that are better; groups that do not stay are not eligible
//   3 select kept_keys.h, which keeps s beside the key
//
// The sum of a softmax over all candidates is that of row_topk.h, in the same order of indices (of places, with
// groups), so that a plain softmax has the same bits here.
//
// Dtypes of logits and bias and most of the rule are asked for at run time. kIsCommon is for the rules of most
// models: a sigmoid of the logits as they are, which are f32 or bf16 in whole chunks on 16-byte boundaries, as is
// the bias, f32, if there is one. These instances have nothing of what the others ask for.
//
// What counts is how many instructions a row passes, and how many it jumps over: nearly all of them once in a
// launch, at 3.5 cycles each whether one wave or two of a SIMD do it (clock64() between the steps, H100, 2026-11-26).
// Cycles of M = 1, DeepSeek-V3, before and now: up to the loads 1160 and 1060, until the logits are there 410 and
// 480, scores 960 and 400, groups 770 and 630, threshold 450 and 410, candidates 330 and 590, their order 1160 and
// 480, weights and their places 950 and 900, the sort of one token 620 and 510; 6,860 and 5,480 in all.
// From M = 16 on as much again comes behind top-k, as without a rule: 3,200 cycles with 256 experts, 8,200
// with 896, of which counting blocks is 4,700, four rounds by 256 threads.
//
// Measured on an H100 (2026-11-26), us per call that overlaps with nothing, bf16, by the rule of DeepSeek-V3 (E=256, K=8,
// D=7168, `python op_tests/bench_fused_topk_moe_sorting.py --rule deepseek-v3`) and those of Kimi-K2 and -K3:
//                                  DeepSeek-V3                Kimi-K2                    Kimi-K3
//                                  M = 1    64    256         1     64    256            1     64     256
//   keys of candidates, and s of winners, made again from memory
//                                   4.87  6.93   8.42
//   kept beside each other; maxima counted; instances for sigmoids
//                                   4.18  6.29   8.01      4.59   6.97   9.39         6.80  11.90   19.51
//   sigmoids in half of the instructions (numeric.h), candidates in order without a branch for each, common
//   instances without code that they jump over
//                                   3.52  5.50   6.98      3.64   6.01   7.96         4.89   9.85   15.44
// The steps of the last line one by one: 3.83, 3.35, 3.11 us for DeepSeek-V3, M = 1, in
// graphs of launches made by C++, and 6.43, 5.40, 4.46 for Kimi-K3.
// Rejected: 512 threads for more than 512 places, which leave 128 registers, with 556 bytes of spills: 4.46 -> 5.84,
// 9.35 -> 10.68 and 14.78 -> 15.66 us for Kimi-K3 by that clock. Rejected: asking for the bias before waiting for the launch
// before, as that one may have written it.
// Rejected: key - bias for s, which loses bits when the bias is large. Rejected: a step per winner over keys in
// registers, with groups as sets of lanes in which members are strided, so that a wave64 and a wave32 would sum
// a softmax in another order. Rejected: the operator / for the scores of a row, which is a branch for each
// (5.91 -> 4.87 us with M=1, together with groups' two largest by a tree).
#pragma once

#include "kept_keys.h"
#include "key_topk.h"
#include "row_rule.h"

namespace aiter {

constexpr int kRuleLanes = kMinWaveSize;  // that take a row
constexpr int kMaxRuleTopk = 32;          // of RuleRows
constexpr int kMaxRulePlaces = 1024;
constexpr int kMaxGroupPlaces = kRuleLanes * kKeysPerChunk;

__host__ __device__ constexpr int log2_ceil(int x) {
  int exponent = 0;
  while ((1 << exponent) < x) ++exponent;
  return exponent;
}

// Threads of a workgroup: a row takes three registers of a lane per value.
__host__ __device__ constexpr int max_rule_threads(int values) { return values > 16 ? 256 : 512; }

// Registers of a lane for a row in RuleRows, and the winners looked for; 0 for MemoryRuleRow.
struct RuleRowShape {
  int values, best;
};

__host__ __device__ constexpr RuleRowShape rule_row_shape(int num_places, int group_places,
                                                          int num_groups, int topk) {
  if (num_places > kMaxRulePlaces || topk > kMaxRuleTopk) return {0, 0};
  if (num_groups > 1 && group_places > kMaxGroupPlaces) return {0, 0};
  if (topk > 16) return {32, 32};
  return {num_places <= 8 * kRuleLanes ? 8 : num_places <= 16 * kRuleLanes ? 16 : 32, 16};
}

// Calls: follow, use; load; when the logits are there, wave_topk.
template <int kValues, int kBest, bool kIsCommon>
class RuleRows {
 public:
  using Item = unsigned char;  // rows are bytes apart
  using Keys = KeptKeys<kValues, kBest>;
  static constexpr bool kIsUsed = true;
  static constexpr int kMaxThreads = max_rule_threads(kValues);
  static constexpr int kRowsPerWave = Keys::kRowsPerWave;
  static constexpr int kPlaces = kRuleLanes * kValues;

  // Which of the wave's rows this lane works on.
  static __device__ __forceinline__ int row_in_wave() { return lane_idx() / kRuleLanes; }

  // `offset`: of the rule, an argument of the kernel, behind its first argument.
  __device__ __forceinline__ void follow(const RowRule& rule, size_t offset) {
    rule_ = &rule;
    offset_ = offset;
  }
  // NOTE: loaded where it is asked for: its thirty scalars, kept for all rows, spill on AMD GPUs. Not so where a wave
  // has one row of 32 registers, as clang then keeps loads in scratch (8 spilled vector registers and 349 on gfx1100).
  __device__ __forceinline__ decltype(auto) rule() const {
    if constexpr (kValues > 16 && kRowsPerWave == 1) {
      return static_cast<const RowRule&>(*rule_);
    } else {
      return loaded_anew(*rule_, offset_);
    }
  }
  // The wave's part of the LDS.
  __device__ __forceinline__ void use(void* lds) { lds_ = lds; }

  // `row` is the lane's.
  __device__ __forceinline__ void load(const Item* row, int, RowFormat) {
    const RowRule& r = rule();
    places_ = places_of(r);
    row_ = row;
    if constexpr (kIsCommon) {
      load_whole(row, r.logit_kind == FloatKind::bf16, logits_);
      if (r.bias_kind != FloatKind::none) load_whole(r.bias, false, bias_);
    } else {
      load_items(row, r.logit_kind, r.wide_logits, logits_);
      if (r.bias_kind != FloatKind::none) load_items(r.bias, r.bias_kind, r.wide_bias, bias_);
    }
  }

  // Lane k of the row's gets winner k, with the candidate's index; `softmax` is set.
  __device__ __forceinline__ typename Keys::Result select(RowSoftmax& softmax) {
    const RowRule& r = rule();
    places_ = places_of(r);
    float keys[kValues], scores[kValues];
    make_keys(r, softmax, keys, scores);
    if (r.rule.num_expert_group > 1) keep_best_groups(r, keys);
    auto mine = Keys::select(
        keys, scores,
        [&](int place) {
          return member_of(place) < places_.group_width && group_of(place) < places_.num_groups;
        },
        r.topk, lds_);
    mine.winner.expert_idx =
        static_cast<uint32_t>(candidate_of(static_cast<int>(mine.winner.expert_idx)));
    return mine;
  }

  __device__ __forceinline__ float logit(int candidate) const {
    return load_float(row_, rule().logit_kind, candidate);
  }

  // The loaded items are not needed any more. NOTE: not drop() of all, as the rule lies with the kernel's arguments
  // only as long as no other pointer may take its place.
  __device__ __forceinline__ void forget() {
    AITER_UNROLL
    for (int i = 0; i < kValues / 4; ++i) {
      drop(logits_[i]);
      drop(bias_[i]);
    }
  }

 private:
  static constexpr int kChunks = kValues / kKeysPerChunk;

  __device__ __forceinline__ int group_of(int place) const {
    return place >> places_.log2_of_group;
  }
  __device__ __forceinline__ int member_of(int place) const {
    return place - (group_of(place) << places_.log2_of_group);
  }
  __device__ __forceinline__ int candidate_of(int place) const {
    return group_of(place) * places_.group_width + member_of(place);
  }
  // How many of the 8 places from `first` on are candidates' (or less than 1), which follow each other.
  __device__ __forceinline__ int num_in_chunk(int first) const {
    return group_of(first) < places_.num_groups ? places_.group_width - member_of(first) : 0;
  }

  // Negative if there is a candidate in register i.
  __device__ __forceinline__ int none_from(int i) const {
    const int chunk = i / kKeysPerChunk * kKeysPerChunk;
    return i - chunk - num_in_chunk(Keys::expert_of_register(chunk));
  }

  // Where there is no candidate: NaN of any kind.
  static constexpr uint32_t kNoHalf = 0xffffu, kNoItem = 0xffffffffu;

  // Chunks on 16-byte boundaries, of bf16 or of f32.
  __device__ __forceinline__ void load_whole(const void* items, bool is_bf16,
                                             FourWords (&words)[kValues / 4]) const {
    AITER_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      const int place = Keys::expert_of_register(c * kKeysPerChunk);
      FourWords& low = words[2 * c];
      FourWords& high = words[2 * c + 1];
      low = high = FourWords{{kNoItem, kNoItem, kNoItem, kNoItem}};
      if (num_in_chunk(place) <= 0) continue;
      const int first = candidate_of(place);
      const char* const from = static_cast<const char*>(items) + (is_bf16 ? 2 : 4) * first;
      low = *reinterpret_cast<const FourWords*>(from);
      if (!is_bf16) high = *reinterpret_cast<const FourWords*>(from + sizeof(FourWords));
    }
  }

  __device__ __forceinline__ void load_items(const void* items, FloatKind kind, bool wide,
                                             FourWords (&words)[kValues / 4]) const {
    AITER_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      const int place = Keys::expert_of_register(c * kKeysPerChunk);
      const int count = num_in_chunk(place);
      const int first = candidate_of(place);
      FourWords& low = words[2 * c];
      FourWords& high = words[2 * c + 1];
      low = high = FourWords{{kNoItem, kNoItem, kNoItem, kNoItem}};
      if (kind == FloatKind::f32) {
        const uint32_t* const from = static_cast<const uint32_t*>(items) + first;
        if (wide && count > 0) {
          low = *reinterpret_cast<const FourWords*>(from);
          high = *reinterpret_cast<const FourWords*>(from + 4);
        } else if (!wide) {
          AITER_UNROLL
          for (int i = 0; i < 4; ++i) {
            if (i < count) low.word[i] = from[i];
            if (i + 4 < count) high.word[i] = from[i + 4];
          }
        }
      } else {
        const uint16_t* const from = static_cast<const uint16_t*>(items) + first;
        if (wide && count > 0) {
          low = *reinterpret_cast<const FourWords*>(from);
        } else if (!wide) {
          AITER_UNROLL
          for (int w = 0; w < 4; ++w) {
            const uint32_t even = 2 * w < count ? from[2 * w] : kNoHalf;
            const uint32_t odd = 2 * w + 1 < count ? from[2 * w + 1] : kNoHalf;
            low.word[w] = odd << 16 | even;
          }
        }
      }
    }
  }

  static __device__ __forceinline__ float item(const FourWords (&words)[kValues / 4],
                                               FloatKind kind, int i) {
    const int c = i / kKeysPerChunk, j = i % kKeysPerChunk;
    if (kind == FloatKind::f32) return bit_cast<float>(words[2 * c + j / 4].word[j % 4]);
    const uint16_t half = static_cast<uint16_t>(words[2 * c].word[j / 2] >> (j % 2 * 16));
    return kind == FloatKind::bf16 ? to_float(Bf16{half}) : to_float(F16{half});
  }

  static __device__ __forceinline__ void convert(const FourWords (&words)[kValues / 4],
                                                 FloatKind kind, float (&to)[kValues]) {
    if (kind == FloatKind::f32) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) to[i] = item(words, FloatKind::f32, i);
    } else if (kind == FloatKind::bf16) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) to[i] = item(words, FloatKind::bf16, i);
    } else {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) to[i] = item(words, FloatKind::f16, i);
    }
  }

  __device__ __forceinline__ void make_common_keys(const RowRule& r, float (&keys)[kValues],
                                                   float (&scores)[kValues]) const {
    const bool is_bf16 = r.logit_kind == FloatKind::bf16;
    const bool has_bias = r.bias_kind != FloatKind::none;
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) scores[i] = item(logits_, FloatKind::f32, i);
    if (is_bf16) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) scores[i] = item(logits_, FloatKind::bf16, i);
    }
    sigmoids(scores);
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      keys[i] = scores[i] + (has_bias ? item(bias_, FloatKind::f32, i) : 0.0f);
    }
  }

  // `scores`: x where logits are chosen by. A key is NaN, or -inf, where a candidate is not eligible.
  __device__ __forceinline__ void make_keys(const RowRule& r, RowSoftmax& softmax,
                                            float (&keys)[kValues],
                                            float (&scores)[kValues]) const {
    if constexpr (kIsCommon) {
      make_common_keys(r, keys, scores);
      return;
    }
    convert(logits_, r.logit_kind, keys);
    uint32_t ruled_out[kValues];  // all ones where there is no candidate, or its logit is NaN
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) ruled_out[i] = all_ones_if_nan(keys[i]);
    if ((r.rule.logit_scale != 1.0f || r.rule.softcap != 0.0f)) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) keys[i] = scaled_logit(r.rule, keys[i]);
    }
    if (r.rule.scoring_func == kSoftmax) {
      softmax_scores(r, softmax, keys, !r.key_is_logit);
    } else if (!r.key_is_logit && r.rule.scoring_func == kSigmoid) {
      sigmoids(keys);
    } else if (!r.key_is_logit) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) keys[i] = sqrtsoftplus(keys[i]);
    }
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) scores[i] = keys[i];
    if (r.bias_kind != FloatKind::none) {
      float bias[kValues];
      convert(bias_, r.bias_kind, bias);
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) keys[i] += bias[i];
    }
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      keys[i] = bit_cast<float>(bit_cast<uint32_t>(eligible_key(0.0f, keys[i])) | ruled_out[i]);
    }
  }

  // Finds the row's softmax, and replaces its x by scores if `replaces`.
  __device__ __forceinline__ void softmax_scores(const RowRule& r, RowSoftmax& softmax,
                                                 float (&x)[kValues], bool replaces) const {
    uint32_t best = 0;
    float terms[kValues];
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const uint32_t ordered =
          ordered_float(x[i]) & all_ones_if_negative(static_cast<uint32_t>(none_from(i)));
      best = ordered > best ? ordered : best;
    }
    best = larger<1>(best);
    best = larger<3>(best);
    best = larger<7>(best);
    best = larger<15>(best);
    best = larger<31>(best);
    softmax.max = bit_cast<float>(bits_of_key(best));
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const float term = softmax_numerator(without_nan(x[i]), softmax.max);
      terms[i] = bit_cast<float>(bit_cast<uint32_t>(term) &
                                 all_ones_if_negative(static_cast<uint32_t>(none_from(i))));
    }
    float sums[kKeysPerChunk];
    AITER_UNROLL
    for (int j = 0; j < kKeysPerChunk; ++j) sums[j] = over_lanes(over_chunks<0, 1>(terms, j));
    softmax.total =
        ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
    if (!replaces) return;
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) x[i] = share_of(r, softmax, terms[i]);
  }

  template <int kMask>
  static __device__ __forceinline__ uint32_t larger(uint32_t x) {
    const uint32_t y = wave_exchange<kMask>(x);
    return x > y ? x : y;
  }
  template <int kMask>
  static __device__ __forceinline__ float exchanged(float x) {
    return bit_cast<float>(wave_exchange<kMask>(bit_cast<uint32_t>(x)));
  }

  // Sums by halves of the index range: over the chunks of a lane, then over the row's lanes.
  template <int kFirst, int kStep>
  static __device__ __forceinline__ float over_chunks(const float (&terms)[kValues], int j) {
    if constexpr (kStep == kChunks) {
      return terms[kFirst * kKeysPerChunk + j];
    } else {
      return over_chunks<kFirst, 2 * kStep>(terms, j) +
             over_chunks<kFirst + kStep, 2 * kStep>(terms, j);
    }
  }
  static __device__ __forceinline__ float over_lanes(float x) {
    x += exchanged<15>(exchanged<31>(x));  // lane l ^ 16
    x += exchanged<8>(x);
    x += exchanged<4>(x);
    x += exchanged<2>(x);
    return x + exchanged<1>(x);
  }

  // Rules out the keys of all groups but the `topk_group` best.
  __device__ __forceinline__ void keep_best_groups(const RowRule& r, float (&keys)[kValues]) const {
    constexpr int kAtOnce = 8;
    const int lanes = 1 << r.log2_group_places >> log2_ceil(kKeysPerChunk);  // of a group
    uint32_t* const values = static_cast<uint32_t*>(lds_) + lane_idx() / kRuleLanes * kWordsOfRow;
    uint32_t own[kChunks];
    int num_better[kChunks];
    wave_sync();
    AITER_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      const float* const of = keys + c * kKeysPerChunk;
      BestTwo best = BestTwo::of(of[0], of[1])
                         .with(BestTwo::of(of[2], of[3]))
                         .with(BestTwo::of(of[4], of[5]).with(BestTwo::of(of[6], of[7])));
      if (lanes > 1) best.template merge<1>();
      if (lanes > 2) best.template merge<3>();
      if (AITER_UNLIKELY(lanes > 4)) {
        best.template merge<7>();
        if (lanes > 8) best.template merge<15>();
        if (lanes > 16) best.template merge<31>();
      }
      own[c] = ordered_float(best.value(r));
      num_better[c] = 0;
      const int place = Keys::expert_of_register(c * kKeysPerChunk);
      if (member_of(place) == 0) values[group_of(place)] = own[c];
    }
    wave_sync();
    AITER_LOOP
    for (int first = 0; first < r.rule.num_expert_group; first += kAtOnce) {
      const FourWords four[] = {*reinterpret_cast<const FourWords*>(values + first),
                                *reinterpret_cast<const FourWords*>(values + first + 4)};
      AITER_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        const int group = group_of(Keys::expert_of_register(c * kKeysPerChunk));
        bool is_better[kAtOnce];
        AITER_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          // Of equal values the lower group's is better.
          const uint32_t mine = own[c] + (first + i < group ? 0 : 1);
          const bool exists = first + i < r.rule.num_expert_group;
          is_better[i] = exists && four[i / 4].word[i % 4] >= mine;
        }
        AITER_UNROLL
        for (int i = 0; i < kAtOnce; i += 4) {
          num_better[c] +=
              num_set(is_better[i], is_better[i + 1], is_better[i + 2], is_better[i + 3]);
        }
      }
    }
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const bool stays = num_better[i / kKeysPerChunk] < r.rule.topk_group;
      keys[i] = stays ? keys[i] : __builtin_nanf("");
    }
  }

  static constexpr int kWordsOfRow =
      best_keys_lds_bytes(kRuleLanes) / static_cast<int>(sizeof(uint32_t));
  static_assert(kMaxRulePlaces / kKeysPerChunk <= kWordsOfRow, "a word for each group");

  // What places are, which the rule says, for one row: kept for all, the masks of lanes that follow would be.
  struct Places {
    int group_width, log2_of_group, num_groups;
  };
  static __device__ __forceinline__ Places places_of(const RowRule& r) {
    return {anew(r.group_width), anew(r.log2_group_places), anew(r.rule.num_expert_group)};
  }

  const RowRule* rule_ = nullptr;
  size_t offset_ = 0;
  Places places_;
  const Item* row_ = nullptr;
  void* lds_ = nullptr;
  FourWords logits_[kValues / 4], bias_[kValues / 4];
};

template <int kValues, int kBest, bool kIsCommon>
constexpr bool kUsesLds<RuleRows<kValues, kBest, kIsCommon>> = true;

template <int kValues, int kBest, bool kIsCommon>
__device__ __forceinline__ void drop(RuleRows<kValues, kBest, kIsCommon>& rows) {
  rows.forget();
}

}  // namespace aiter
