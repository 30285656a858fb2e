// The device half of the platform seam: wave operations, the only code that knows how wide a wave
// is and how its lanes talk.
//
//   kWaveSize                       lanes per wave: 64 on gfx9, 32 on gfx10 to gfx12 and on CUDA
//   lane_idx(), wave_idx()          of the running lane in its wave, of its wave in the workgroup
//   wave_max(x)                     maximum over the wave, in every lane; uint32_t or uint64_t
//   wave_sum_by_halves(x)           float sum over the wave in every lane; lanes l and l + W/2 are
//                                   added first, then l and l + W/4, ... so that the order, and with
//                                   it the last bit, follows from the indices alone
//   wave_sum_in_order(x, n, init)   ((init + x of lane 0) + x of lane 1) + ... n terms, in every lane
//   wave_inclusive_sum(x)           uint32_t prefix sum, own lane included
//   wave_read_lane(x, lane)         x of one lane, the same for all; uint32_t or float
//
// All lanes of a wave call together (no divergence), with `n` and `lane` the same in all of them.
//
//   operation            gfx942, gfx1100                       sm_90                 cpu
//   wave_max (32 bit)    shuffle tree                          redux.sync            1 switch
//   wave_max (64 bit)    shuffle tree                          2 redux.sync          1 switch
//   wave_sum_by_halves   shuffle tree                          shfl.bfly tree        1 switch
//   wave_inclusive_sum   shuffle scan                          shfl.up scan          1 switch
//   wave_read_lane       v_readlane                            shfl.idx              1 switch
#pragma once

#include <cstdint>

#include "device/platform.h"

namespace aiter {

#if defined(AITER_TARGET_CPU)
constexpr int kWaveSize = hip_cpu::kWaveSize;
#elif defined(AITER_TARGET_ROCM) && defined(__GFX9__)
constexpr int kWaveSize = 64;
#else
// Also what the host pass of a rocm build sees; launchers ask the device (DeviceLimits::wave_size).
constexpr int kWaveSize = 32;
#endif

__device__ __forceinline__ int lane_idx() { return static_cast<int>(threadIdx.x) % kWaveSize; }
__device__ __forceinline__ int wave_idx() { return static_cast<int>(threadIdx.x) / kWaveSize; }

}  // namespace aiter

#if defined(AITER_TARGET_CPU)
#include "device/wave_cpu.h"
#elif defined(AITER_TARGET_CUDA)
#include "device/wave_cuda.h"
#else
#include "device/wave_rocm.h"
#endif

namespace aiter {

constexpr int kMaxWaveSize = 64;
constexpr int kMaxWavesPerBlock = 32;  // 1024 threads of wave32

// Exclusive prefix sum over the workgroup in thread order; `total` is the sum over all threads.
// `lds_scratch` holds kMaxWavesPerBlock words. Ends with a barrier, so that it can be called again.
__device__ __forceinline__ uint32_t block_exclusive_sum(uint32_t value, uint32_t* lds_scratch,
                                                        uint32_t& total) {
  const int num_waves = static_cast<int>(blockDim.x) / kWaveSize;
  const uint32_t inclusive = wave_inclusive_sum(value);
  if (lane_idx() == kWaveSize - 1) lds_scratch[wave_idx()] = inclusive;
  __syncthreads();
  uint32_t before = 0;
  total = 0;
  for (int w = 0; w < num_waves; ++w) {
    if (w == wave_idx()) before = total;
    total += lds_scratch[w];
  }
  __syncthreads();
  return before + inclusive - value;
}

}  // namespace aiter
