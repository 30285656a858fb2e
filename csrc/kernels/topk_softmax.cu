// The checked launcher of topk_softmax.
#include <limits>

#include "sort_launch.h"
#include "topk_softmax.h"
#include "topk_softmax_api.h"

namespace aiter {
namespace {

void check(const TopkSoftmaxArgs& args) {
  check_rank(args.gating_output, 2);
  check_gating(args.gating_output, args.gating_output.shape[1]);
  check_rank(args.topk_weights, 2);
  const int64_t topk = args.topk_weights.shape[1];
  check_experts_and_topk(args.gating_output.shape[1], topk);
  for (const TensorView* t : {&args.topk_weights, &args.topk_indices, &args.token_expert_indices}) {
    check_dtype(*t, {t == &args.topk_weights ? DType::f32 : DType::i32});
    check_shape(*t, {args.gating_output.shape[0], topk});
    check_contiguous(*t);
  }
  check_range("M*topk", args.topk_weights.numel(), 0, std::numeric_limits<int32_t>::max());
  check_same_device(
      {&args.gating_output, &args.topk_weights, &args.topk_indices, &args.token_expert_indices});
  check_no_overlap({&args.topk_weights, &args.topk_indices, &args.token_expert_indices},
                   {&args.gating_output});
}

}  // namespace

void topk_softmax(const TopkSoftmaxArgs& args, void* stream) {
  check(args);
  const TensorView& gating = args.gating_output;
  if (gating.shape[0] == 0) return;
  const DeviceGuard guard(gating.device_index);
  const DeviceLimits limits = device_limits(gating.device_index);
  const int num_tokens = static_cast<int>(gating.shape[0]);
  const int num_experts = static_cast<int>(gating.shape[1]);
  const int topk = static_cast<int>(args.topk_weights.shape[1]);
  const TopkSoftmaxOutputs outputs{static_cast<float*>(args.topk_weights.data),
                                   static_cast<int32_t*>(args.topk_indices.data),
                                   static_cast<int32_t*>(args.token_expert_indices.data)};
  const RowChoice rows = choose_rows(gating, num_experts, topk, args.need_renorm, limits.wave_size);
  const unsigned rows_per_block = kWavesPerBlock * rows.rows_per_wave;
  const unsigned num_blocks = (num_tokens + rows_per_block - 1) / rows_per_block;
  const unsigned num_threads = kWavesPerBlock * limits.wave_size;
  const size_t lds_bytes = kWavesPerBlock * rows.lds_bytes;
  dispatch_rows(gating.dtype, rows, [&](auto tag) {
    launch(topk_softmax_kernel<typename decltype(tag)::type>, limits,
           {num_blocks, num_threads, lds_bytes, 1, true}, static_cast<hipStream_t>(stream),
           gating.data, rows.row_stride, num_tokens, num_experts, topk,
           TopkSoftmaxFlags::of(args.need_renorm, rows.format), outputs);
  });
}

}  // namespace aiter
