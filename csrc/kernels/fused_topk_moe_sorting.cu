// The checked launcher of the fused launch.
#include <algorithm>

#include "fused_topk_moe_sorting.h"
#include "fused_topk_moe_sorting_api.h"
#include "sort_launch.h"

namespace aiter {
namespace {

int max_tokens(int num_experts, int topk, const DeviceLimits& limits) {
  const auto fits = [&](int num_tokens) {
    return fused_lds({num_tokens, num_experts, topk, 1}).total <=
           static_cast<size_t>(limits.lds_bytes);
  };
  int low = 0, high = limits.lds_bytes;  // a token takes more than one byte
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (fits(middle)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

FusedConfig choose_config(const SortShape& shape, uint64_t zero_bytes, const DeviceLimits& limits) {
  FusedConfig config;
  config.row_values = row_values(shape.num_experts, limits.wave_size);
  // A wave per row while there are waves; never fewer than a thread per expert would use well.
  const int max_waves =
      std::min(limits.max_threads_per_block, fused_max_threads(config.row_values)) /
      limits.wave_size;
  const int expert_waves = (shape.num_experts + limits.wave_size - 1) / limits.wave_size;
  const int num_waves = std::min(max_waves, std::max({4, shape.num_tokens, expert_waves}));
  config.num_threads = num_waves * limits.wave_size;
  config.num_blocks = 1 + zeroing_blocks(zero_bytes, limits);
  config.lds_bytes = fused_lds(shape).total;
  return config;
}

}  // namespace

int64_t fused_topk_moe_sorting_max_tokens(int64_t num_experts, int64_t topk, int device_index) {
  check_experts_and_topk(num_experts, topk);
  return max_tokens(static_cast<int>(num_experts), static_cast<int>(topk),
                    device_limits(device_index));
}

void fused_topk_moe_sorting_fwd(const FusedTopkMoeSortingArgs& args, void* stream) {
  check_experts_and_topk(args.num_experts, args.topk);
  check_gating(args.gating_output, args.num_experts);
  const int64_t num_tokens = args.gating_output.shape[0];
  check_sort_tensors(args.sort, num_tokens, args.num_experts, args.topk, args.unit_size);
  check_placement(args.sort, {&args.gating_output});

  const DeviceGuard guard(args.gating_output.device_index);
  const DeviceLimits limits = device_limits(args.gating_output.device_index);
  const SortShape shape = sort_shape(num_tokens, args.num_experts, args.topk, args.unit_size);
  const int most = max_tokens(shape.num_experts, shape.topk, limits);
  if (shape.num_tokens > most) {
    fail_argument("gating_output",
                  "at most " + std::to_string(most) + " rows, which is what fits in " +
                      std::to_string(limits.lds_bytes) + " bytes of LDS for num_experts " +
                      std::to_string(shape.num_experts) + " and topk " + std::to_string(shape.topk),
                  std::to_string(shape.num_tokens));
  }

  FusedParams params;
  params.gating = args.gating_output.data;
  params.row_stride = args.gating_output.stride[0];
  params.shape = shape;
  params.sort = sort_params(args.sort);
  params.need_renorm = args.need_renorm;
  const FusedConfig config = choose_config(shape, params.sort.row_bytes * shape.num_tokens, limits);
  dispatch_row(args.gating_output.dtype, config.row_values, [&](auto logit, auto values) {
    launch(fused_topk_moe_sorting_kernel<decltype(logit), values()>, config.num_blocks,
           config.num_threads, config.lds_bytes, static_cast<hipStream_t>(stream), params);
  });
}

}  // namespace aiter
