// wave.h on the execution layer: every operation is one collective, combined by its last lane.
#pragma once

namespace aiter {

#define AITER_CALL_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define AITER_SITE_OF(operation) (hip_cpu::Site{operation, file, line})

namespace wave_cpu {

template <typename T>
void combine_max(hip_cpu::Wave& wave, unsigned parity, hip_cpu::LaneMask lanes) {
  T best = 0;
  for (int l = 0; l < kWaveSize; ++l) {
    const T x = hip_cpu::from_word<T>(wave.slot[parity][l]);
    if ((lanes >> l & 1) && x > best) best = x;
  }
  wave.result[parity] = hip_cpu::to_word(best);
}

inline void combine_sum_by_halves(hip_cpu::Wave& wave, unsigned parity, hip_cpu::LaneMask lanes) {
  float x[kWaveSize];
  for (int l = 0; l < kWaveSize; ++l) {
    x[l] = (lanes >> l & 1) ? hip_cpu::from_word<float>(wave.slot[parity][l]) : 0.0f;
  }
  for (int half = kWaveSize / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) x[l] += x[l + half];
  }
  wave.result[parity] = hip_cpu::to_word(x[0]);
}

inline void combine_inclusive_sum(hip_cpu::Wave& wave, unsigned parity, hip_cpu::LaneMask lanes) {
  uint32_t sum = 0;
  for (int l = 0; l < kWaveSize; ++l) {
    if (lanes >> l & 1) sum += hip_cpu::from_word<uint32_t>(wave.slot[parity][l]);
    wave.slot[parity][l] = sum;
  }
}

inline void combine_ballot(hip_cpu::Wave& wave, unsigned parity, hip_cpu::LaneMask lanes) {
  uint64_t set = 0;
  for (int l = 0; l < kWaveSize; ++l) {
    if ((lanes >> l & 1) && wave.slot[parity][l] != 0) set |= uint64_t{1} << l;
  }
  wave.result[parity] = set;
}

inline void combine_sync(hip_cpu::Wave& wave, unsigned, hip_cpu::LaneMask) { ++wave.syncs; }

template <typename T>
inline T read_slot(unsigned parity, int lane, const hip_cpu::Site& site) {
  const hip_cpu::Wave& wave = *hip_cpu::current_lane->wave;
  if (!(wave.participants[parity] >> lane & 1)) hip_cpu::fail(site, "reads a lane that has left");
  return hip_cpu::from_word<T>(wave.slot[parity][lane]);
}

}  // namespace wave_cpu

template <typename T>
inline T wave_max(T x, AITER_CALL_SITE) {
  const unsigned parity =
      hip_cpu::collective(hip_cpu::to_word(x), wave_cpu::combine_max<T>, AITER_SITE_OF("wave_max"));
  return hip_cpu::from_word<T>(hip_cpu::current_lane->wave->result[parity]);
}

inline float wave_sum_by_halves(float x, AITER_CALL_SITE) {
  const unsigned parity = hip_cpu::collective(hip_cpu::to_word(x), wave_cpu::combine_sum_by_halves,
                                              AITER_SITE_OF("wave_sum_by_halves"));
  return hip_cpu::from_word<float>(hip_cpu::current_lane->wave->result[parity]);
}

inline float wave_sum_in_order(float x, int count, float init, AITER_CALL_SITE) {
  const hip_cpu::Site site = AITER_SITE_OF("wave_sum_in_order");
  const unsigned parity = hip_cpu::collective(hip_cpu::to_word(x), nullptr, site);
  for (int l = 0; l < count; ++l) init += wave_cpu::read_slot<float>(parity, l, site);
  return init;
}

inline uint32_t wave_inclusive_sum(uint32_t x, AITER_CALL_SITE) {
  const unsigned parity = hip_cpu::collective(hip_cpu::to_word(x), wave_cpu::combine_inclusive_sum,
                                              AITER_SITE_OF("wave_inclusive_sum"));
  const hip_cpu::Lane& lane = *hip_cpu::current_lane;
  return hip_cpu::from_word<uint32_t>(lane.wave->slot[parity][lane.index]);
}

inline WaveMask wave_ballot(bool flag, AITER_CALL_SITE) {
  const unsigned parity = hip_cpu::collective(hip_cpu::to_word(flag), wave_cpu::combine_ballot,
                                              AITER_SITE_OF("wave_ballot"));
  return static_cast<WaveMask>(hip_cpu::current_lane->wave->result[parity]);
}

inline int lowest_lane(WaveMask lanes) { return __builtin_ctzll(lanes); }

inline WavePrefix wave_rank(bool flag, AITER_CALL_SITE) {
  const uint64_t set = wave_ballot(flag, file, line);
  const uint64_t below = set & ((uint64_t{1} << lane_idx()) - 1);
  return {static_cast<uint32_t>(__builtin_popcountll(below)),
          static_cast<uint32_t>(__builtin_popcountll(set))};
}

template <typename T>
inline T wave_read_lane(T x, int lane, AITER_CALL_SITE) {
  const hip_cpu::Site site = AITER_SITE_OF("wave_read_lane");
  const unsigned parity = hip_cpu::collective(hip_cpu::to_word(x), nullptr, site);
  return wave_cpu::read_slot<T>(parity, lane, site);
}

template <int kDistance>
inline uint32_t wave_swap(uint32_t x, AITER_CALL_SITE) {
  const hip_cpu::Site site = AITER_SITE_OF("wave_swap");
  const unsigned parity = hip_cpu::collective(hip_cpu::to_word(x), nullptr, site);
  const int first = (lane_idx() ^ kDistance) / kDistance * kDistance;
  const uint32_t theirs = wave_cpu::read_slot<uint32_t>(parity, first, site);
  for (int l = first + 1; l < first + kDistance; ++l) {
    if (wave_cpu::read_slot<uint32_t>(parity, l, site) != theirs) {
      hip_cpu::fail(site, "reads a group of lanes that do not hold the same");
    }
  }
  return theirs;
}

template <int kMask>
inline uint32_t wave_exchange(uint32_t x, AITER_CALL_SITE) {
  const hip_cpu::Site site = AITER_SITE_OF("wave_exchange");
  const unsigned parity = hip_cpu::collective(hip_cpu::to_word(x), nullptr, site);
  return wave_cpu::read_slot<uint32_t>(parity, lane_idx() ^ kMask, site);
}

inline void wave_sync(AITER_CALL_SITE) {
  hip_cpu::collective(0, wave_cpu::combine_sync, AITER_SITE_OF("wave_sync"));
}

inline int highest_bit(uint32_t x) { return 31 - __builtin_clz(x); }

template <int kGroup>
inline float wave_sum_in_groups(float x, int count, AITER_CALL_SITE) {
  const hip_cpu::Site site = AITER_SITE_OF("wave_sum_in_groups");
  const unsigned parity = hip_cpu::collective(hip_cpu::to_word(x), nullptr, site);
  const int first = lane_idx() / kGroup * kGroup;
  if (lane_idx() - first >= count) return __builtin_nanf("");
  float sum = 0.0f;
  for (int l = 0; l < count; ++l) sum += wave_cpu::read_slot<float>(parity, first + l, site);
  return sum;
}

#undef AITER_CALL_SITE
#undef AITER_SITE_OF

template <typename T>
inline void drop(T&) {}

inline int anew(int x) { return x; }

inline uint32_t awaited(uint32_t x) { return x; }

inline int32_t scalar_load(const int32_t* address) { return *address; }

inline int workgroup_threads(int argument) { return argument; }

template <typename T>
inline const T& loaded_anew(const T& argument, size_t) {
  return argument;
}

}  // namespace aiter
