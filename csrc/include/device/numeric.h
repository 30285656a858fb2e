// Logits, order-preserving keys and exp: the arithmetic that has to be the same on every target.
//
// A logit is read once, as its bits, and turned into a key, an unsigned integer that orders like the logit and is never 0:
//   key(x) = x >= 0 ? bits(x) | sign : ~bits(x)      (NaN as -inf, -0 as +0)
// What a lane stores of it is one 32-bit register: the key of an f32 logit; for a 16-bit one the
// key above the complemented expert index (so E < 65536), which makes all stored values of a row
// different and prefers the lower index among equal logits.
//
// exp is our own, of the same fma's everywhere: results are the same bits on the CPU, on CUDA and on
// AMD GPUs, which is what makes a run on the CPU a proof about the kernel. The compilers must not
// fuse or reassociate what is written here (-ffp-contract=off, --fmad=false).
#pragma once

#include <cmath>
#include <cstdint>

#include "device/platform.h"

namespace aiter {

template <typename To, typename From>
__device__ __forceinline__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(Bf16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

__device__ __forceinline__ float to_float(F16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;  // exact, subnormals too
  const uint32_t non_finite = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | non_finite |
                         static_cast<uint32_t>(x.bits & 0x8000u) << 16);
}

// The bits of a logit with NaN read as -inf and -0 as +0. Those of f32, and of bf16 as its upper half, are
// a float's, so that floating-point units do it in two instructions; f16's take five of integers.
__device__ __forceinline__ uint32_t ordinary_bits(uint32_t bits) {
  constexpr float kLowest = -__builtin_inff();
  const float x = bit_cast<float>(bits) + 0.0f;
  return bit_cast<uint32_t>(x > kLowest ? x : kLowest);
}

__device__ __forceinline__ uint32_t ordinary_f16_bits(uint32_t bits) {
  constexpr uint32_t kInf = 0x7c000000u, kSign = 0x80000000u;
  const uint32_t magnitude = bits & ~kSign;
  if (magnitude > kInf) bits = kSign | kInf;
  return magnitude == 0 ? 0 : bits;
}

// Ordinary bits -> key and back. 16-bit logits come in the upper half, whose upper half of the key is
// theirs.
__device__ __forceinline__ uint32_t all_ones_if_negative(uint32_t bits) {
  return static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
}
__device__ __forceinline__ uint32_t ordered_key(uint32_t bits) {
  return bits ^ (all_ones_if_negative(bits) | 0x80000000u);
}
__device__ __forceinline__ uint32_t bits_of_key(uint32_t key) {
  return key ^ (all_ones_if_negative(~key) | 0x80000000u);
}

// The larger of two floats, neither a NaN unless both are.
__device__ __forceinline__ float max_but_nan(float x, float y) {
#if defined(AITER_TARGET_CPU)
  return x > y || y != y ? x : y;  // NOTE: fmaxf is a call there.
#elif defined(AITER_TARGET_ROCM)
  return __builtin_fmaxf(x, y);
#else
  return fmaxf(x, y);
#endif
}

// The smaller of two floats, neither a NaN.
__device__ __forceinline__ float smaller_of(float x, float y) {
#if defined(AITER_TARGET_CUDA)
  return fminf(x, y);
#else
  return x > y ? y : x;
#endif
}

// count + 1 if x >= y, else count. On CUDA by the carry of x - y; of a comparison, nvcc makes an addition and a move
// that wait for each other.
__device__ __forceinline__ uint32_t counted_if_at_least(uint32_t count, uint64_t x, uint64_t y) {
#if defined(AITER_TARGET_CUDA) && defined(__CUDA_ARCH__)
  uint32_t difference;
  asm("sub.cc.u32 %1, %2, %3;\n\t"
      "subc.cc.u32 %1, %4, %5;\n\t"
      "subc.u32 %0, %0, 0xffffffff;"
      : "+r"(count), "=&r"(difference)
      : "r"(static_cast<uint32_t>(x)), "r"(static_cast<uint32_t>(y)),
        "r"(static_cast<uint32_t>(x >> 32)), "r"(static_cast<uint32_t>(y >> 32)));
  return count;
#else
  return count + (x >= y ? 1 : 0);
#endif
}

// How a lane stores a logit of type T; 0 stands for no logit.
template <typename T>
struct Logit;

template <>
struct Logit<float> {
  static constexpr bool kHoldsExpert = false;
  static __device__ __forceinline__ uint32_t bits(float x) { return bit_cast<uint32_t>(x); }
  static __device__ __forceinline__ uint32_t store(uint32_t bits, uint32_t) {
    return ordered_key(ordinary_bits(bits));
  }
  static __device__ __forceinline__ uint32_t key(uint32_t stored) { return stored; }
  static __device__ __forceinline__ float value(uint32_t key) {
    return bit_cast<float>(bits_of_key(key));
  }
};

template <typename T, uint32_t kOrdinaryBits(uint32_t)>
struct Logit16 {
  static constexpr bool kHoldsExpert = true;
  static __device__ __forceinline__ uint32_t bits(T x) { return x.bits; }
  static __device__ __forceinline__ uint32_t store(uint32_t bits, uint32_t expert_idx) {
    return store_high(bits << 16, expert_idx);
  }
  // `high` has the logit's bits in its upper half, and 0 below.
  static __device__ __forceinline__ uint32_t store_high(uint32_t high, uint32_t expert_idx) {
    return (ordered_key(kOrdinaryBits(high)) & 0xffff0000u) | (0xffffu - expert_idx);
  }
  static __device__ __forceinline__ uint32_t key(uint32_t stored) { return stored >> 16; }
  static __device__ __forceinline__ uint32_t expert(uint32_t stored) {
    return 0xffffu - (stored & 0xffffu);
  }
  static __device__ __forceinline__ float value(uint32_t key) {
    return to_float(T{static_cast<uint16_t>(bits_of_key(key << 16) >> 16)});
  }
};

template <>
struct Logit<Bf16> : Logit16<Bf16, ordinary_bits> {};
template <>
struct Logit<F16> : Logit16<F16, ordinary_f16_bits> {};

// exp(x) / 2^n for the integer n that is nearest to x / ln2: a polynomial of degree 6 of r = x - n ln2, |r| <= ln2 / 2
// (weighted least squares, exact at r = 0). Degree 5 gave 1.7e-7.
__device__ __forceinline__ float exp_polynomial(float x, float n) {
  float r = fmaf(n, -0x1.62e4p-1f, x);
  r = fmaf(n, -0x1.7f7d1cp-20f, r);
  float p = 0x1.6a2434p-10f;
  p = fmaf(p, r, 0x1.1239e2p-7f);
  p = fmaf(p, r, 0x1.5558f2p-5f);
  p = fmaf(p, r, 0x1.555492p-3f);
  p = fmaf(p, r, 0x1.fffffcp-2f);
  p = fmaf(p, r, 1.0f);
  return fmaf(p, r, 1.0f);
}

// exp(x) for -110 <= x <= 100; largest relative error found over 2e6 random x <= 0: 7.6e-8. 2^n comes in two factors,
// so that subnormal results come out too.
__device__ __forceinline__ float exp_in_range(float x) {
  constexpr float kRoundToInteger =
      0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = x * 0x1.715476p0f + kRoundToInteger;
  const int n = static_cast<int>(bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(kRoundToInteger));
  const float n_float = shifted - kRoundToInteger;
  const float p = exp_polynomial(x, n_float);
  const int half = n / 2;
  const float scale_a = bit_cast<float>(static_cast<uint32_t>(half + 127) << 23);
  const float scale_b = bit_cast<float>(static_cast<uint32_t>(n - half + 127) << 23);
  return p * scale_a * scale_b;
}

// exp(x) for x <= 0, -inf included.
__device__ __forceinline__ float exp_nonpositive(float x) {
  return exp_in_range(x < -110.0f ? -110.0f : x);  // below -104 the result is 0
}

// exp(x) for any x; inf from 88.73 up.
__device__ __forceinline__ float exp_of(float x) {
  return exp_nonpositive(x > 100.0f ? 100.0f : x);
}

#if defined(AITER_TARGET_CUDA)
// 1 / x for 1 <= x < 2^125, correctly rounded: the operator's own steps there, without its branch for each x, so that
// several overlap.
__device__ __forceinline__ float reciprocal_in_range(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(y, fmaf(-x, y, 1.0f), y);
}
#endif

// 1 / (1 + exp(-x)). NOTE: not inlined on CUDA, where it is for few x, as code to jump over takes time.
#if defined(AITER_TARGET_CUDA)
static __device__ __noinline__ float sigmoid_of_any(float x)
#else
__device__ __forceinline__ float sigmoid_of_any(float x)
#endif
{
  return 1.0f / (1.0f + exp_of(-x));
}

// Replaces every x by 1 / (1 + exp(-x)). On CUDA, where no x is below -86, in half of the instructions, to the same
// bits: 2^n is then a normal number, as exp(-80) is as good as any smaller one beside 1, and p 2^n is exact, so
// that an fma rounds 1 + p 2^n as the sum would be rounded. NaN stays NaN.
template <int kCount>
__device__ __forceinline__ void sigmoids(float (&x)[kCount]) {
#if defined(AITER_TARGET_CUDA) && defined(__CUDA_ARCH__)
  bool all_in_range = true;
  AITER_UNROLL
  for (int i = 0; i < kCount; ++i) all_in_range = all_in_range && !(x[i] < -86.0f);
  if (AITER_UNLIKELY(!all_in_range)) {
    AITER_UNROLL
    for (int i = 0; i < kCount; ++i) x[i] = sigmoid_of_any(x[i]);
    return;
  }
  AITER_UNROLL
  for (int i = 0; i < kCount; ++i) {
    constexpr float kRoundToInteger = 0x1.8p23f;
    const float y = -x[i] < -80.0f ? -80.0f : -x[i];
    const float shifted = y * 0x1.715476p0f + kRoundToInteger;
    const float scale = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
    const float sum = fmaf(exp_polynomial(y, shifted - kRoundToInteger), scale, 1.0f);
    x[i] = reciprocal_in_range(sum);
  }
#else
  AITER_UNROLL
  for (int i = 0; i < kCount; ++i) x[i] = sigmoid_of_any(x[i]);
#endif
}

// The softmax numerator exp(x - max). Entries equal to an infinite maximum share equally: 1.
__device__ __forceinline__ float softmax_numerator(float x, float max) {
  return exp_nonpositive(x == max ? 0.0f : x - max);
}

}  // namespace aiter
