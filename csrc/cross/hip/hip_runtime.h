// The part of HIP that the kernels use, for compiling their device code where no ROCm is installed:
// any clang with the amdgcn target, `--cuda-device-only -nogpulib -nogpuinc` and this folder first on
// the include path. Host functions are declared, so that launchers parse, and never linked.
#pragma once

#include <cstddef>
#include <cstdint>

#define __device__ __attribute__((device))
#define __host__ __attribute__((host))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
// As in HIP: the second number, if there is one, is of waves per SIMD, not of workgroups as in CUDA.
#define HIP_CROSS_THREADS(threads) amdgpu_flat_work_group_size(1, threads)
#define HIP_CROSS_THREADS_WAVES(threads, waves) \
  amdgpu_flat_work_group_size(1, threads), amdgpu_waves_per_eu(waves)
#define HIP_CROSS_CHOICE(first, second, chosen, ...) chosen
#define __launch_bounds__(...)                                                             \
  __attribute__((HIP_CROSS_CHOICE(__VA_ARGS__, HIP_CROSS_THREADS_WAVES, HIP_CROSS_THREADS, \
                                  unused)(__VA_ARGS__)))
#define __align__(n) __attribute__((aligned(n)))

using hipStream_t = struct ihipStream_t*;
enum hipError_t { hipSuccess = 0 };
enum hipDeviceAttribute_t {
  hipDeviceAttributeWarpSize,
  hipDeviceAttributeMultiprocessorCount,
  hipDeviceAttributeMaxSharedMemoryPerBlock,
};
enum hipStreamCaptureStatus { hipStreamCaptureStatusNone = 0 };
#define HIP_SYMBOL(symbol) (const void*)(&symbol)
struct dim3 {
  uint32_t x, y, z;
  constexpr dim3(uint32_t x_ = 1, uint32_t y_ = 1, uint32_t z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern "C" {
hipError_t hipGetLastError();
hipError_t hipGetDeviceCount(int* count);
hipError_t hipGetDevice(int* device);
hipError_t hipSetDevice(int device);
hipError_t hipStreamIsCapturing(hipStream_t stream, hipStreamCaptureStatus* status);
hipError_t hipGetSymbolAddress(void** address, const void* symbol);
hipError_t hipDeviceGetAttribute(int* value, hipDeviceAttribute_t attribute, int device);
const char* hipGetErrorName(hipError_t error);
const char* hipGetErrorString(hipError_t error);
hipError_t hipLaunchKernel(const void* function, dim3 grid, dim3 block, void** args,
                           size_t lds_bytes, hipStream_t stream);
hipError_t __hipPushCallConfiguration(dim3 grid, dim3 block, size_t lds_bytes = 0,
                                      hipStream_t stream = nullptr);
}

namespace hip_cross {

struct ThreadIdx {
  struct X {
    __device__ operator uint32_t() const { return __builtin_amdgcn_workitem_id_x(); }
  } x;
};
struct BlockIdx {
  struct X {
    __device__ operator uint32_t() const { return __builtin_amdgcn_workgroup_id_x(); }
  } x;
};
struct BlockDim {
  struct X {
    __device__ operator uint32_t() const { return __builtin_amdgcn_workgroup_size_x(); }
  } x;
};
struct GridDim {
  struct X {
    __device__ operator uint32_t() const {
      return __builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x();
    }
  } x;
};

}  // namespace hip_cross

static constexpr __device__ hip_cross::ThreadIdx threadIdx{};
static constexpr __device__ hip_cross::BlockIdx blockIdx{};
static constexpr __device__ hip_cross::BlockDim blockDim{};
static constexpr __device__ hip_cross::GridDim gridDim{};

__device__ inline void __syncthreads() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

__device__ inline unsigned long long __ballot(int flag) {
#if defined(__GFX9__)
  return __builtin_amdgcn_ballot_w64(flag != 0);
#else
  return __builtin_amdgcn_ballot_w32(flag != 0);
#endif
}

__device__ inline int __popc(uint32_t x) { return __builtin_popcount(x); }
__device__ inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
__device__ inline float __uint_as_float(uint32_t x) { return __builtin_bit_cast(float, x); }
__device__ inline float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }

__device__ inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  return __hip_atomic_fetch_add(address, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
__device__ inline uint32_t atomicOr(uint32_t* address, uint32_t value) {
  return __hip_atomic_fetch_or(address, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
