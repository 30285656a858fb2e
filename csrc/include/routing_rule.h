// By which rule does a row of logits become experts and weights? The scalars of an aiter.RoutingRule, as
// bindings and launchers see them; rule_scores.h has the arithmetic, and rule_topk.h selects by it.
//
//   x     logit * logit_scale, then softcap * tanh(x / softcap) where softcap > 0
//   s     of x, by scoring_func
//   key   s + bias;  x where logits are chosen by
//   w     s / (max(sum of the chosen s, renorm_min) + renorm_eps) * routed_scaling_factor
//
// docs/contract.md ("any rule") says the rest.
#pragma once

#include <cstdint>

namespace aiter {

// NOTE: aiter/ops/rule.py has the same names in the same places.
enum ScoringFunc { kSoftmax, kSigmoid, kSqrtSoftplus, kNumScoringFuncs };
enum GroupScore { kMax, kTop2, kByBias = -1 };  // kByBias: kTop2 where there is a bias, else kMax
enum SelectOn { kScore, kLogit };
enum SharedScoringFunc { kFixedWeight, kSharedSigmoid };

struct RoutingRule {
  static constexpr int kNumNumbers = 15;

  int scoring_func;
  int num_expert_group, topk_group;  // G, and how many stay
  int group_score;
  uint32_t need_renorm;
  float renorm_eps, renorm_min, routed_scaling_factor;
  int select_on;
  float logit_scale, softcap;
  int num_shared_experts;  // S
  int shared_expert_scoring_func;
  float shared_expert_weight;
  int num_zero_experts;  // Z

  // Softmax and top-k alone.
  static RoutingRule plain(bool need_renorm) {
    return {kSoftmax, 1,    1,    kByBias, need_renorm,  0.0f, 0.0f, 1.0f,
            kScore,   1.0f, 0.0f, 0,       kFixedWeight, 1.0f, 0};
  }
  // Of the kNumNumbers numbers that aiter.RoutingRule packs.
  static RoutingRule of(const double* numbers) {
    const auto integer = [&](int i) { return static_cast<int>(numbers[i]); };
    const auto real = [&](int i) { return static_cast<float>(numbers[i]); };
    return {integer(0), integer(1),  integer(2),  integer(3), uint32_t{integer(4) != 0},
            real(5),    real(6),     real(7),     integer(8), real(9),
            real(10),   integer(11), integer(12), real(13),   integer(14)};
  }
  // Logits of shared experts, which stand behind all others.
  int num_shared_logits() const {
    return shared_expert_scoring_func == kSharedSigmoid ? num_shared_experts : 0;
  }
};

}  // namespace aiter
