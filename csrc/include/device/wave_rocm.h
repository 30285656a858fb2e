// wave.h on AMD GPUs: wave64 (gfx9) and wave32 (gfx10 to gfx12).
//
// Lanes talk through DPP, which is part of the arithmetic instruction and reaches within a row of
// 16 lanes, and across rows by row_bcast on gfx9. What DPP cannot do: on gfx10 and later rows meet in
// scalar registers (v_readlane) or by v_permlanex16; rows and halves of a gfx9 wave meet by
// v_permlane16_swap and v_permlane32_swap on gfx950, elsewhere through the LDS crossbar (ds_swizzle,
// ds_bpermute), as row_bcast hands on one lane and a sum by halves needs sixteen. A result that is the
// same in all lanes is returned from v_readlane, so that the compiler keeps it in a scalar register.
#pragma once

namespace aiter {

namespace dpp {

constexpr int kQuadRead = 0x55;     // * n: all lanes of a quad read its lane n
constexpr int kQuadSwap1 = 0xb1;    // lane l reads l ^ 1
constexpr int kQuadSwap2 = 0x4e;    // lane l reads l ^ 2
constexpr int kQuadMirror = 0x1b;   // lane l reads l ^ 3
constexpr int kRowMirror = 0x140;   // lane l of a row reads 15 - l
constexpr int kHalfMirror = 0x141;  // lane l of half a row reads 7 - l
constexpr int kRowShr = 0x110;      // + n: lane l reads l - n of its row
constexpr int kRowRor = 0x120;      // + n: rotation within the row
constexpr int kRowBcast15 = 0x142;  // gfx9: lane 15 of a row into the next row
constexpr int kRowBcast31 = 0x143;  // gfx9: lane 31 into rows 2 and 3
constexpr int kAllRows = 0xf;
constexpr int kAllBanks = 0xf;
constexpr int kOddRows = 0xa;
constexpr int kUpperRows = 0xc;

// x as seen through the DPP control; 0 for lanes that read from outside or whose row is masked out.
template <int kControl, int kRowMask = kAllRows>
__device__ __forceinline__ uint32_t move(uint32_t x) {
  return static_cast<uint32_t>(
      __builtin_amdgcn_update_dpp(0, static_cast<int>(x), kControl, kRowMask, kAllBanks, true));
}

template <int kControl>
__device__ __forceinline__ float move(float x) {
  return __uint_as_float(move<kControl>(__float_as_uint(x)));
}

}  // namespace dpp

__device__ __forceinline__ uint32_t wave_read_lane(uint32_t x, int lane) {
  return static_cast<uint32_t>(__builtin_amdgcn_readlane(static_cast<int>(x), lane));
}

__device__ __forceinline__ float wave_read_lane(float x, int lane) {
  return __uint_as_float(wave_read_lane(__float_as_uint(x), lane));
}

template <typename T>
__device__ __forceinline__ void drop(T& x) {
  x = T{};
}

__device__ __forceinline__ int anew(int x) {
  asm volatile("" : "+s"(x));
  return x;
}

__device__ __forceinline__ uint32_t awaited(uint32_t x) {
  asm volatile("" : "+v"(x));
  return x;
}

__device__ __forceinline__ int32_t scalar_load(const int32_t* address) {
  return *(const __attribute__((address_space(4))) int32_t*)address;
}

// NOTE: the mask tells the compiler what it knows of blockDim.x, so that loops over threads have no case for a step of
// one.
__device__ __forceinline__ int workgroup_threads(int argument) {
  constexpr int kMostThreads = 1024;
  return argument & (2 * kMostThreads - kWaveSize);
}

template <typename T>
__device__ __forceinline__ T loaded_anew(const T&, size_t offset) {
  auto arguments = __builtin_amdgcn_kernarg_segment_ptr();
  asm volatile("" : "+s"(arguments));
  T copy;
  __builtin_memcpy(&copy, (const T*)((const char*)arguments + offset), sizeof(T));
  return copy;
}

__device__ __forceinline__ uint32_t max_of(uint32_t x, uint32_t y) { return x > y ? x : y; }

__device__ __forceinline__ uint32_t wave_max(uint32_t x) {
  x = max_of(x, dpp::move<dpp::kRowShr + 1>(x));
  x = max_of(x, dpp::move<dpp::kRowShr + 2>(x));
  x = max_of(x, dpp::move<dpp::kRowShr + 4>(x));
  x = max_of(x, dpp::move<dpp::kRowShr + 8>(x));
  if constexpr (kWaveSize == 64) {
    x = max_of(x, dpp::move<dpp::kRowBcast15, dpp::kOddRows>(x));
    x = max_of(x, dpp::move<dpp::kRowBcast31, dpp::kUpperRows>(x));
    return wave_read_lane(x, 63);
  } else {
    return max_of(wave_read_lane(x, 15), wave_read_lane(x, 31));
  }
}

__device__ __forceinline__ uint64_t wave_max(uint64_t x) {
  const uint32_t high = static_cast<uint32_t>(x >> 32);
  const uint32_t best_high = wave_max(high);
  const uint32_t low = high == best_high ? static_cast<uint32_t>(x) : 0u;
  return static_cast<uint64_t>(best_high) << 32 | wave_max(low);
}

#if defined(__GFX9__)
// x of this lane + x of the lane whose index differs in the bit 32.
__device__ __forceinline__ float add_across_halves(float x) {
  const uint32_t bits = __float_as_uint(x);
#if defined(__gfx950__)
  const auto both = __builtin_amdgcn_permlane32_swap(bits, bits, false, false);
  return __uint_as_float(both[0]) + __uint_as_float(both[1]);
#else
  const int opposite = (lane_idx() ^ 32) * static_cast<int>(sizeof(float));
  return x + __uint_as_float(__builtin_amdgcn_ds_bpermute(opposite, bits));
#endif
}
#endif

#if !defined(__gfx950__)
// x of the lane whose index differs in the bit 16.
__device__ __forceinline__ uint32_t swap_rows(uint32_t x) {
#if defined(__GFX9__)
  constexpr int kSwizzleXor16 = 0x401f;  // and_mask 0x1f, or_mask 0, xor_mask 0x10
  return __builtin_amdgcn_ds_swizzle(x, kSwizzleXor16);
#else
  return __builtin_amdgcn_permlanex16(x, x, 0x76543210, 0xfedcba98, false, false);
#endif
}
#endif

// x of this lane + x of the lane whose index differs in the bit 16.
__device__ __forceinline__ float add_across_rows(float x) {
  const uint32_t bits = __float_as_uint(x);
#if defined(__gfx950__)
  const auto both = __builtin_amdgcn_permlane16_swap(bits, bits, false, false);
  return __uint_as_float(both[0]) + __uint_as_float(both[1]);
#else
  return x + __uint_as_float(swap_rows(bits));
#endif
}

// x of the lane whose index differs in the bit 16, on every architecture.
__device__ __forceinline__ uint32_t other_row(uint32_t x) {
#if defined(__gfx950__)
  const auto both = __builtin_amdgcn_permlane16_swap(x, x, false, false);
  return (lane_idx() & 16) != 0 ? both[0] : both[1];
#else
  return swap_rows(x);
#endif
}

template <int kMask>
__device__ __forceinline__ uint32_t wave_exchange(uint32_t x) {
  if constexpr (kMask == 1) return dpp::move<dpp::kQuadSwap1>(x);
  if constexpr (kMask == 2) return dpp::move<dpp::kQuadSwap2>(x);
  if constexpr (kMask == 3) return dpp::move<dpp::kQuadMirror>(x);
  if constexpr (kMask == 4) return dpp::move<dpp::kHalfMirror>(dpp::move<dpp::kQuadMirror>(x));
  if constexpr (kMask == 7) return dpp::move<dpp::kHalfMirror>(x);
  if constexpr (kMask == 8) return dpp::move<dpp::kRowRor + 8>(x);
  if constexpr (kMask == 15) return dpp::move<dpp::kRowMirror>(x);
  if constexpr (kMask == 16) return other_row(x);
  static_assert(kMask <= 4 || kMask == 7 || kMask == 8 || kMask == 15 || kMask == 16 || kMask == 31,
                "no instruction does it");
  return other_row(dpp::move<dpp::kRowMirror>(x));
}

// A wave's accesses to LDS are done in order; only the compiler has to be told.
__device__ __forceinline__ void wave_sync() {
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
}

__device__ __forceinline__ int highest_bit(uint32_t x) { return 31 - __builtin_clz(x); }

template <int kDistance>
__device__ __forceinline__ uint32_t wave_swap(uint32_t x) {
  static_assert(kDistance <= 16, "halves of a wave64 are not swapped");
  if constexpr (kDistance == 1) return dpp::move<dpp::kQuadSwap1>(x);
  if constexpr (kDistance == 2) return dpp::move<dpp::kQuadSwap2>(x);
  if constexpr (kDistance == 4) return dpp::move<dpp::kHalfMirror>(x);
  if constexpr (kDistance == 8) return dpp::move<dpp::kRowMirror>(x);
  return other_row(x);
}

// In small groups the first quad adds up its lanes, hands the sum to the second one by a mirror, and
// gets it back the same way; large ones are few, and go through scalar registers one by one.
template <int kGroup>
__device__ __forceinline__ float wave_sum_in_groups(float x, int count) {
  if constexpr (kGroup == 32) {
    float sum = 0.0f;
    for (int l = 0; l < count; ++l) sum += wave_read_lane(x, l);
    if constexpr (kWaveSize == 64) {
      float upper = 0.0f;
      for (int l = 0; l < count; ++l) upper += wave_read_lane(x, 32 + l);
      return lane_idx() < 32 ? sum : upper;
    }
    return sum;
  }
  float sum = dpp::move<0 * dpp::kQuadRead>(x);
  if (count > 1) sum += dpp::move<1 * dpp::kQuadRead>(x);
  if (count > 2) sum += dpp::move<2 * dpp::kQuadRead>(x);
  if (count > 3) sum += dpp::move<3 * dpp::kQuadRead>(x);
  if (count <= 4) return sum;
  float all = dpp::move<dpp::kHalfMirror>(sum) + dpp::move<0 * dpp::kQuadRead>(x);
  if (count > 5) all += dpp::move<1 * dpp::kQuadRead>(x);
  if (count > 6) all += dpp::move<2 * dpp::kQuadRead>(x);
  if (count > 7) all += dpp::move<3 * dpp::kQuadRead>(x);
  const float back = dpp::move<dpp::kHalfMirror>(all);
  return (lane_idx() & 4) != 0 ? all : back;
}

__device__ __forceinline__ float wave_sum_by_halves(float x) {
#if defined(__GFX9__)
  x = add_across_halves(x);
#endif
  x = add_across_rows(x);
  // Once lanes l and l ^ 8 agree, a rotation by 4 reads the same value as an exchange of l and l ^ 4.
  x += dpp::move<dpp::kRowRor + 8>(x);
  x += dpp::move<dpp::kRowRor + 4>(x);
  x += dpp::move<dpp::kRowRor + 2>(x);
  x += dpp::move<dpp::kRowRor + 1>(x);
  return wave_read_lane(x, 0);
}

__device__ __forceinline__ float wave_sum_in_order(float x, int count, float init) {
  for (int l = 0; l < count; ++l) init += wave_read_lane(x, l);
  return init;
}

__device__ __forceinline__ WaveMask wave_ballot(bool flag) {
  return static_cast<WaveMask>(
      __ballot(flag));  // HIP's, as the builtin behind it has changed names
}

__device__ __forceinline__ int lowest_lane(WaveMask lanes) { return __builtin_ctzll(lanes); }

__device__ __forceinline__ WavePrefix wave_rank(bool flag) {
  const uint64_t set = wave_ballot(flag);
  uint32_t below = __builtin_amdgcn_mbcnt_lo(static_cast<uint32_t>(set), 0);
  if constexpr (kWaveSize == 64) {
    below = __builtin_amdgcn_mbcnt_hi(static_cast<uint32_t>(set >> 32), below);
  }
  return {below, static_cast<uint32_t>(__builtin_popcountll(set))};
}

__device__ __forceinline__ uint32_t wave_inclusive_sum(uint32_t x) {
  x += dpp::move<dpp::kRowShr + 1>(x);
  x += dpp::move<dpp::kRowShr + 2>(x);
  x += dpp::move<dpp::kRowShr + 4>(x);
  x += dpp::move<dpp::kRowShr + 8>(x);
  if constexpr (kWaveSize == 64) {
    x += dpp::move<dpp::kRowBcast15, dpp::kOddRows>(x);
    x += dpp::move<dpp::kRowBcast31, dpp::kUpperRows>(x);
  } else {
    const uint32_t lower_row = wave_read_lane(x, 15);
    if (lane_idx() >= 16) x += lower_row;
  }
  return x;
}

}  // namespace aiter
