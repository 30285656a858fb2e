// Every wave operation of wave.h, and the arithmetic of numeric.h, as a kernel of its own: one
// workgroup, one word in and one out per thread. The last kernels do what a kernel must not.
#include "device/numeric.h"
#include "device/wave.h"

using namespace aiter;

#define PRIMITIVE(name) \
  extern "C" __global__ void name(const uint32_t* in, uint32_t* out, uint32_t argument)

PRIMITIVE(wave_max_32) { out[threadIdx.x] = wave_max(in[threadIdx.x]); }

PRIMITIVE(wave_max_64) {
  const uint64_t x = static_cast<uint64_t>(in[threadIdx.x]) << 32 | in[threadIdx.x + blockDim.x];
  const uint64_t best = wave_max(x);
  out[threadIdx.x] = static_cast<uint32_t>(best >> 32);
  out[threadIdx.x + blockDim.x] = static_cast<uint32_t>(best);
}

PRIMITIVE(sum_by_halves) {
  out[threadIdx.x] = bit_cast<uint32_t>(wave_sum_by_halves(bit_cast<float>(in[threadIdx.x])));
}

PRIMITIVE(sum_in_order) {
  const float x = bit_cast<float>(in[threadIdx.x]);
  out[threadIdx.x] = bit_cast<uint32_t>(wave_sum_in_order(x, static_cast<int>(argument), 0.25f));
}

PRIMITIVE(inclusive_sum) { out[threadIdx.x] = wave_inclusive_sum(in[threadIdx.x]); }

PRIMITIVE(read_lane) {
  out[threadIdx.x] = wave_read_lane(in[threadIdx.x], static_cast<int>(argument));
}

PRIMITIVE(rank) {
  const WavePrefix prefix = wave_rank(in[threadIdx.x] % 2 != 0);
  out[threadIdx.x] = prefix.below;
  out[threadIdx.x + blockDim.x] = prefix.total;
}

PRIMITIVE(exclusive_sum_of_block) {
  __shared__ Totals lds_totals[kMaxWavesPerBlock / kTotalsAtOnce];
  WavePrefix prefix = wave_prefix_sum(in[threadIdx.x]);
  post_total(lds_totals->of_wave, prefix);
  __syncthreads();
  prefix = over_workgroup(lds_totals->of_wave, blockDim.x / kWaveSize, prefix);
  out[threadIdx.x] = prefix.below;
  out[threadIdx.x + blockDim.x] = prefix.total;
}

PRIMITIVE(exp_nonpositive_f32) {
  out[threadIdx.x] = bit_cast<uint32_t>(exp_nonpositive(bit_cast<float>(in[threadIdx.x])));
}

PRIMITIVE(quotient) {
  const float numerator = bit_cast<float>(in[threadIdx.x]);
  const float denominator = bit_cast<float>(in[threadIdx.x + blockDim.x]);
  out[threadIdx.x] = bit_cast<uint32_t>(numerator / denominator);
}

PRIMITIVE(integer_quotient) {
  out[threadIdx.x] = in[threadIdx.x] / argument;
  out[threadIdx.x + blockDim.x] = in[threadIdx.x] % argument;
}

PRIMITIVE(f16_to_f32) {
  const F16 x{static_cast<uint16_t>(in[threadIdx.x])};
  out[threadIdx.x] = bit_cast<uint32_t>(to_float(x));
}

PRIMITIVE(f32_key) { out[threadIdx.x] = Logit<float>::store(in[threadIdx.x], 0); }

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
