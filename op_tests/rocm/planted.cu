// What a kernel must not do, each as a kernel of its own, with the interface of primitives.cu; and how
// workgroups would talk to each other, which the kernels do not (test_memory_scopes.py).
#include "device/wave.h"

#define PRIMITIVE(name) \
  extern "C" __global__ void name(const uint32_t* in, uint32_t* out, uint32_t argument)

PRIMITIVE(store_past_the_end) { out[threadIdx.x + argument] = in[threadIdx.x]; }

PRIMITIVE(misaligned_store) {
  *reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(out + threadIdx.x) + argument) = 1;
}

PRIMITIVE(store_to_input) { const_cast<uint32_t*>(in)[threadIdx.x] = argument; }

PRIMITIVE(missing_barrier) {
  __shared__ uint32_t lds_words[1024];
  lds_words[threadIdx.x] = in[threadIdx.x];
  if (argument != 0) __syncthreads();
  out[threadIdx.x] = lds_words[blockDim.x - 1 - threadIdx.x];
}

PRIMITIVE(two_stores) {
  out[threadIdx.x] = in[threadIdx.x];
  if (argument != 0) __syncthreads();
  out[blockDim.x - 1 - threadIdx.x] = in[threadIdx.x];
}

// An atomic may change noise, but what it leaves there is noise.
PRIMITIVE(atomic_on_noise) {
  __shared__ uint32_t lds_words[1024];
  atomicOr(&lds_words[threadIdx.x], 1u);
  if (argument != 0) {
    __syncthreads();
    lds_words[threadIdx.x] = in[threadIdx.x];
  }
  __syncthreads();
  out[threadIdx.x] = lds_words[blockDim.x - 1 - threadIdx.x];
}

PRIMITIVE(unwritten_lds) {
  __shared__ uint32_t lds_words[1024];
  if (threadIdx.x < argument) lds_words[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = lds_words[threadIdx.x];
}

PRIMITIVE(lds_past_the_end) {
  extern __shared__ uint32_t lds_dynamic[];
  lds_dynamic[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = lds_dynamic[blockDim.x - 1 - threadIdx.x] + argument;
}

PRIMITIVE(endless_loop) {
  while (argument != 0) __asm__ volatile("");
  out[threadIdx.x] = in[threadIdx.x];
}

// How workgroups would talk: a counter of arrivals, with and without an order on other memory.
PRIMITIVE(count_arrivals_in_order) {
  out[threadIdx.x] = in[threadIdx.x];
  const uint32_t before = __hip_atomic_fetch_add(out + blockDim.x, argument, __ATOMIC_ACQ_REL,
                                                 __HIP_MEMORY_SCOPE_AGENT);
  out[blockDim.x + 1 + threadIdx.x] = before;
}

PRIMITIVE(count_arrivals_in_a_workgroup) {
  out[threadIdx.x] = in[threadIdx.x];
  const uint32_t before = __hip_atomic_fetch_add(out + blockDim.x, argument, __ATOMIC_ACQ_REL,
                                                 __HIP_MEMORY_SCOPE_WORKGROUP);
  out[blockDim.x + 1 + threadIdx.x] = before;
}

// What row_topk.h must not do: registers that are indexed by a variable, the same in all lanes, and
// an array that only memory can hold.
PRIMITIVE(indexed_registers) {
  uint32_t values[32];
  for (int i = 0; i < 32; ++i) values[i] = in[threadIdx.x * 32 + i];
  for (uint32_t i = 0; i < argument; ++i) values[(argument >> i) & 31] += i;
  for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = values[i];
}

PRIMITIVE(array_in_scratch) {
  uint32_t values[64];
  for (int i = 0; i < 64; ++i) values[i] = i * argument;
  for (uint32_t i = 0; i < argument; ++i) values[in[i] & 63] += values[in[i + 1] & 63];
  out[threadIdx.x] = values[in[threadIdx.x] & 63];
}
