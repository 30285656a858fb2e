// A row of logits that stays in memory, by any rule (routing_rule.h): what rule_rows.h has no registers for, any E,
// K and groups. A wave takes a row, a lane whole groups of it, and every step of the selection looks at all keys
// anew. Slowly.
#pragma once

#include "row_rule.h"

namespace aiter {

// Calls: follow; load; select; next K times.
class MemoryRuleRow {
 public:
  using Item = unsigned char;
  static constexpr bool kIsUsed = true;
  static constexpr int kMaxThreads = max_row_threads(0);
  static constexpr int kRowsPerWave = 1;
  static constexpr int kPlaces = kAnyPlaces;

  static __device__ __forceinline__ int row_in_wave() { return 0; }

  // As in rule_rows.h.
  __device__ __forceinline__ void follow(const RowRule& rule, size_t offset) {
    rule_ = &rule;
    offset_ = offset;
  }
  __device__ __forceinline__ decltype(auto) rule() const { return loaded_anew(*rule_, offset_); }
  __device__ __forceinline__ void load(const Item* row, int, RowFormat) { row_ = row; }

  // Finds the softmax, and the last group that stays.
  __device__ __forceinline__ RowSoftmax select() {
    const RowRule& r = rule();
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
    const RowRule& r = rule();
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
    return load_float(row_, rule().logit_kind, candidate);
  }

 private:
  static __device__ __forceinline__ uint64_t ordered_pair(uint32_t value, int index) {
    return static_cast<uint64_t>(value) << 32 | static_cast<uint32_t>(~index);
  }

  __device__ __forceinline__ uint64_t ordered_group(int group) const {
    const RowRule& r = rule();
    BestTwo best = BestTwo::none();
    AITER_LOOP
    for (int i = 0; i < r.group_width; ++i) {
      const float key = key_in_memory(r, row_, softmax_, group * r.group_width + i);
      best = best.with({without_nan(key), -__builtin_inff()});
    }
    return ordered_pair(ordered_float(best.value(r)), group);
  }

  __device__ __forceinline__ void find_softmax() {
    const RowRule& r = rule();
    uint32_t best = 0;
    AITER_LOOP
    for (int c = lane_idx(); c < r.num_candidates; c += kWaveSize) {
      const uint32_t ordered =
          ordered_float(scaled_logit(r.rule, load_float(row_, r.logit_kind, c)));
      best = ordered > best ? ordered : best;
    }
    softmax_.max = bit_cast<float>(bits_of_key(wave_max(best)));
    const bool fits_registers = r.rule.num_expert_group << r.log2_group_places <= kMaxRowExperts;
    softmax_.total = wave_sum_by_halves(fits_registers ? sum_of_places(r) : sum_of_candidates(r));
  }

  __device__ __forceinline__ float numerator(const RowRule& r, int candidate) const {
    const float logit = load_float(row_, r.logit_kind, candidate);
    return softmax_numerator(without_nan(scaled_logit(r.rule, logit)), softmax_.max);
  }

  // By kMinWaveSize lanes, as WaveRow's in memory.
  __device__ __forceinline__ float sum_of_candidates(const RowRule& r) const {
    float sum = 0.0f;
    const int first = lane_idx() < kMinWaveSize ? lane_idx() : r.num_candidates;
    AITER_LOOP
    for (int c = first; c < r.num_candidates; c += kMinWaveSize) sum += numerator(r, c);
    return sum;
  }

  // By halves of the places, as rule_rows.h and WaveRow's in registers, so that a row has the same bits whether there
  // is LDS for its keys or not. A lane's terms are the places lane + kMinWaveSize * t; those of t and t + 16 are added
  // first, then these sums of t and t + 8, ..., which makes t the number of the term with its bits reversed.
  __device__ __forceinline__ float sum_of_places(const RowRule& r) const {
    constexpr int kLevels = 5, kTerms = 1 << kLevels;
    static_assert(kTerms * kMinWaveSize == kMaxRowExperts, "all places");
    float firsts[kLevels] = {};  // sums of 2^level terms that wait for their neighbour
    float sum = 0.0f;
    AITER_LOOP
    for (int term = 0; term < kTerms; ++term) {
      int t = 0;
      AITER_UNROLL
      for (int level = 0; level < kLevels; ++level) t = 2 * t | (term >> level & 1);
      const int place = t * kMinWaveSize + lane_idx();
      const int group = place >> r.log2_group_places;
      const int member = place - (group << r.log2_group_places);
      const bool exists =
          lane_idx() < kMinWaveSize && group < r.rule.num_expert_group && member < r.group_width;
      sum = exists ? numerator(r, group * r.group_width + member) : 0.0f;
      AITER_UNROLL
      for (int level = 0; level < kLevels; ++level) {
        const int below = (1 << level) - 1;
        if ((term & below) != below) continue;
        if ((term >> level & 1) != 0) {
          sum += firsts[level];
        } else {
          firsts[level] = sum;
        }
      }
    }
    return sum;
  }

  const RowRule* rule_ = nullptr;
  size_t offset_ = 0;
  const Item* row_ = nullptr;
  RowSoftmax softmax_;
  uint64_t last_ = 0, last_group_ = 0;  // winner and group that were taken last
};

__device__ __forceinline__ void drop(MemoryRuleRow&) {}

}  // namespace aiter
