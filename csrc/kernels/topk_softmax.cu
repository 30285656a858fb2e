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
  const TensorView* sources = args.token_expert_indices ? &*args.token_expert_indices : nullptr;
  for (const TensorView* t : {&args.topk_weights, &args.topk_indices, sources}) {
    if (t == nullptr) continue;
    check_dtype(*t, {t == &args.topk_weights ? DType::f32 : DType::i32});
    check_shape(*t, {args.gating_output.shape[0], topk});
    check_contiguous(*t);
  }
  check_range("M*topk", args.topk_weights.numel(), 0, std::numeric_limits<int32_t>::max());
  const CountsTensors counts = check_counts(args.counts, args.gating_output.shape[0]);
  check_same_device({&args.topk_weights, &args.topk_indices, sources, &args.gating_output,
                     counts.workspace, counts.moe_buf, counts.num_local_tokens});
  check_no_overlap(
      {&args.topk_weights, &args.topk_indices, sources, counts.workspace, counts.moe_buf},
      {&args.gating_output, counts.num_local_tokens});
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
  const TopkSoftmaxOutputs outputs{
      static_cast<float*>(args.topk_weights.data), static_cast<int32_t*>(args.topk_indices.data),
      args.token_expert_indices ? static_cast<int32_t*>(args.token_expert_indices->data) : nullptr};
  const RowChoice rows = choose_rows(gating, num_experts, topk, args.need_renorm, limits.wave_size);
  const SelectLaunch select = select_launch(gating, topk, rows, args.counts, limits);
  dispatch_rows(gating.dtype, rows, [&](auto tag) {
    launch(topk_softmax_kernel<typename decltype(tag)::type>, limits, select.shape,
           static_cast<hipStream_t>(stream), gating.data, rows.row_stride, num_tokens, num_experts,
           topk, TopkSoftmaxFlags::of(args.need_renorm, rows.format), outputs, select.block);
  });
}

}  // namespace aiter
