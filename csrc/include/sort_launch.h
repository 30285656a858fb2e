// From checked arguments to kernel parameters: the launchers' shared second step.
#pragma once

#include <algorithm>
#include <type_traits>

#include "expert_sort.h"
#include "routing_checks.h"
#include "row_topk.h"

namespace aiter {

inline SortShape sort_shape(int64_t num_tokens, int64_t num_experts, int64_t topk,
                            int64_t unit_size, const SortTensors& t) {
  const auto on_boundary = [](const TensorView& view) {
    return reinterpret_cast<uintptr_t>(view.data) % sizeof(FourWords) == 0;
  };
  return {static_cast<int>(num_tokens),
          static_cast<int>(num_experts),
          static_cast<int>(topk),
          static_cast<int>(unit_size),
          Divisor::of(static_cast<uint32_t>(topk)),
          Divisor::of(static_cast<uint32_t>(unit_size)),
          unit_size % 4 == 0 && on_boundary(t.sorted_ids) && on_boundary(t.sorted_weights)};
}

inline SortParams sort_params(const SortTensors& t) {
  const auto i32 = [](const TensorView* view) {
    return view == nullptr ? nullptr : static_cast<int32_t*>(view->data);
  };
  return {i32(&t.sorted_ids),
          static_cast<float*>(t.sorted_weights.data),
          i32(&t.sorted_expert_ids),
          i32(&t.num_valid_ids),
          static_cast<unsigned char*>(t.moe_buf.data),
          static_cast<uint64_t>(t.moe_buf.shape[1]) * t.moe_buf.itemsize,
          i32(t.expert_mask_or_null()),
          i32(t.num_local_tokens_or_null())};
}

// One workgroup zeroes this many bytes, until there are as many workgroups as compute units.
constexpr uint64_t kZeroBytesPerBlock = 32 * 1024;

// Workgroups beside the sorting ones that zero `num_bytes` of moe_buf.
inline unsigned zeroing_blocks(uint64_t num_bytes, const DeviceLimits& limits) {
  const uint64_t wanted = (num_bytes + kZeroBytesPerBlock - 1) / kZeroBytesPerBlock;
  return static_cast<unsigned>(
      std::min<uint64_t>(wanted, std::max(1, limits.num_compute_units - 1)));
}

// Calls f(T{}, values) with the logit type and, as a compile-time constant, what row_values() said.
template <typename F>
void dispatch_row(DType dtype, int values, F f) {
  const auto with_values = [&](auto logit) {
    static_assert(kMaxRowValues == 32, "one case per power of two");
    switch (values) {
      case 2:
        return f(logit, std::integral_constant<int, 2>{});
      case 4:
        return f(logit, std::integral_constant<int, 4>{});
      case 8:
        return f(logit, std::integral_constant<int, 8>{});
      case 16:
        return f(logit, std::integral_constant<int, 16>{});
      case 32:
        return f(logit, std::integral_constant<int, 32>{});
      default:
        return f(logit, std::integral_constant<int, 0>{});
    }
  };
  switch (dtype) {
    case DType::f32:
      return with_values(float{});
    case DType::f16:
      return with_values(F16{});
    default:
      return with_values(Bf16{});
  }
}

}  // namespace aiter
