// Top-k of rows of logits by any rule (routing_rule.h): what topk_routing and the fused launch share, beside
// key_topk.h, group_topk.h and row_topk.h for softmax alone.
//
//   candidates  E experts and Z zero experts, logits 0 .. E + Z - 1; the logits of shared experts follow
//   key         of a candidate, f32; NaN if it is not eligible. So what fills a row up, the lowest candidates
//               that are left, comes last by itself
//   winners     the K largest (key, -candidate) in descending order
//
// RuleRows: 32 lanes take a row and select by a threshold (best_keys.h), for K <= 32 and up to 1,024 places. A place is
// a candidate where there are no groups; with groups each has a power of two of places from 8 on, of which the
// last may be empty. So the 8 neighbouring places of a lane's chunk are of one group, a group is an aligned set
// of lanes, and places order like candidates.
//
//   1 key    of every register, once the row's softmax is known where it is one
//   2 groups a lane's two largest keys of a chunk, then those of the group's lanes by swaps; the groups' values
//            meet in LDS, where each counts those that are better; groups that do not stay are not eligible
//   3 select best_keys.h; keys of candidates that pass the threshold are made again from memory
//   4 weigh  lane k reads the logit of winner k once more, from a cache, and takes the same way to s. Where s is
//            the key there is nothing to read
//
// MemoryRuleRow: a wave takes a row that stays in memory, for everything else. A lane takes whole groups, and
// every step of the selection looks at all keys anew. Slowly.
//
// The sum of a softmax over all candidates is that of row_topk.h, in the same order of indices (of places, with
// groups), so that a plain softmax has the same bits here.
//
// Dtypes of logits and bias and the scoring function are asked for at run time: an instance for each would be 27
// times as many to compile, for a few uniform branches a row less.
//
// Rejected: carrying s beside the key through the selection, as many registers again; carrying key - bias, which
// loses bits when the bias is large. Rejected: a step per winner over keys in registers, with groups as sets of
// lanes in which members are strided, so that a wave64 and a wave32 would sum a softmax in another order.
#pragma once

#include "key_topk.h"
#include "rule_scores.h"

namespace aiter {

constexpr int kRuleLanes = 32;    // that take a row
constexpr int kMaxRuleTopk = 32;  // of RuleRows
constexpr int kMaxRulePlaces = 1024;
constexpr int kMaxGroupPlaces = kRuleLanes * kKeysPerChunk;

enum class FloatKind { f32, f16, bf16, none };  // of logits or bias

// What the selection of a row goes by.
struct RowRule {
  RoutingRule rule;
  const void* bias;  // [E + Z]
  FloatKind logit_kind, bias_kind;
  bool wide_logits, wide_bias;            // chunks lie on 16-byte boundaries, whole
  int num_candidates, num_experts, topk;  // E + Z, E, K
  int group_width;
  int log2_group_places;  // of RuleRows
  bool in_memory;         // for MemoryRuleRow, whatever RuleRows may hold
  bool top2;              // a group is worth the sum of its two largest keys
  bool key_is_logit;      // else s, and the bias
  bool shares_chosen;     // softmax over the chosen alone: section 2
  bool shares_none;       // softmax that gives all the same where none is above -inf: section 2
};

__host__ __device__ constexpr int log2_ceil(int x) {
  int exponent = 0;
  while ((1 << exponent) < x) ++exponent;
  return exponent;
}

// Threads of a workgroup: a row takes three registers of a lane per value.
__host__ __device__ constexpr int max_rule_threads(int values) {
  return values > 16 ? 256 : 512;
}

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

__device__ __forceinline__ float load_float(const void* items, FloatKind kind, int i) {
  if (kind == FloatKind::f32) return static_cast<const float*>(items)[i];
  const uint16_t bits = static_cast<const uint16_t*>(items)[i];
  return kind == FloatKind::bf16 ? to_float(Bf16{bits}) : to_float(F16{bits});
}

__device__ __forceinline__ uint32_t all_ones_if_nan(float x) {
  constexpr uint32_t kInf = 0x7f800000u;
  return all_ones_if_negative(kInf - (bit_cast<uint32_t>(x) & 0x7fffffffu));
}

// The row's maximum, and the sum of exp(x - maximum).
struct RowSoftmax {
  float max = 0.0f, total = 1.0f;
};

// A score of softmax, from exp(x - maximum).
__device__ __forceinline__ float share_of(const RowRule& r, const RowSoftmax& softmax,
                                          float numerator) {
  const bool none = !r.shares_none && softmax.max == -__builtin_inff();
  return none ? 0.0f : numerator / softmax.total;
}

__device__ __forceinline__ float score_of(const RowRule& r, const RowSoftmax& softmax, float x) {
  if (r.rule.scoring_func == kSigmoid) return sigmoid(x);
  if (r.rule.scoring_func == kSqrtSoftplus) return sqrtsoftplus(x);
  return share_of(r, softmax, softmax_numerator(without_nan(x), softmax.max));
}

// The key as best_keys.h takes it: NaN for a candidate that its logit or its key rules out.
__device__ __forceinline__ float eligible_key(float logit, float key) {
  constexpr float kLowest = -__builtin_inff();
  return logit == logit && key > kLowest ? key : __builtin_nanf("");
}

// The key of a candidate, from memory.
__device__ __forceinline__ float key_in_memory(const RowRule& r, const unsigned char* row,
                                               const RowSoftmax& softmax, int candidate) {
  const float logit = load_float(row, r.logit_kind, candidate);
  const float x = scaled_logit(r.rule, logit);
  float key = r.key_is_logit ? x : score_of(r, softmax, x);
  if (r.bias_kind != FloatKind::none) key += load_float(r.bias, r.bias_kind, candidate);
  return eligible_key(logit, key);
}

// NaN counts as -inf.
__device__ __forceinline__ uint32_t ordered_float(float x) {
  return ordered_key(ordinary_bits(bit_cast<uint32_t>(x)));
}

constexpr uint32_t kNotEligible = 0x007fffffu;  // ordered_float() of NaN

// The two largest keys of a group; -inf is none, as is a key that is NaN.
struct BestTwo {
  float first, second;

  static __device__ __forceinline__ BestTwo none() {
    return {-__builtin_inff(), -__builtin_inff()};
  }
  static __device__ __forceinline__ BestTwo of(float x, float y) {
    x = without_nan(x);
    y = without_nan(y);
    return {x > y ? x : y, x > y ? y : x};
  }
  __device__ __forceinline__ BestTwo with(const BestTwo& other) const {
    const bool mine = first > other.first;
    const float lower = mine ? other.first : first;
    const float upper_second = second > other.second ? second : other.second;
    return {mine ? first : other.first, lower > upper_second ? lower : upper_second};
  }
  // With those of the lanes that differ in the bits kMask, each half of which agree.
  template <int kMask>
  __device__ __forceinline__ void merge() {
    const float theirs = bit_cast<float>(wave_exchange<kMask>(bit_cast<uint32_t>(first)));
    const float their_second = bit_cast<float>(wave_exchange<kMask>(bit_cast<uint32_t>(second)));
    *this = with({theirs, their_second});
  }
  // What the group is worth.
  __device__ __forceinline__ float value(const RowRule& r) const {
    return r.top2 && r.group_width > 1 ? without_nan(first + second) : first;
  }
};

// Calls: follow, use; load; when the logits are there, wave_topk.
template <int kValues, int kBest>
class RuleRows {
 public:
  using Item = unsigned char;  // rows are bytes apart
  using Keys = BestKeys<kRuleLanes, kValues, kBest>;
  static constexpr bool kIsUsed = true;
  static constexpr int kMaxThreads = max_rule_threads(kValues);
  static constexpr int kRowsPerWave = Keys::kRowsPerWave;

  // Which of the wave's rows this lane works on.
  static __device__ __forceinline__ int row_in_wave() { return lane_idx() / kRuleLanes; }

  __device__ __forceinline__ void follow(const RowRule& rule) { rule_ = &rule; }
  __device__ __forceinline__ const RowRule& rule() const { return *rule_; }
  // The wave's part of the LDS.
  __device__ __forceinline__ void use(void* lds) { lds_ = lds; }

  // `row` is the lane's.
  __device__ __forceinline__ void load(const Item* row, int, RowFormat) {
    const RowRule& r = *rule_;
    row_ = row;
    load_items(row, r.logit_kind, r.wide_logits, logits_);
    if (r.bias_kind != FloatKind::none) load_items(r.bias, r.bias_kind, r.wide_bias, bias_);
  }

  // Lane k of the row's gets winner k, with the candidate's index; `softmax` is set.
  __device__ __forceinline__ Winner select(RowSoftmax& softmax) {
    const RowRule& r = *rule_;
    float keys[kValues];
    make_keys(softmax, keys);
    if (r.rule.num_expert_group > 1) keep_best_groups(keys);
    Winner mine = Keys::select_of(
        keys,
        [&](int place) {
          return member_of(place) < r.group_width && group_of(place) < r.rule.num_expert_group;
        },
        r.topk, lds_,
        [&](uint32_t place) {
          return key_in_memory(r, row_, softmax, candidate_of(static_cast<int>(place)));
        });
    mine.expert_idx = static_cast<uint32_t>(candidate_of(static_cast<int>(mine.expert_idx)));
    return mine;
  }

  __device__ __forceinline__ float logit(int candidate) const {
    return load_float(row_, rule_->logit_kind, candidate);
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

  __device__ __forceinline__ float sum_in_order(float x, int topk) const {
    return Keys::sum_in_order(x, topk, lds_);
  }

 private:
  static constexpr int kChunks = kValues / kKeysPerChunk;

  __device__ __forceinline__ int group_of(int place) const {
    return place >> rule_->log2_group_places;
  }
  __device__ __forceinline__ int member_of(int place) const {
    return place - (group_of(place) << rule_->log2_group_places);
  }
  __device__ __forceinline__ int candidate_of(int place) const {
    return group_of(place) * rule_->group_width + member_of(place);
  }
  // How many of the 8 places from `first` on are candidates' (or less than 1), which follow each other.
  __device__ __forceinline__ int num_in_chunk(int first) const {
    return group_of(first) < rule_->rule.num_expert_group ? rule_->group_width - member_of(first)
                                                          : 0;
  }

  // Negative if there is a candidate in register i.
  __device__ __forceinline__ int none_from(int i) const {
    const int chunk = i / kKeysPerChunk * kKeysPerChunk;
    return i - chunk - num_in_chunk(Keys::expert_of_register(chunk));
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
      low = high = FourWords{};
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
            const uint32_t even = 2 * w < count ? from[2 * w] : 0;
            const uint32_t odd = 2 * w + 1 < count ? from[2 * w + 1] : 0;
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

  __device__ __forceinline__ void make_keys(RowSoftmax& softmax, float (&keys)[kValues]) const {
    const RowRule& r = *rule_;
    convert(logits_, r.logit_kind, keys);
    uint32_t ruled_out[kValues];  // all ones where there is no candidate, or its logit is NaN
    AITER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      ruled_out[i] =
          ~all_ones_if_negative(static_cast<uint32_t>(none_from(i))) | all_ones_if_nan(keys[i]);
    }
    if (r.rule.logit_scale != 1.0f || r.rule.softcap != 0.0f) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) keys[i] = scaled_logit(r.rule, keys[i]);
    }
    if (r.rule.scoring_func == kSoftmax) {
      softmax_scores(softmax, keys, !r.key_is_logit);
    } else if (!r.key_is_logit && r.rule.scoring_func == kSigmoid) {
      sigmoids(keys);
    } else if (!r.key_is_logit) {
      AITER_UNROLL
      for (int i = 0; i < kValues; ++i) keys[i] = sqrtsoftplus(keys[i]);
    }
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
  __device__ __forceinline__ void softmax_scores(RowSoftmax& softmax, float (&x)[kValues],
                                                 bool replaces) const {
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
    for (int i = 0; i < kValues; ++i) x[i] = share_of(*rule_, softmax, terms[i]);
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
  __device__ __forceinline__ void keep_best_groups(float (&keys)[kValues]) const {
    const RowRule& r = *rule_;
    constexpr int kAtOnce = 4;
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
      if (lanes > 4) best.template merge<7>();
      if (lanes > 8) best.template merge<15>();
      if (lanes > 16) best.template merge<31>();
      own[c] = ordered_float(best.value(r));
      num_better[c] = 0;
      const int place = Keys::expert_of_register(c * kKeysPerChunk);
      if (member_of(place) == 0) values[group_of(place)] = own[c];
    }
    wave_sync();
    AITER_LOOP
    for (int first = 0; first < r.rule.num_expert_group; first += kAtOnce) {
      const FourWords four = *reinterpret_cast<const FourWords*>(values + first);
      AITER_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        const int group = group_of(Keys::expert_of_register(c * kKeysPerChunk));
        AITER_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          // Of equal values the lower group's is better.
          const uint32_t mine = own[c] + (first + i < group ? 0 : 1);
          const bool exists = first + i < r.rule.num_expert_group;
          num_better[c] += exists && four.word[i] >= mine ? 1 : 0;
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

  const RowRule* rule_ = nullptr;
  const Item* row_ = nullptr;
  void* lds_ = nullptr;
  FourWords logits_[kValues / 4], bias_[kValues / 4];
};

template <int kValues, int kBest>
constexpr bool kUsesLds<RuleRows<kValues, kBest>> = true;

template <int kValues, int kBest>
__device__ __forceinline__ void drop(RuleRows<kValues, kBest>& rows) {
  rows.forget();
}

// Calls: follow; load; select; next K times.
class MemoryRuleRow {
 public:
  using Item = unsigned char;
  static constexpr bool kIsUsed = true;
  static constexpr int kMaxThreads = max_row_threads(0);
  static constexpr int kRowsPerWave = 1;

  static __device__ __forceinline__ int row_in_wave() { return 0; }

  __device__ __forceinline__ void follow(const RowRule& rule) { rule_ = &rule; }
  __device__ __forceinline__ const RowRule& rule() const { return *rule_; }
  __device__ __forceinline__ void load(const Item* row, int, RowFormat) { row_ = row; }

  // Finds the softmax, and the last group that stays.
  __device__ __forceinline__ RowSoftmax select() {
    const RowRule& r = *rule_;
    if (r.rule.scoring_func == kSoftmax) find_softmax();
    last_ = ~uint64_t{0};
    last_group_ = ~uint64_t{0};
    if (r.rule.num_expert_group == 1) return softmax_;
    AITER_LOOP
    for (int t = 0; t < r.rule.topk_group; ++t) {
      uint64_t best = 0;
      AITER_LOOP
      for (int g = lane_idx(); g < r.rule.num_expert_group; g += kWaveSize) {
        const uint64_t group = ordered_group(g);
        if (group < last_group_ && group > best) best = group;
      }
      last_group_ = wave_max(best);
    }
    return softmax_;
  }

  // The best candidate that was not taken yet, the same in every lane, and takes it. A lane takes whole groups,
  // or single candidates where there is one group.
  __device__ __forceinline__ Winner next() {
    const RowRule& r = *rule_;
    const bool in_groups = r.rule.num_expert_group > 1;
    const int width = in_groups ? r.group_width : 1;
    uint64_t best = 0;
    AITER_LOOP
    for (int first = lane_idx() * width; first < r.num_candidates; first += kWaveSize * width) {
      const bool stays = !in_groups || ordered_group(first / width) >= last_group_;
      AITER_LOOP
      for (int c = first; c < first + width; ++c) {
        const uint32_t key =
            stays ? ordered_float(key_in_memory(r, row_, softmax_, c)) : kNotEligible;
        const uint64_t ordered = ordered_pair(key, c);
        if (ordered < last_ && ordered > best) best = ordered;
      }
    }
    last_ = wave_max(best);
    return {static_cast<uint32_t>(last_ >> 32), ~static_cast<uint32_t>(last_)};
  }

  __device__ __forceinline__ float logit(int candidate) const {
    return load_float(row_, rule_->logit_kind, candidate);
  }

 private:
  static __device__ __forceinline__ uint64_t ordered_pair(uint32_t value, int index) {
    return static_cast<uint64_t>(value) << 32 | static_cast<uint32_t>(~index);
  }

  __device__ __forceinline__ uint64_t ordered_group(int group) const {
    const RowRule& r = *rule_;
    BestTwo best = BestTwo::none();
    AITER_LOOP
    for (int i = 0; i < r.group_width; ++i) {
      const float key = key_in_memory(r, row_, softmax_, group * r.group_width + i);
      best = best.with({without_nan(key), -__builtin_inff()});
    }
    return ordered_pair(ordered_float(best.value(r)), group);
  }

  // By kMinWaveSize lanes, as WaveRow's in memory.
  __device__ __forceinline__ void find_softmax() {
    const RowRule& r = *rule_;
    uint32_t best = 0;
    AITER_LOOP
    for (int c = lane_idx(); c < r.num_candidates; c += kWaveSize) {
      const uint32_t ordered = ordered_float(scaled_logit(r.rule, logit(c)));
      best = ordered > best ? ordered : best;
    }
    softmax_.max = bit_cast<float>(bits_of_key(wave_max(best)));
    float sum = 0.0f;
    const int first = lane_idx() < kMinWaveSize ? lane_idx() : r.num_candidates;
    AITER_LOOP
    for (int c = first; c < r.num_candidates; c += kMinWaveSize) {
      sum += softmax_numerator(without_nan(scaled_logit(r.rule, logit(c))), softmax_.max);
    }
    softmax_.total = wave_sum_by_halves(sum);
  }

  const RowRule* rule_ = nullptr;
  const Item* row_ = nullptr;
  RowSoftmax softmax_;
  uint64_t last_ = 0, last_group_ = 0;  // winner and group that were taken last
};

__device__ __forceinline__ void drop(MemoryRuleRow&) {}

// What a winner weighs before it is divided.
template <typename Rows>
__device__ __forceinline__ float weight_of(const Rows& row, const RowSoftmax& softmax,
                                           const Winner& winner) {
  const RowRule& r = row.rule();
  if (!r.shares_none && winner.stored == kNotEligible) return 0.0f;
  if (!r.key_is_logit && r.bias_kind == FloatKind::none) {
    return bit_cast<float>(bits_of_key(winner.stored));
  }
  const float x = scaled_logit(r.rule, row.logit(static_cast<int>(winner.expert_idx)));
  if (r.shares_chosen) return softmax_numerator(without_nan(x), softmax.max);
  return score_of(r, softmax, x);
}

// The last steps to a weight, once the sum over the chosen is known.
__device__ __forceinline__ float final_weight(const RowRule& r, float weight, float sum) {
  if (r.rule.need_renorm) {
    if (!r.shares_chosen) {
      sum = (sum > r.rule.renorm_min ? sum : r.rule.renorm_min) + r.rule.renorm_eps;
    }
    weight = sum == 0.0f ? 0.0f : weight / sum;
  }
  return weight * r.rule.routed_scaling_factor;
}

// The id of a candidate: zero experts come behind the shared ones.
__device__ __forceinline__ int id_of(const RowRule& r, uint32_t candidate) {
  const int id = static_cast<int>(candidate);
  return id < r.num_experts ? id : id + r.rule.num_shared_experts;
}

// Puts the shared experts in their slots, lane l of `num_lanes` slots l, num_lanes + l and so on.
template <typename Rows, typename Sink>
__device__ __forceinline__ void put_shared(const Rows& row, int lane, int num_lanes, bool valid,
                                           Sink& sink) {
  const RowRule& r = row.rule();
  if (r.rule.num_shared_experts == 0) return;
  AITER_LOOP
  for (int k = lane; k < r.topk + r.rule.num_shared_experts; k += num_lanes) {
    if (k < r.topk) continue;
    float weight = r.rule.shared_expert_weight;
    if (r.rule.shared_expert_scoring_func == kSharedSigmoid) {
      const float logit = row.logit(r.num_candidates + k - r.topk);
      weight = logit == logit ? sigmoid(logit) : 0.0f;
    }
    if (valid) sink.put(k, r.num_experts + k - r.topk, weight);
  }
}

// Runs the selection for the loaded rows, as row_topk.h does; sink and `valid` are the lane's row's. Sink:
// put(k, id, weight) is called once per slot, each by one lane.
template <int kValues, int kBest, typename Sink>
__device__ __forceinline__ void wave_topk(RuleRows<kValues, kBest>& rows, int, int, bool,
                                          bool valid, Sink& sink) {
  const RowRule& r = rows.rule();
  RowSoftmax softmax;
  const Winner mine = rows.select(softmax);
  float weight = weight_of(rows, softmax, mine);
  const float sum = r.rule.need_renorm ? rows.sum_in_order(weight, r.topk) : 0.0f;
  weight = final_weight(r, weight, sum);
  const int k = lane_idx() % kRuleLanes;
  if (valid && k < r.topk) sink.put(k, id_of(r, mine.expert_idx), weight);
  put_shared(rows, k, kRuleLanes, valid, sink);
}

// When K exceeds the wave, weights arrive before their last steps, and finish(k, f) replaces each by f of it,
// called by the same lane.
template <typename Sink>
__device__ __forceinline__ void wave_topk(MemoryRuleRow& row, int, int, bool, bool, Sink& sink) {
  const RowRule& r = row.rule();
  const int topk = r.topk;
  const bool one_pass = topk <= kWaveSize;
  const RowSoftmax softmax = row.select();
  float sum = 0.0f;
  AITER_LOOP
  for (int first = 0; first < topk; first += kWaveSize) {
    const int num_winners = topk - first < kWaveSize ? topk - first : kWaveSize;
    Winner mine{};
    AITER_LOOP
    for (int k = 0; k < num_winners; ++k) {
      const Winner winner = row.next();
      if (k == lane_idx()) mine = winner;
    }
    float weight = weight_of(row, softmax, mine);
    if (r.rule.need_renorm) sum = wave_sum_in_order(weight, num_winners, sum);
    if (one_pass) weight = final_weight(r, weight, sum);
    if (lane_idx() < num_winners) {
      sink.put(first + lane_idx(), id_of(r, mine.expert_idx), weight);
    }
  }
  if (!one_pass) {
    AITER_LOOP
    for (int k = lane_idx(); k < topk; k += kWaveSize) {
      sink.finish(k, [&](float weight) { return final_weight(r, weight, sum); });
    }
  }
  put_shared(row, lane_idx(), kWaveSize, true, sink);
}

}  // namespace aiter
