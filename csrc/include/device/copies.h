// Copies from memory to LDS that go on while the wave that asked for them works.
//
//   kCopiesGoOn                       whether the target has such copies
//   copy_to_lds(to, from, n, inbox)   by one lane: n bytes, a multiple of 16, both ends on 16-byte boundaries; the inbox
//                                     (cluster.h) expects them. What was read from `to` needs a wave_sync() before
//   wait_for_copies(inbox, parity)    by all lanes of the wave: all bytes that the inbox expects have come, the first time
//                                     with parity 0, then 1, 0 and so on
//
// On sm_90 they are bulk copies (cp.async.bulk); on the CPU they are done at once.
#pragma once

#include <cstdint>

#include "device/cluster.h"
#include "device/wave.h"

namespace aiter {

#if defined(AITER_TARGET_CPU)
constexpr bool kCopiesGoOn = true;

inline void copy_to_lds(char* to, const unsigned char* from, uint32_t num_bytes, Inbox*) {
  // NOTE: word by word, and volatile so that it stays so, as race_check.cpp does not see a memcpy.
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(from);
  volatile uint32_t* const copy = reinterpret_cast<volatile uint32_t*>(to);
  for (uint32_t i = 0; i < num_bytes / sizeof(uint32_t); ++i) copy[i] = words[i];
}
inline void wait_for_copies(Inbox*, uint32_t) { wave_sync(); }

#elif defined(AITER_TARGET_CUDA) && !defined(AITER_WITHOUT_CLUSTERS) && \
    (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900)
constexpr bool kCopiesGoOn = true;

__device__ __forceinline__ void copy_to_lds(char* to, const unsigned char* from, uint32_t num_bytes,
                                            Inbox* inbox) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(lds_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(num_bytes), "r"(lds_address(inbox))
      : "memory");
}

__device__ __forceinline__ void wait_for_copies(Inbox* inbox, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 complete, [%0], %1;\n"
      "@!complete bra again;\n"
      "}" ::"r"(lds_address(inbox)),
      "r"(parity)
      : "memory");
}

#else
constexpr bool kCopiesGoOn = false;

__device__ __forceinline__ void copy_to_lds(char*, const unsigned char*, uint32_t, Inbox*) {}
__device__ __forceinline__ void wait_for_copies(Inbox*, uint32_t) {}
#endif

}  // namespace aiter
