// Zeroing memory beside other work.
//
//   kZeroPageBytes               LDS that it takes, on a 128-byte boundary
//   fill_zero_page(page)         by all threads; a __syncthreads() before the first zero_aside()
//   zero_aside(data, n, page)    by a wave: zeroes n bytes from `data` on, of any alignment; they are when it returns
//   let_loads_begin()            by that wave before: waits while others make their first loads
//
// On sm_90 bulk copies from LDS (cp.async.bulk) do it, which have an engine of their own and need no registers. A wave's
// own stores, which are what other targets make, wait in the queue that accesses to LDS wait in too, its own and its
// neighbours'. Few copies are on their way at a time, as loads wait behind them. H100, 2026-11-27, top-k with counts and
// zeroing of M = 65,536 rows, us, for 128/4 D=2880, 256/8 D=7168, 512/10 D=4096, 896/16 D=3584 (top-k alone takes 14, 30,
// 80, 99; zeroing alone, by a memset, 117, 288, 165, 145):
//   each row by its wave's stores                    152  362  236  228
//   by its wave's bulk copies, as many as there are  150  357  240  233    (188, 457, 280, 254 from a page that is not
//   by a wave of its own, four copies of 8 KiB       132  314  224  226     on a 128-byte boundary)
// First loads get a head start of 0.5 us, as they wait behind what is written else: chain, 512/10 f32, M = 1024, 9.3 -> 9.0;
// 896/16, 12.0 -> 11.5 (1 us: 9.0, 11.5, but 128/4 bf16 6.0 -> 6.4).
// Rejected: workgroups that zero beside those that select, in a launch that starts early (chain 200, 484, 401, 405, where
// it takes 146, 340, 259, 285 now: they crowd on the compute units that are free); asking for the next rows' logits early,
// as far as the L2 (155, 373, 240, 233, before there was a wave of its own: what is written evicts them); 8 copies, or two
// of 16 KiB (equal); chunks of moe_buf by all workgroups in turn instead of each tile's own rows (2 % slower).
#pragma once

#include <cstdint>

#include "device/platform.h"
#include "device/wave.h"

namespace aiter {

// Zeroes `num_bytes` from `data` on, worker `worker` of `num_workers`; any alignment, any length.
__device__ __forceinline__ void zero_bytes(unsigned char* data, uint64_t num_bytes, uint64_t worker,
                                           uint64_t num_workers) {
  const uint64_t to_boundary = (16 - reinterpret_cast<uintptr_t>(data) % 16) % 16;
  const uint64_t head = to_boundary < num_bytes ? to_boundary : num_bytes;
  const uint64_t num_vectors = (num_bytes - head) / 16;
  const uint64_t tail = (num_bytes - head) % 16;
  FourWords* vectors = reinterpret_cast<FourWords*>(data + head);
  for (uint64_t i = worker; i < num_vectors; i += num_workers) vectors[i] = FourWords{};
  if (worker < head) data[worker] = 0;
  if (worker < tail) data[num_bytes - 1 - worker] = 0;
}

#if defined(AITER_TARGET_CUDA) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900)

constexpr uint32_t kZeroPageBytes = 8 * 1024;

__device__ __forceinline__ void fill_zero_page(char* page) {
  FourWords* const words = reinterpret_cast<FourWords*>(page);
  AITER_LOOP
  for (uint32_t i = threadIdx.x; i < kZeroPageBytes / sizeof(FourWords); i += blockDim.x) {
    words[i] = FourWords{};
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void zero_aside(unsigned char* data, uint64_t num_bytes, char* page) {
  constexpr int kInFlight = 4;
  const uint32_t lane = lane_idx();
  const uint64_t to_boundary = (16 - reinterpret_cast<uintptr_t>(data) % 16) % 16;
  const uint64_t head = to_boundary < num_bytes ? to_boundary : num_bytes;
  const uint64_t whole = (num_bytes - head) / 16 * 16;
  if (lane < head) data[lane] = 0;
  if (lane < num_bytes - head - whole) data[head + whole + lane] = 0;
  if (lane != 0) return;
  const uint32_t source = static_cast<uint32_t>(__cvta_generic_to_shared(page));
  AITER_LOOP
  for (uint64_t done = 0; done < whole; done += kZeroPageBytes) {
    const uint64_t left = whole - done;
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
        "cp.async.bulk.commit_group;\n"
        "cp.async.bulk.wait_group %3;" ::"l"(__cvta_generic_to_global(data + head + done)),
        "r"(source), "r"(static_cast<uint32_t>(left < kZeroPageBytes ? left : kZeroPageBytes)),
        "n"(kInFlight - 1)
        : "memory");
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

__device__ __forceinline__ void let_loads_begin() { __nanosleep(500); }

#else

constexpr uint32_t kZeroPageBytes = 0;

__device__ __forceinline__ void fill_zero_page(char*) {}
__device__ __forceinline__ void zero_aside(unsigned char* data, uint64_t num_bytes, char*) {
  zero_bytes(data, num_bytes, lane_idx(), kWaveSize);
}
__device__ __forceinline__ void let_loads_begin() {}
#endif

}  // namespace aiter
