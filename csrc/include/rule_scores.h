// The arithmetic of routing rules: from a logit to the score s by which experts are chosen and weighed.
//
//   sigmoid        1 / (1 + exp(-x))
//   sqrtsoftplus   sqrt(max(x, 0) + log1p(exp(-|x|)));  +inf -> sqrt(FLT_MAX)
//   softmax        exp(x - max) / sum over all
//
// All of it is f32 arithmetic of operations that are correctly rounded on every target (+, *, fma, /), so
// that keys, and with them ids, and weights are the same bits everywhere. exp is that of device/numeric.h;
// log1p, tanh and the square root are here, as hardware and libraries have one of their own each. Largest
// relative errors against float64 over 1.2e6 random x, where exp(-|x|) is no subnormal number
// (`python op_tests/test_topk_routing.py --device cpu`, 2026-11-26): sigmoid 1.4e-7, sqrtsoftplus 1.2e-7, and the
// latter of a soft-capped x 1.5e-7.
//
// Exact are sigmoid at 0 (1/2), from 17.4 up (1) and from -89 down (0), sqrtsoftplus at n * n >= 25 (n).
//
// Rejected: sigmoid as (1 + tanh(x / 2)) / 2, which is 0 below -18, and softplus as log(1 + exp(x)), 0 below
// -16.6: routers with a correction bias have all their logits there.
#pragma once

#include "device/numeric.h"
#include "routing_rule.h"

namespace aiter {

// log(1 + t) for t from 0 to 1: t + t^2 q(t), q a polynomial of degree 8 by weighted least squares.
__device__ __forceinline__ float log1p_fraction(float t) {
  float q = -0x1.b1f45ep-9f;
  q = fmaf(q, t, 0x1.4a731ep-6f);
  q = fmaf(q, t, -0x1.d7d268p-5f);
  q = fmaf(q, t, 0x1.b52d92p-4f);
  q = fmaf(q, t, -0x1.3a62fap-3f);
  q = fmaf(q, t, 0x1.935406p-3f);
  q = fmaf(q, t, -0x1.ff251ap-3f);
  q = fmaf(q, t, 0x1.554dd8p-2f);
  q = fmaf(q, t, -0x1.ffffd2p-2f);
  return fmaf(t * t, q, t);
}

// tanh(z): near 0 z + z^3 q(z^2), which is exact in its first term; (1 - t) / (1 + t), t = exp(-2 |z|), elsewhere.
__device__ __forceinline__ float tanh_of(float z) {
  const float magnitude = z < 0.0f ? -z : z;
  const float u = z * z;
  float q = -0x1.828776p-8f;
  q = fmaf(q, u, 0x1.54c3c2p-6f);
  q = fmaf(q, u, -0x1.b89abap-5f);
  q = fmaf(q, u, 0x1.1109bep-3f);
  q = fmaf(q, u, -0x1.55553ep-2f);
  const float near = fmaf(u * z, q, z);
  const float t = exp_nonpositive(-2.0f * magnitude);
  const float far = (1.0f - t) / (1.0f + t);
  return magnitude < 0.6f ? near : z < 0.0f ? -far : far;
}

// The square root of a finite y >= 0. Three steps of Newton's for 1 / sqrt(y) from an estimate by its
// exponent, then one that corrects y times it by its exact remainder, which leaves squares exact.
__device__ __forceinline__ float sqrt_of(float y) {
  const bool tiny = y < 0x1p-60f;  // NOTE: so that the remainder is no subnormal number.
  y = tiny ? y * 0x1p100f : y;
  float r = bit_cast<float>(0x5f3759dfu - (bit_cast<uint32_t>(y) >> 1));
  AITER_UNROLL
  for (int i = 0; i < 3; ++i) r = r * fmaf(-0.5f * y * r, r, 1.5f);
  float root = y * r;
  root = fmaf(fmaf(-root, root, y), 0.5f * r, root);
  return tiny ? root * 0x1p-50f : root;
}

__device__ __forceinline__ float sigmoid(float x) { return sigmoid_of_any(x); }

__device__ __forceinline__ float sqrtsoftplus(float x) {
  constexpr float kLargest = 0x1.fffffep127f;
  const float positive = x > 0.0f ? x : 0.0f;
  const float softplus = positive + log1p_fraction(exp_nonpositive(x > 0.0f ? -x : x));
  return sqrt_of(softplus > kLargest ? kLargest : softplus);
}

// x of a logit.
__device__ __forceinline__ float scaled_logit(const RoutingRule& rule, float logit) {
  const float x = logit * rule.logit_scale;
  if (rule.softcap == 0.0f) return x;
  return rule.softcap * tanh_of(x / rule.softcap);
}

// NaN read as -inf, as a softmax reads it.
__device__ __forceinline__ float without_nan(float x) {
  constexpr float kLowest = -__builtin_inff();
  return x > kLowest ? x : kLowest;
}

}  // namespace aiter
