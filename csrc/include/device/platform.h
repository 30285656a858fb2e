// The runtime half of the platform seam: what a launcher needs, under HIP's names on every target.
//
//   AITER_TARGET_ROCM   the HIP runtime itself
//   AITER_TARGET_CUDA   HIP's names, mapped on the CUDA runtime
//   AITER_TARGET_CPU    the execution layer of hip_cpu.h; a stream is always null, a launch is done
//                       when it returns
//
// Device code takes its half from wave.h and numeric.h. Nothing above csrc/include/device and
// csrc/cpu asks which target it is compiled for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "target.h"

#if defined(AITER_TARGET_ROCM)
#include <hip/hip_runtime.h>
#elif defined(AITER_TARGET_CUDA)
#include <cuda_runtime.h>
using hipStream_t = cudaStream_t;
using hipError_t = cudaError_t;
constexpr auto hipSuccess = cudaSuccess;
constexpr auto hipDeviceAttributeWarpSize = cudaDevAttrWarpSize;
constexpr auto hipDeviceAttributeMultiprocessorCount = cudaDevAttrMultiProcessorCount;
constexpr auto hipFuncAttributeMaxDynamicSharedMemorySize =
    cudaFuncAttributeMaxDynamicSharedMemorySize;
inline hipError_t hipGetLastError() { return cudaGetLastError(); }
inline const char* hipGetErrorName(hipError_t error) { return cudaGetErrorName(error); }
inline const char* hipGetErrorString(hipError_t error) { return cudaGetErrorString(error); }
inline hipError_t hipGetDeviceCount(int* count) { return cudaGetDeviceCount(count); }
inline hipError_t hipGetDevice(int* device) { return cudaGetDevice(device); }
inline hipError_t hipSetDevice(int device) { return cudaSetDevice(device); }
using hipStreamCaptureStatus = cudaStreamCaptureStatus;
constexpr auto hipStreamCaptureStatusNone = cudaStreamCaptureStatusNone;
inline hipError_t hipStreamIsCapturing(hipStream_t stream, hipStreamCaptureStatus* status) {
  return cudaStreamIsCapturing(stream, status);
}
#define HIP_SYMBOL(symbol) symbol
#define hipGetSymbolAddress cudaGetSymbolAddress
#elif defined(AITER_TARGET_CPU)
#include "device/hip_cpu.h"
using hipStream_t = void*;
#endif

// The dynamically sized LDS of a workgroup, as an array of bytes.
#if defined(AITER_TARGET_CPU)
#define AITER_DYNAMIC_LDS(name) char* const name = hip_cpu::current_workgroup->lds
#else
#define AITER_DYNAMIC_LDS(name) extern __shared__ __align__(16) char name[]
#endif

// The largest workgroup that a kernel is launched with. Without the 1, ptxas aims at full occupancy
// and rather spills (V=32 instances: 14 to 24 bytes) than use the registers that are there.
#if defined(AITER_TARGET_CUDA)
#define AITER_LAUNCH_BOUNDS(threads) __launch_bounds__(threads, 1)
#else
#define AITER_LAUNCH_BOUNDS(threads) __launch_bounds__(threads)
#endif

// Before a loop whose trip count the compiler knows: registers are indexed by constants only.
// Before one that shall stay a loop, as unrolling it would only make code longer: AITER_LOOP.
#if defined(AITER_TARGET_CPU)
#define AITER_UNROLL
#define AITER_LOOP
#elif defined(AITER_TARGET_ROCM)
#define AITER_UNROLL _Pragma("unroll")
// NOTE: clang takes several rounds at once else, where a loop counts something ("interleaves" it), which needs registers
// and preparation for loops of one or two rounds.
#define AITER_LOOP _Pragma("clang loop unroll(disable) vectorize(disable) interleave(disable)")
#else
#define AITER_UNROLL _Pragma("unroll")
#define AITER_LOOP _Pragma("unroll 1")
#endif

// A condition that compilers shall keep out of the way straight on.
#define AITER_UNLIKELY(condition) __builtin_expect(static_cast<bool>(condition), 0)

namespace aiter {

// What a lane loads or stores at once.
struct alignas(16) FourWords {
  uint32_t word[4];
};

// What clusters have wherever a GPU has them in full.
constexpr int kWorkgroupsOfCluster = 8;

// What a launch choice may depend on.
struct DeviceLimits {
  int wave_size;
  int num_compute_units;
  int lds_bytes;              // dynamic LDS that one workgroup can get
  int max_threads_per_block;  // of the launches that this project makes
  int max_cluster_size;       // workgroups; 1: no clusters
  int default_cluster_size;   // the most that launchers choose unasked
  int most_clusters;          // of kWorkgroupsOfCluster, at a time; 0: none of so many
  bool can_hand_over;         // through memory (handover.h): kCanHandOver of its kernels
  bool hands_over;            // launchers choose to do so unasked
  bool overlaps_launches;     // a launch may start up while the one before it ends (cluster.h)
  bool copies_in_bulk;  // between memory and LDS, beside what waves do (rows_ahead.h, zeroing.h)
};

struct LaunchShape {
  unsigned num_blocks;        // workgroups
  unsigned num_threads;       // of a workgroup
  size_t lds_bytes;           // of a workgroup, dynamic
  unsigned cluster_size = 1;  // workgroups; divides num_blocks
  bool waits_itself =
      false;  // the kernel calls wait_for_earlier_launch(), so it may start up early
};

#if defined(AITER_TARGET_CPU)

inline DeviceLimits query_device_limits(int) {
  return {hip_cpu::kWaveSize,
          static_cast<int>(hip_cpu::num_cores()),
          hip_cpu::kLdsBytesPerBlock,
          256,  // fewer lanes, fewer switches at a barrier; a wave's lanes share a core anyway
          hip_cpu::kMaxClusterSize,
          1,
          16,
          true,
          false,
          false,
          true};
}

inline int current_device() { return 0; }

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const DeviceLimits&, const LaunchShape& shape, hipStream_t,
            Args... args) {
  auto body = [&] { kernel(args...); };
  hip_cpu::launch(
      shape.num_blocks, shape.num_threads, shape.lds_bytes, shape.cluster_size,
      [](const void* closure) { (*static_cast<const decltype(body)*>(closure))(); }, &body);
}

#else

inline void check_runtime(hipError_t error, const char* what) {
  if (error == hipSuccess) return;
  (void)hipGetLastError();  // the error is reported here, and must not surface in a later call
  int num_devices = 0;
  if (hipGetDeviceCount(&num_devices) != hipSuccess) num_devices = 0;
  (void)hipGetLastError();
  throw std::runtime_error(std::string(kTargetName) + ": " + what +
                           " failed: " + hipGetErrorName(error) + ": " + hipGetErrorString(error) +
                           " (GPUs that the runtime sees: " + std::to_string(num_devices) + ")");
}

inline int device_attribute(int device, decltype(hipDeviceAttributeWarpSize) attribute,
                            const char* name) {
  int value = 0;
#if defined(AITER_TARGET_ROCM)
  check_runtime(hipDeviceGetAttribute(&value, attribute, device), name);
#else
  check_runtime(cudaDeviceGetAttribute(&value, attribute, device), name);
#endif
  return value;
}

inline int current_device() {
  int device = 0;
  check_runtime(hipGetDevice(&device), "asking for the current device");
  return device;
}

// Makes `device` current, and restores the caller's at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : previous_(current_device()) {
    if (previous_ == device) {
      previous_ = -1;
    } else {
      check_runtime(hipSetDevice(device), "making the tensors' device current");
    }
  }
  ~DeviceGuard() {
    if (previous_ >= 0) (void)hipSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
};

#if defined(AITER_TARGET_CUDA)
template <typename>
__global__ void cluster_probe_kernel() {}

// Whether kernels are compiled for clusters (cluster.h), of which a slice of such a GPU may have none.
inline bool has_cluster_kernels(int device) {
#if defined(AITER_WITHOUT_CLUSTERS)
  (void)device;
  return false;
#else
  return device_attribute(device, cudaDevAttrComputeCapabilityMajor,
                          "querying the compute capability") >= 9;
#endif
}

// Workgroups that can form a cluster when each needs a compute unit for itself; 1 where there are none.
// Parts with fewer compute units side by side, and slices of a GPU, have less than the 16 of an H100.
inline int query_cluster_size(int device, int lds_bytes) {
  if (!has_cluster_kernels(device)) return 1;
  const DeviceGuard guard(device);
  const void* const kernel = reinterpret_cast<const void*>(cluster_probe_kernel<void>);
  const char* const what = "querying the size of clusters";
  check_runtime(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                what);
  check_runtime(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, lds_bytes), what);
  constexpr int kLargest = 16;
  cudaLaunchConfig_t config{};
  config.gridDim = kLargest;
  config.blockDim = 1024;
  config.dynamicSmemBytes = lds_bytes;
  int most = 1;
  check_runtime(cudaOccupancyMaxPotentialClusterSize(&most, kernel, &config), what);
  int size = 1;
  while (2 * size <= most && 2 * size <= kLargest) size *= 2;
  return size;
}

// Clusters of kWorkgroupsOfCluster that run at a time when each workgroup has a compute unit for itself: 15 on an H100
// of 132 of them, which leaves 12 without.
inline int query_most_clusters(int device, int lds_bytes) {
  const DeviceGuard guard(device);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kWorkgroupsOfCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = kWorkgroupsOfCluster;
  config.blockDim = 1024;
  config.dynamicSmemBytes = lds_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int most = 0;
  check_runtime(cudaOccupancyMaxActiveClusters(
                    &most, reinterpret_cast<const void*>(cluster_probe_kernel<void>), &config),
                "querying the number of clusters");
  return most;
}
#endif

inline DeviceLimits query_device_limits(int device) {
#if defined(AITER_TARGET_ROCM)
  const int lds_bytes = device_attribute(device, hipDeviceAttributeMaxSharedMemoryPerBlock,
                                         "querying the LDS of a workgroup");
  const int cluster_size = 1;
  const int most_clusters = 0;
  const bool can_hand_over = true;
#else
  const int lds_bytes = device_attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                         "querying the LDS of a workgroup");
  const int cluster_size = query_cluster_size(device, lds_bytes);
  const int most_clusters =
      cluster_size >= kWorkgroupsOfCluster ? query_most_clusters(device, lds_bytes) : 0;
  const bool can_hand_over = !has_cluster_kernels(device);
#endif
  return {device_attribute(device, hipDeviceAttributeWarpSize, "querying the wave width"),
          device_attribute(device, hipDeviceAttributeMultiprocessorCount,
                           "querying the number of compute units"),
          lds_bytes,
          1024,
          cluster_size,
          cluster_size,
          most_clusters,
          can_hand_over,
          can_hand_over,
          cluster_size > 1,
          cluster_size > 1};
}

// Launches on `stream` of the current device and raises what the runtime reports. A kernel that
// wants more LDS than a workgroup gets unasked has to be allowed to, once per kernel and device;
// asking again costs about as much as remembering.
//
// On an H100's host the runtime takes 3.8 us for a launch that may overlap and 4.5 us for one that may not
// (2026-11-23, in a loop of nothing else). Rejected: the driver's own function, 3.7 us; a graph of one
// node, 2.4 us, which overlaps with nothing and cannot be captured in another.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const DeviceLimits& limits, const LaunchShape& shape,
            hipStream_t stream, Args... args) {
#if defined(AITER_TARGET_CUDA)
  constexpr size_t kUnaskedLdsBytes = 48 * 1024;
  if (shape.lds_bytes > kUnaskedLdsBytes) {
    check_runtime(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       hipFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shape.lds_bytes)),
                  "raising the LDS limit of a kernel");
  }
  cudaLaunchAttribute attributes[2];
  unsigned num_attributes = 0;
  if (limits.overlaps_launches && shape.waits_itself) {
    cudaLaunchAttribute& overlap = attributes[num_attributes++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  constexpr unsigned kUnaskedClusterSize = 8;
  if (shape.cluster_size > kUnaskedClusterSize) {
    check_runtime(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                  "allowing a kernel large clusters");
  }
  if (shape.cluster_size > 1) {
    cudaLaunchAttribute& cluster = attributes[num_attributes++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = shape.cluster_size;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.num_blocks;
  config.blockDim = shape.num_threads;
  config.dynamicSmemBytes = shape.lds_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = num_attributes;
  check_runtime(cudaLaunchKernelEx(&config, kernel, args...), "launching a kernel");
#else
  (void)limits;
  // clang-format off
  kernel<<<shape.num_blocks, shape.num_threads, shape.lds_bytes, stream>>>(args...);
  // clang-format on
  check_runtime(hipGetLastError(), "launching a kernel");
#endif
}

#endif

// Limits of a device, queried once. More devices than the table holds are queried at every call.
inline DeviceLimits device_limits(int device) {
  constexpr int kMaxRemembered = 64;
  static DeviceLimits remembered[kMaxRemembered];
  static bool known[kMaxRemembered];  // benign: racing writers write the same values
  if (device < 0 || device >= kMaxRemembered) return query_device_limits(device);
  if (!known[device]) {
    remembered[device] = query_device_limits(device);
    known[device] = true;
  }
  return remembered[device];
}

}  // namespace aiter
