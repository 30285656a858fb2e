// wave.h on CUDA, compute capability 8.0 and later (redux.sync).
#pragma once

namespace aiter {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ uint32_t wave_max(uint32_t x) { return __reduce_max_sync(kAllLanes, x); }

__device__ __forceinline__ uint64_t wave_max(uint64_t x) {
  const uint32_t high = static_cast<uint32_t>(x >> 32);
  const uint32_t best_high = __reduce_max_sync(kAllLanes, high);
  const uint32_t low = high == best_high ? static_cast<uint32_t>(x) : 0u;
  return static_cast<uint64_t>(best_high) << 32 | __reduce_max_sync(kAllLanes, low);
}

template <typename T>
__device__ __forceinline__ T wave_read_lane(T x, int lane) {
  return __shfl_sync(kAllLanes, x, lane);
}

__device__ __forceinline__ float wave_sum_by_halves(float x) {
  AITER_UNROLL
  for (int half = kWaveSize / 2; half > 0; half /= 2) x += __shfl_xor_sync(kAllLanes, x, half);
  return x;
}

// (init + x of lane 0) + x of lane 1 ... of each group of kGroup lanes.
template <int kGroup>
__device__ __forceinline__ float sum_of_lanes(float x, int count, float init) {
  constexpr int kAtOnce = 4;  // shuffles take 6 times as long as additions, but need not wait
  AITER_LOOP
  for (int first = 0; first < count; first += kAtOnce) {
    float term[kAtOnce];
    AITER_UNROLL
    for (int i = 0; i < kAtOnce; ++i) term[i] = __shfl_sync(kAllLanes, x, first + i, kGroup);
    AITER_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < count) init += term[i];
    }
  }
  return init;
}

__device__ __forceinline__ float wave_sum_in_order(float x, int count, float init) {
  return sum_of_lanes<kWaveSize>(x, count, init);
}

template <int kGroup>
__device__ __forceinline__ float wave_sum_in_groups(float x, int count) {
  return sum_of_lanes<kGroup>(x, count, 0.0f);
}

template <int kDistance>
__device__ __forceinline__ uint32_t wave_swap(uint32_t x) {
  return __shfl_xor_sync(kAllLanes, x, kDistance);
}

template <int kMask>
__device__ __forceinline__ uint32_t wave_exchange(uint32_t x) {
  return __shfl_xor_sync(kAllLanes, x, kMask);
}

__device__ __forceinline__ void wave_sync() { __syncwarp(); }

__device__ __forceinline__ int highest_bit(uint32_t x) { return 31 - __clz(static_cast<int>(x)); }

__device__ __forceinline__ WaveMask wave_ballot(bool flag) {
  return __ballot_sync(kAllLanes, flag);
}

__device__ __forceinline__ int lowest_lane(WaveMask lanes) { return __ffs(lanes) - 1; }

__device__ __forceinline__ WavePrefix wave_rank(bool flag) {
  const unsigned set = wave_ballot(flag);
  const unsigned below = set & ((1u << lane_idx()) - 1);
  return {static_cast<uint32_t>(__popc(below)), static_cast<uint32_t>(__popc(set))};
}

__device__ __forceinline__ uint32_t wave_inclusive_sum(uint32_t x) {
  AITER_UNROLL
  for (int distance = 1; distance < kWaveSize; distance *= 2) {
    const uint32_t y = __shfl_up_sync(kAllLanes, x, distance);
    if (lane_idx() >= distance) x += y;
  }
  return x;
}

template <typename T>
__device__ __forceinline__ void drop(T&) {}

__device__ __forceinline__ int anew(int x) { return x; }

__device__ __forceinline__ uint32_t awaited(uint32_t x) { return x; }

__device__ __forceinline__ int32_t scalar_load(const int32_t* address) { return *address; }

__device__ __forceinline__ int workgroup_threads(int) { return static_cast<int>(blockDim.x); }

template <typename T>
__device__ __forceinline__ const T& loaded_anew(const T& argument, size_t) {
  return argument;
}

}  // namespace aiter
