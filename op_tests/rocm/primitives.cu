// Every wave operation of wave.h, and the arithmetic of numeric.h, as a kernel of its own: one
// workgroup, one word in and one or two out per thread.
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
  const WavePrefix prefix = wave_rank(in[threadIdx.x] > argument);
  out[threadIdx.x] = prefix.below;
  out[threadIdx.x + blockDim.x] = prefix.total;
}

#define SWAP(distance) \
  PRIMITIVE(swap_##distance) { out[threadIdx.x] = wave_swap<distance>(in[threadIdx.x]); }
SWAP(1)
SWAP(2)
SWAP(4)
SWAP(8)
SWAP(16)

#define EXCHANGE(mask) \
  PRIMITIVE(exchange_##mask) { out[threadIdx.x] = wave_exchange<mask>(in[threadIdx.x]); }
EXCHANGE(1)
EXCHANGE(2)
EXCHANGE(3)
EXCHANGE(4)
EXCHANGE(7)
EXCHANGE(8)
EXCHANGE(15)
EXCHANGE(16)
EXCHANGE(31)

#define SUM_IN_GROUPS(group)                                                    \
  PRIMITIVE(sum_in_groups_##group) {                                            \
    const float x = bit_cast<float>(in[threadIdx.x]);                           \
    const float sum = wave_sum_in_groups<group>(x, static_cast<int>(argument)); \
    out[threadIdx.x] = bit_cast<uint32_t>(sum);                                 \
  }
SUM_IN_GROUPS(8)
SUM_IN_GROUPS(16)
SUM_IN_GROUPS(32)

PRIMITIVE(wave_index) { out[threadIdx.x] = in[uniform_wave_idx()]; }

PRIMITIVE(sum_of_anew) {
  uint32_t sum = in[threadIdx.x];
  for (uint32_t i = 0; i < argument; ++i) sum += anew(static_cast<int>(argument));
  out[threadIdx.x] = sum;
}

PRIMITIVE(prefix_over_workgroup) {
  __shared__ alignas(16) uint32_t lds_totals[kMaxWavesPerBlock];
  const WavePrefix own = wave_prefix_sum(in[threadIdx.x]);
  post_total(lds_totals, own);
  __syncthreads();
  const WavePrefix all = over_workgroup(lds_totals, static_cast<int>(argument), own);
  out[threadIdx.x] = all.below;
  out[threadIdx.x + blockDim.x] = all.total;
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
