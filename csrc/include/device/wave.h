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
//   wave_ballot(flag)               WaveMask with the bits of the lanes whose flag is set
//   wave_rank(flag)                 {below, total}: lanes below, and lanes in all, whose flag is set
//   wave_for_each(flag, f)          f(lane) for every lane whose flag is set, ascending, by all lanes
//   wave_read_lane(x, lane)         x of one lane, the same for all; uint32_t or float
//   wave_swap<D>(x)                 uint32_t of the neighbouring one of the groups of D lanes, all lanes of
//                                   which hold the same: lane l reads one of l ^ D; D = 1, 2, 4, 8, 16
//   wave_exchange<X>(x)             uint32_t of lane l ^ X; X = 1, 2, 3, 4, 7, 8, 15, 16 or 31
//   wave_sync()                     what lanes of the wave stored in LDS before can be loaded by the others, and
//                                   what they loaded can be stored to; no other operation says so
//   highest_bit(x)                  index of the highest set bit of a uint32_t that is not 0
//   wave_sum_in_groups<G>(x, n)     (x of lane 0 + x of lane 1) + ... n terms, within each group of G
//                                   lanes, in its first n; G = 8 or 16 with n <= 8, or 32
//   uniform_wave_idx()              wave_idx() as a value that compilers know to be the wave's, so that
//                                   branches on it do not make them expect divergence
//   drop(x)                         x is not read any more. Compilers for AMD GPUs keep the registers of a
//                                   value that the last round of a loop does not make, unless it makes one
//   anew(x)                         int x, an argument of the kernel, hidden from compilers on AMD GPUs, so
//                                   that a loop computes what follows from it in every round; masks of
//                                   lanes, kept for all rounds, took more scalar registers than exist
//   awaited(x)                      uint32_t x, which a branch has loaded, hidden likewise, so that what follows
//                                   from it is computed here and not in the branch, which would wait there
//   scalar_load(address)            the int32_t there, the same address in all lanes, which nobody stores to while
//                                   the kernel runs
//   loaded_anew(p, offset)          the struct p, an argument of the kernel that lies `offset` bytes behind the
//                                   first one, loaded at this place on AMD GPUs: not before, when its words
//                                   would be in the way of the first loads, and not kept from before, for
//                                   which there are no scalar registers
//
//   workgroup_threads(n)            blockDim.x, of which n, an argument of the kernel, says the same: on AMD
//                                   GPUs blockDim.x lies behind all arguments, a scalar load of its own at
//                                   the place where it is asked for
//
// All lanes of a wave call together (no divergence), with `n` and `lane` the same in all of them.
//
// What compilers make of them, read and held by op_tests/rocm/test_wave_instructions.py; lanes talk
// by no other instruction than the ones named:
//
//   wave_max, 32 bit        gfx9          6 v_max_u32_dpp, 1 v_readlane_b32
//                           gfx11, gfx12  4 v_max_u32_dpp, 2 v_readlane_b32, 1 s_max_u32
//                           sm_90         1 REDUX.MAX
//   wave_max, 64 bit        gfx9          12 v_max_u32_dpp, 2 v_readlane_b32
//                           gfx11, gfx12  8 v_max_u32_dpp, 4 v_readlane_b32, 2 s_max_u32
//                           sm_90         2 REDUX.MAX
//   wave_sum_by_halves      gfx9          1 ds_bpermute_b32, 1 ds_swizzle_b32, 4 v_add_f32_dpp,
//                                         1 v_readlane_b32
//                           gfx950        1 v_permlane32_swap_b32, 1 v_permlane16_swap_b32,
//                                         4 v_add_f32_dpp, 1 v_readlane_b32
//                           gfx11, gfx12  1 v_permlanex16_b32, 4 v_add_f32_dpp, 1 v_readlane_b32
//                           sm_90         5 SHFL.BFLY
//   wave_sum_in_order       gfx9          n v_readlane_b32, n v_add_f32
//                           gfx11         n v_readlane_b32, n v_add_f32
//                           gfx12         n v_readlane_b32, n s_add_f32
//                           sm_90         n SHFL.IDX, n FADD
//   wave_inclusive_sum      gfx9          6 v_add_u32_dpp
//                           gfx11, gfx12  4 v_add_nc_u32_dpp, 1 v_readlane_b32
//                           sm_90         5 SHFL.UP
//   wave_rank               gfx9          1 v_mbcnt_lo_u32_b32, 1 v_mbcnt_hi_u32_b32,
//                                         1 s_bcnt1_i32_b64
//                           gfx11, gfx12  1 v_mbcnt_lo_u32_b32, 1 s_bcnt1_i32_b32
//                           sm_90         1 VOTE.ANY, 2 POPC
//   wave_read_lane          gfx           1 v_readlane_b32
//                           sm_90         1 SHFL.IDX
//   wave_swap, 1 to 8       gfx           1 v_mov_b32_dpp
//                           sm_90         1 SHFL.BFLY
//   wave_swap, 16           gfx9          1 ds_swizzle_b32
//                           gfx950        1 v_permlane16_swap_b32
//                           gfx11, gfx12  1 v_permlanex16_b32
//                           sm_90         1 SHFL.BFLY
//   wave_exchange, 1 to 15  gfx           1 v_mov_b32_dpp
//                           sm_90         1 SHFL.BFLY
//   wave_exchange, 4        gfx           2 v_mov_b32_dpp
//                           sm_90         1 SHFL.BFLY
//   wave_exchange, 16       gfx9          1 ds_swizzle_b32
//                           gfx950        1 v_permlane16_swap_b32
//                           gfx11, gfx12  1 v_permlanex16_b32
//                           sm_90         1 SHFL.BFLY
//   wave_exchange, 31       gfx9          1 v_mov_b32_dpp, 1 ds_swizzle_b32
//                           gfx950        1 v_mov_b32_dpp, 1 v_permlane16_swap_b32
//                           gfx11, gfx12  1 v_mov_b32_dpp, 1 v_permlanex16_b32
//                           sm_90         1 SHFL.BFLY
//   wave_sum_in_groups, 8   gfx           3 v_mov_b32_dpp, 7 v_add_f32_dpp for n = 8
//                           sm_90         n SHFL.IDX, n FADD
//   wave_sum_in_groups, 32  gfx9          2n v_readlane_b32
//                           gfx11, gfx12  n v_readlane_b32
//                           sm_90         n SHFL.IDX, n FADD
//   uniform_wave_idx        gfx           1 v_readlane_b32
//                           sm_90         1 SHFL.IDX
//
// On the cpu target every one of them is a single collective (hip_cpu.h): a stack switch per lane.
#pragma once

#include <cstdint>
#include <type_traits>

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

// Registers of a lane of a small workgroup that arrays may take. The rest, of 255 on CUDA GPUs and 256 on gfx11 and gfx1201,
// is for addresses and for what compilers compute early, which is more on AMD GPUs. By target, not by architecture, as
// host and device have to name the same kernel.
#if defined(AITER_TARGET_ROCM)
constexpr int kHeldRegisters = 144;
#else
constexpr int kHeldRegisters = 192;
#endif

// Registers of a lane of the largest workgroup, of 1,024 threads.
#if defined(AITER_TARGET_CUDA)
constexpr int kRegistersOfLargest = 64;
#else
constexpr int kRegistersOfLargest = 128;
#endif

__device__ __forceinline__ int lane_idx() { return static_cast<int>(threadIdx.x % kWaveSize); }
__device__ __forceinline__ int wave_idx() { return static_cast<int>(threadIdx.x / kWaveSize); }

using WaveMask = std::conditional_t<kWaveSize == 64, uint64_t, uint32_t>;  // bit l: lane l

struct WavePrefix {
  uint32_t below, total;  // over the lanes below, over all lanes
};

}  // namespace aiter

#if defined(AITER_TARGET_CPU)
#include "device/wave_cpu.h"
#elif defined(AITER_TARGET_CUDA)
#include "device/wave_cuda.h"
#else
#include "device/wave_rocm.h"
#endif

namespace aiter {

constexpr int kMinWaveSize = 32;
constexpr int kMaxWaveSize = 64;
constexpr int kMaxWavesPerBlock = 32;  // 1024 threads of wave32

// Where an argument of type T lies, for loaded_anew(), behind others of `bytes` in all, gaps between these included.
template <typename T>
__host__ __device__ constexpr size_t argument_offset(size_t bytes) {
  return (bytes + alignof(T) - 1) / alignof(T) * alignof(T);
}

__device__ __forceinline__ int uniform_wave_idx() {
  return static_cast<int>(wave_read_lane(static_cast<uint32_t>(wave_idx()), 0));
}

template <typename F>
__device__ __forceinline__ void wave_for_each(bool flag, F f) {
  AITER_LOOP
  for (WaveMask left = wave_ballot(flag); left != 0; left &= left - 1) {
    f(lowest_lane(left));
  }
}

__device__ __forceinline__ WavePrefix wave_prefix_sum(uint32_t x) {
  const uint32_t inclusive = wave_inclusive_sum(x);
  return {inclusive - x, wave_read_lane(inclusive, kWaveSize - 1)};
}

// A prefix over the workgroup is one over its waves. All waves post their totals; behind a barrier
// everyone adds those of the waves before, of the first `num_waves` ones, a multiple of kTotalsAtOnce.
// `lds_totals` holds kMaxWavesPerBlock, on a 16-byte boundary.
constexpr int kTotalsAtOnce = 4;

__device__ __forceinline__ void post_total(uint32_t* lds_totals, const WavePrefix& prefix) {
  if (lane_idx() == 0) lds_totals[wave_idx()] = prefix.total;
}

__device__ __forceinline__ WavePrefix over_workgroup(const uint32_t* lds_totals, int num_waves,
                                                     const WavePrefix& prefix) {
  WavePrefix all{prefix.below, 0};
  AITER_LOOP
  for (int first = 0; first < num_waves; first += kTotalsAtOnce) {
    const FourWords totals = *reinterpret_cast<const FourWords*>(lds_totals + first);
    AITER_UNROLL
    for (int i = 0; i < kTotalsAtOnce; ++i) {
      if (first + i < wave_idx()) all.below += totals.word[i];
      all.total += totals.word[i];
    }
  }
  return all;
}

}  // namespace aiter
