// The checked launcher of topk_routing.
#include "rule_launch.h"
#include "topk_routing.h"
#include "topk_routing_api.h"

namespace aiter {
namespace {

void check(const TopkRoutingArgs& args) {
  check_rank(args.topk_weights, 2);
  const RuleShape shape =
      check_rule(args.rule, args.correction_bias, args.gating_output, args.topk_weights.shape[1]);
  const int64_t num_slots = shape.topk + args.rule.num_shared_experts;
  for (const TensorView* t : {&args.topk_weights, &args.topk_ids}) {
    check_dtype(*t, {t == &args.topk_weights ? DType::f32 : DType::i32});
    check_shape(*t, {args.gating_output.shape[0], num_slots});
    check_rows(*t);
  }
  const TensorView* bias = args.correction_bias ? &*args.correction_bias : nullptr;
  const CountsTensors counts = check_counts(args.counts, args.gating_output.shape[0]);
  check_same_device({&args.gating_output, &args.topk_weights, &args.topk_ids, bias,
                     counts.workspace, counts.moe_buf, counts.num_local_tokens});
  check_no_overlap({&args.topk_weights, &args.topk_ids, counts.workspace, counts.moe_buf},
                   {&args.gating_output, bias, counts.num_local_tokens});
}

}  // namespace

void topk_routing(const TopkRoutingArgs& args, void* stream) {
  check(args);
  const TensorView& gating = args.gating_output;
  if (gating.shape[0] == 0) return;
  const DeviceGuard guard(gating.device_index);
  const DeviceLimits limits = device_limits(gating.device_index);
  TopkRoutingParams params;
  params.rule = row_rule(args.rule, args.correction_bias, gating, args.topk_weights.shape[1]);
  const RowChoice rows = rule_row_choice(params.rule, gating, limits.wave_size);
  const int num_tokens = static_cast<int>(gating.shape[0]);
  params.topk_weights = static_cast<float*>(args.topk_weights.data);
  params.weights_stride = args.topk_weights.stride[0];
  params.topk_ids = static_cast<int32_t*>(args.topk_ids.data);
  params.ids_stride = args.topk_ids.stride[0];
  const int num_slots = static_cast<int>(args.topk_weights.shape[1]);
  const SelectLaunch select = select_launch(gating, num_slots, rows, args.counts, limits);
  params.block = select.block;
  dispatch_rule_rows(params.rule, [&](auto tag) {
    launch(topk_routing_kernel<typename decltype(tag)::type>, limits, select.shape,
           static_cast<hipStream_t>(stream), static_cast<const unsigned char*>(gating.data),
           rows.row_stride, num_tokens, params);
  });
}

}  // namespace aiter
