// wave.h on AMD GPUs, both wave widths.
#pragma once

namespace aiter {

__device__ __forceinline__ uint32_t wave_max(uint32_t x) {
  AITER_UNROLL
  for (int half = kWaveSize / 2; half > 0; half /= 2) {
    const uint32_t y = __shfl_xor(x, half, kWaveSize);
    x = y > x ? y : x;
  }
  return x;
}

__device__ __forceinline__ uint64_t wave_max(uint64_t x) {
  const uint32_t high = static_cast<uint32_t>(x >> 32);
  const uint32_t best_high = wave_max(high);
  const uint32_t low = high == best_high ? static_cast<uint32_t>(x) : 0u;
  return static_cast<uint64_t>(best_high) << 32 | wave_max(low);
}

__device__ __forceinline__ uint32_t wave_read_lane(uint32_t x, int lane) {
  return static_cast<uint32_t>(__builtin_amdgcn_readlane(static_cast<int>(x), lane));
}

__device__ __forceinline__ float wave_read_lane(float x, int lane) {
  return __int_as_float(__builtin_amdgcn_readlane(__float_as_int(x), lane));
}

__device__ __forceinline__ float wave_sum_by_halves(float x) {
  AITER_UNROLL
  for (int half = kWaveSize / 2; half > 0; half /= 2) x += __shfl_xor(x, half, kWaveSize);
  return x;
}

__device__ __forceinline__ float wave_sum_in_order(float x, int count, float init) {
  for (int l = 0; l < count; ++l) init += wave_read_lane(x, l);
  return init;
}

__device__ __forceinline__ uint32_t wave_inclusive_sum(uint32_t x) {
  AITER_UNROLL
  for (int distance = 1; distance < kWaveSize; distance *= 2) {
    const uint32_t y = __shfl_up(x, distance, kWaveSize);
    if (lane_idx() >= distance) x += y;
  }
  return x;
}

}  // namespace aiter
