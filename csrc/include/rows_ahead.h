// A wave's next rows, on their way from memory into LDS while it works on those before.
//
// A wave that takes one set of rows after the other waits for memory each time otherwise, and the longer the more is
// written meanwhile, as loads wait behind stores. On sm_90 bulk copies (cp.async.bulk) bring them, on the CPU a lane does;
// elsewhere rows are read where they are. H100, 2026-11-27, top-k with counts and zeroing of M = 65,536 rows, us, without and
// with two sets of rows on their way, for 128/4 D=2880, 256/8 D=7168, 512/10 D=4096, 896/16 D=3584:
//   bf16   131 -> 132   314 -> 314   224 -> 212   225 -> 208
//   f32    146 -> 138   335 -> 326   250 -> 233   273 -> 247
// Three sets bring 3 us more for 896/16 f32, and take a third of LDS more. Rejected: a hint that what is read and zeroed
// shall leave the L2 first (341 -> 343 for all of the chain by 256/8, 247 -> 244, 266 -> 263).
#pragma once

#include <cstdint>

#include "device/copies.h"
#include "row_topk.h"

namespace aiter {

// The rows in LDS: of every wave kSets sets, and behind them an inbox for each set.
struct AheadShape {
  static constexpr uint32_t kSets = 2;
  static constexpr uint32_t kBoundary = 128;

  uint32_t offset;     // in LDS, on the boundary
  uint32_t row_bytes;  // a multiple of 16; rows begin on 16-byte boundaries; 0: no row comes ahead
  uint32_t set_bytes;  // of a set of rows, a multiple of the boundary

  static uint32_t up_to_boundary(uint32_t num_bytes) {
    return (num_bytes + kBoundary - 1) / kBoundary * kBoundary;
  }
  uint32_t lds_bytes(int num_waves) const {
    return num_waves * kSets * (set_bytes + static_cast<uint32_t>(sizeof(Inbox)));
  }
};

// Of a wave that takes kRows rows at a time: begin(); then row() for each set, and advance() when it is done with.
template <int kRows>
class RowsAhead {
 public:
  // The sets begin at the rows `first`, first + step and so on up to `last`; rows behind that are `last`. Row r is
  // r * stride bytes behind `data`.
  __device__ __forceinline__ void begin(const void* data, int64_t stride, int first, int step,
                                        int last, const AheadShape& shape, char* lds, int wave,
                                        int num_waves) {
    shape_ = shape;
    if (!comes()) return;
    data_ = static_cast<const unsigned char*>(data);
    stride_ = stride;
    next_ = first;
    step_ = step;
    last_ = last;
    const uint32_t wave_bytes = AheadShape::kSets * shape.set_bytes;
    rows_ = lds + shape.offset + wave * wave_bytes;
    inboxes_ = reinterpret_cast<Inbox*>(lds + shape.offset + num_waves * wave_bytes) +
               wave * AheadShape::kSets;
    set_ = parity_ = 0;
    if (lane_idx() == 0) {
      for (uint32_t i = 0; i < AheadShape::kSets; ++i) open_inbox(inboxes_ + i);
    }
    wave_sync();
    for (uint32_t i = 0; i < AheadShape::kSets; ++i) ask(i);
  }

  // Loads the lane's row, which is `in_memory` and the one at Rows::row_in_wave() of the set.
  template <typename Rows>
  __device__ __forceinline__ void load(Rows& rows, const typename Rows::Item* in_memory,
                                       int num_experts, RowFormat format) const {
    // NOTE: not one call with either address, which loads as if it did not know what kind of memory it is in.
    if (!comes()) return rows.load(in_memory, num_experts, format);
    wait_for_copies(inboxes_ + set_, parity_);
    const char* const row =
        rows_ + set_ * shape_.set_bytes + Rows::row_in_wave() * shape_.row_bytes;
    format.wide = 1;
    rows.load(reinterpret_cast<const typename Rows::Item*>(row), num_experts, format);
  }

  __device__ __forceinline__ void advance() {
    if (!comes()) return;
    wave_sync();
    ask(set_);
    if (++set_ == AheadShape::kSets) {
      set_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  __device__ __forceinline__ bool comes() const { return kCopiesGoOn && shape_.row_bytes != 0; }

  __device__ __forceinline__ void ask(uint32_t set) {
    if (next_ <= last_) {
      const int lane = lane_idx();
      if (lane == 0) expect_bytes(inboxes_ + set, kRows * shape_.row_bytes);
      if (lane < kRows) {
        const int row = next_ + lane <= last_ ? next_ + lane : last_;
        copy_to_lds(rows_ + set * shape_.set_bytes + lane * shape_.row_bytes, data_ + row * stride_,
                    shape_.row_bytes, inboxes_ + set);
      }
    }
    next_ += step_;
  }

  AheadShape shape_;
  const unsigned char* data_;
  int64_t stride_;
  int next_, step_, last_;
  char* rows_;
  Inbox* inboxes_;
  uint32_t set_, parity_;
};

}  // namespace aiter
