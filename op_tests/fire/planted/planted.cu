// Kernels with one bug each, for the tests of the checkers. The line with the bug carries a comment
// `BUG: <name>`, which is how the tests know the line that a report has to name.
#include <stdexcept>
#include <string>

#include "device/cluster.h"
#include "device/handover.h"
#include "device/wave.h"

namespace {

using aiter::FourWords;
using aiter::Inbox;
using aiter::kWaveSize;

__global__ void sound(int* data, int n) {
  AITER_DYNAMIC_LDS(lds_base);
  int* const lds = reinterpret_cast<int*>(lds_base);
  const int t = threadIdx.x, size = blockDim.x;
  lds[t] = t;
  __syncthreads();
  const uint32_t best = aiter::wave_max(static_cast<uint32_t>(lds[size - 1 - t]));
  if (t < n) data[t] = static_cast<int>(best);
}

// LDS in which every thread stores its number, behind a barrier: what another loads there next is not ordered.
__device__ __forceinline__ int* stored_numbers(char* lds_base) {
  int* const lds = reinterpret_cast<int*>(lds_base);
  lds[threadIdx.x] = 0;
  __syncthreads();
  lds[threadIdx.x] = static_cast<int>(threadIdx.x);
  return lds;
}

__global__ void unordered_waves(int* data, int n) {
  AITER_DYNAMIC_LDS(lds_base);
  const int* const lds = stored_numbers(lds_base);
  const int t = threadIdx.x, size = blockDim.x;
  if (t < n) data[t] = lds[(t + kWaveSize) % size];  // BUG: unordered_waves
}

__global__ void unordered_lanes(int* data, int n) {
  AITER_DYNAMIC_LDS(lds_base);
  const int* const lds = stored_numbers(lds_base);
  const int t = threadIdx.x;
  if (t < n) data[t] = lds[t ^ 1];  // BUG: unordered_lanes
}

// A ballot brings the lanes together, but does not order what they stored.
__global__ void ballot_for_sync(int* data, int n) {
  AITER_DYNAMIC_LDS(lds_base);
  const int* const lds = stored_numbers(lds_base);
  const int t = threadIdx.x;
  const aiter::WaveMask those = aiter::wave_ballot(t < n);
  if (those >> aiter::lane_idx() & 1) data[t] = lds[t ^ 1];  // BUG: ballot_for_sync
}

__global__ void shared_address(int* data, int) {
  if (threadIdx.x == 0) data[0] = static_cast<int>(blockIdx.x);  // BUG: shared_address
}

__global__ void unwritten_lds(int* data, int n) {
  AITER_DYNAMIC_LDS(lds_base);
  int* const lds = reinterpret_cast<int*>(lds_base);
  const int t = threadIdx.x;
  if (t != 3) lds[t] = t;
  __syncthreads();
  if (t < n) data[t] = lds[t];  // BUG: unwritten_lds
}

__global__ void behind_lds(int* data, int n) {
  AITER_DYNAMIC_LDS(lds_base);
  int* const lds = reinterpret_cast<int*>(lds_base);
  const int t = threadIdx.x;
  lds[t + 1] = t;  // BUG: behind_lds
  __syncthreads();
  if (t < n) data[t] = lds[t + 1];
}

__global__ void behind_tensor(int* data, int n) {
  const int t = threadIdx.x;
  if (t < n) data[t + 1] = t;  // BUG: behind_tensor
}

__global__ void signed_overflow(int* data, int n) {
  const int t = threadIdx.x;
  if (t < n) data[t] = (t + 0x7fffff00) * 2;  // BUG: signed_overflow
}

__global__ void wide_shift(int* data, int n) {
  const int t = threadIdx.x;
  if (t < n) data[t] = static_cast<int>(1u << t);  // BUG: wide_shift
}

__global__ void divergent_collective(int* data, int n) {
  const int t = threadIdx.x;
  uint32_t best = 0;
  if (t % 2 == 0) {
    best = aiter::wave_max(static_cast<uint32_t>(t));
  } else {
    best = aiter::wave_inclusive_sum(static_cast<uint32_t>(t));  // BUG: divergent_collective
  }
  if (t < n) data[t] = static_cast<int>(best);
}

__global__ void divergent_barrier(int* data, int n) {
  const int t = threadIdx.x;
  if (t % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();  // BUG: divergent_barrier
  }
  if (t < n) data[t] = t;
}

__global__ void collective_beside_barrier(int* data, int n) {
  const int t = threadIdx.x;
  uint32_t best = 0;
  if (t % 2 == 0) {
    __syncthreads();
  } else {
    best = aiter::wave_max(static_cast<uint32_t>(t));  // BUG: collective_beside_barrier
  }
  if (t < n) data[t] = static_cast<int>(best);
}

__global__ void exited_lane(int* data, int n) {
  const int t = threadIdx.x;
  if (t % kWaveSize == 5) return;
  const uint32_t x = aiter::wave_read_lane(static_cast<uint32_t>(t), 5);  // BUG: exited_lane
  if (t < n) data[t] = static_cast<int>(x);
}

// Those below run as a cluster of two workgroups, each of which sends the other four words per lane.
__device__ __forceinline__ FourWords* letter(char* lds_base) {
  return reinterpret_cast<FourWords*>(lds_base + sizeof(FourWords)) + threadIdx.x;
}

__device__ __forceinline__ void send_letter(char* lds_base) {
  aiter::cluster_send(letter(lds_base), reinterpret_cast<Inbox*>(lds_base), 1 - blockIdx.x,
                      FourWords{{threadIdx.x, 0, 0, 0}});
}

__global__ void sound_cluster(int* data, int n) {
  AITER_DYNAMIC_LDS(lds_base);
  Inbox* const inbox = reinterpret_cast<Inbox*>(lds_base);
  if (threadIdx.x == 0) aiter::open_inbox(inbox);
  aiter::cluster_arrive();
  __syncthreads();
  if (threadIdx.x == 0) aiter::expect_bytes(inbox, blockDim.x * sizeof(FourWords));
  __syncthreads();
  aiter::cluster_wait();
  send_letter(lds_base);
  aiter::wait_for_inbox(inbox);
  const int t = threadIdx.x;
  if (blockIdx.x == 0 && t < n) data[t] = static_cast<int>(letter(lds_base)->word[0]);
}

__global__ void unordered_workgroups(int* data, int n) {
  AITER_DYNAMIC_LDS(lds_base);
  *letter(lds_base) = FourWords{};
  aiter::cluster_arrive();
  aiter::cluster_wait();
  send_letter(lds_base);
  __syncthreads();
  const int t = threadIdx.x;
  if (blockIdx.x == 1 && t < n) {
    data[t] = static_cast<int>(letter(lds_base)->word[0]);  // BUG: unordered_workgroups
  }
}

__global__ void early_workgroup(int* data, int n) {
  AITER_DYNAMIC_LDS(lds_base);
  aiter::cluster_send(letter(lds_base), nullptr, 1 - blockIdx.x, {});  // BUG: early_workgroup
  aiter::cluster_arrive();
  aiter::cluster_wait();
  const int t = threadIdx.x;
  if (blockIdx.x == 0 && t < n) data[t] = static_cast<int>(letter(lds_base)->word[0]);
}

__global__ void divergent_cluster(int* data, int n) {
  const int t = threadIdx.x;
  aiter::cluster_arrive();
  if (blockIdx.x == 0) {
    aiter::cluster_wait();
  } else {
    aiter::cluster_wait();  // BUG: divergent_cluster
  }
  if (blockIdx.x == 0 && t < n) data[t] = t;
}

// Those below run as two workgroups, of which the last one reads what both have stored.
uint32_t planted_ticket = 0;

__device__ __forceinline__ void store_half(int* data) {
  const int half = blockDim.x / 2;
  const int t = threadIdx.x;
  if (t < half) data[static_cast<int>(blockIdx.x) * half + t] = t;
}

// Whether this is the last of `num_workgroups` that arrive.
__device__ __forceinline__ bool arrives_last(char* lds_base, uint32_t num_workgroups) {
  bool* const is_last = reinterpret_cast<bool*>(lds_base);
  __syncthreads();
  if (threadIdx.x == 0)
    *is_last = aiter::arrive(&planted_ticket, num_workgroups) == num_workgroups - 1;
  __syncthreads();
  return *is_last;
}

__global__ void sound_handover(int* data, int) {
  AITER_DYNAMIC_LDS(lds_base);
  store_half(data);
  aiter::release_to_device();
  if (!arrives_last(lds_base, gridDim.x)) return;
  aiter::acquire_from_device();
  const int other = data[blockDim.x - 1 - threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = other;
}

__global__ void missing_release(int* data, int) {
  AITER_DYNAMIC_LDS(lds_base);
  store_half(data);
  if (!arrives_last(lds_base, gridDim.x)) return;
  aiter::acquire_from_device();
  const int other = data[blockDim.x - 1 - threadIdx.x];  // BUG: missing_release
  __syncthreads();
  data[threadIdx.x] = other;
}

__global__ void early_release(int* data, int) {
  AITER_DYNAMIC_LDS(lds_base);
  aiter::release_to_device();
  store_half(data);
  if (!arrives_last(lds_base, gridDim.x)) return;
  aiter::acquire_from_device();
  const int other = data[blockDim.x - 1 - threadIdx.x];  // BUG: early_release
  __syncthreads();
  data[threadIdx.x] = other;
}

__global__ void missing_acquire(int* data, int) {
  AITER_DYNAMIC_LDS(lds_base);
  store_half(data);
  aiter::release_to_device();
  if (!arrives_last(lds_base, gridDim.x)) return;
  const int other = data[blockDim.x - 1 - threadIdx.x];  // BUG: missing_acquire
  __syncthreads();
  data[threadIdx.x] = other;
}

__global__ void narrow_release(int* data, int) {
  AITER_DYNAMIC_LDS(lds_base);
  store_half(data);
  hip_cpu::fence(hip_cpu::Fence::release, hip_cpu::Scope::workgroup);
  if (!arrives_last(lds_base, gridDim.x)) return;
  aiter::acquire_from_device();
  const int other = data[blockDim.x - 1 - threadIdx.x];  // BUG: narrow_release
  __syncthreads();
  data[threadIdx.x] = other;
}

__global__ void lost_arrival(int* data, int) {
  AITER_DYNAMIC_LDS(lds_base);
  store_half(data);
  aiter::release_to_device();
  arrives_last(lds_base, gridDim.x + 1);
}

}  // namespace

// Runs the kernel `name` on 2 workgroups (1 where a second would be a bug of its own) of 128 lanes.
void run_planted(const std::string& name, int* data, int n) {
  constexpr unsigned kThreads = 128;
  using Kernel = void (*)(int*, int);
  const struct {
    const char* name;
    Kernel kernel;
    unsigned num_blocks;
    unsigned cluster_size = 1;
  } kernels[] = {
      {"sound", sound, 1},
      {"unordered_waves", unordered_waves, 1},
      {"unordered_lanes", unordered_lanes, 1},
      {"ballot_for_sync", ballot_for_sync, 1},
      {"shared_address", shared_address, 2},
      {"unwritten_lds", unwritten_lds, 1},
      {"behind_lds", behind_lds, 1},
      {"behind_tensor", behind_tensor, 1},
      {"signed_overflow", signed_overflow, 1},
      {"wide_shift", wide_shift, 1},
      {"divergent_collective", divergent_collective, 1},
      {"divergent_barrier", divergent_barrier, 1},
      {"collective_beside_barrier", collective_beside_barrier, 1},
      {"exited_lane", exited_lane, 1},
      {"sound_cluster", sound_cluster, 2, 2},
      {"unordered_workgroups", unordered_workgroups, 2, 2},
      {"early_workgroup", early_workgroup, 2, 2},
      {"divergent_cluster", divergent_cluster, 2, 2},
      {"sound_handover", sound_handover, 2},
      {"missing_release", missing_release, 2},
      {"early_release", early_release, 2},
      {"missing_acquire", missing_acquire, 2},
      {"narrow_release", narrow_release, 2},
      {"lost_arrival", lost_arrival, 2},
  };
  for (const auto& entry : kernels) {
    if (name != entry.name) continue;
    planted_ticket = 0;
    aiter::launch(
        entry.kernel, aiter::device_limits(0),
        {entry.num_blocks, kThreads,
         entry.cluster_size > 1 ? (kThreads + 1) * sizeof(FourWords) : kThreads * sizeof(int),
         entry.cluster_size},
        static_cast<hipStream_t>(nullptr), data, n);
    return;
  }
  throw std::invalid_argument("name: expected one of the planted kernels, got " + name);
}
