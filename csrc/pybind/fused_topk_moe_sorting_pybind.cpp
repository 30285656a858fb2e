#include <array>

#include "fused_topk_moe_sorting_api.h"
#include "known_calls.h"
#include "pybind_args.h"
#include "pybind_routing.h"
#include "pybind_rule.h"
#include "target.h"

namespace py = pybind11;

namespace {

// Of fused_topk_moe_sorting_into.
struct Kind {
  using Launch = aiter::FusedLaunch;
  static constexpr size_t kNumPlain = aiter::kNumRoutingFields;
  static constexpr int kNumTensors = aiter::kNumFusedTensors;
  static constexpr int kNumOutputs = aiter::kNumFusedOutputs;
  static constexpr int kNumGroups = 1;
};

aiter::KnownCalls<Kind>& known_calls() {
  // NOTE: kept for the life of the process; it holds Python objects and would outlive the interpreter.
  static auto& calls = *new aiter::KnownCalls<Kind>;
  return calls;
}

// As fused_topk_moe_sorting_fwd, into outputs of exactly the expected sizes. False: nothing was
// launched, as they are not plainly that, and the caller is to find out what they are.
//
// Arguments: routing, gating_output, expert_mask, num_local_tokens, correction_bias, topk_out, out,
// expected, layouts. fused_topk_moe_sorting_again is to know the call from then on; `layouts`, if not None,
// is the aiter.routing.buffers.Layouts that `out` was allocated by for this call.
py::object fused_topk_moe_sorting_into(const std::array<py::handle, 9>& arguments) {
  const auto [routing, gating_output, expert_mask, num_local_tokens, correction_bias, topk_out, out,
              expected, layouts] = arguments;
  const uint64_t generation = known_calls().generation();
  const auto fields = aiter::routing_fields<Kind::kNumPlain>(routing);
  aiter::FusedTopkMoeSortingArgs args{};
  if (!aiter::read_outputs(out, expected, args.sort)) return py::bool_(false);
  args.gating_output = aiter::input_arg(gating_output, "gating_output");
  aiter::set_options(fields, expert_mask, num_local_tokens, correction_bias, topk_out, args);
  void* stream = aiter::current_stream(gating_output, args.gating_output);
  aiter::check_layouts(layouts, aiter::kNumSortedBuffers);
  auto launch = aiter::prepare_fused_launch(args);
  {
    const aiter::ReleaseGilOnCpu release(args.gating_output);
    aiter::make_fused_launch(*launch, stream);
  }
  known_calls().remember(generation, aiter::tensors_of(args), gating_output,
                         py::reinterpret_borrow<py::tuple>(routing), {layouts}, std::move(launch));
  return py::bool_(true);
}

// The launch of a call like one that fused_topk_moe_sorting_into remembers: returns the outputs, `out`
// itself or new ones. None: there is none, nothing was launched.
//
// Arguments: routing, gating_output, expert_mask, num_local_tokens, correction_bias, topk_out, out.
py::object fused_topk_moe_sorting_again(const std::array<py::handle, 7>& arguments) {
  const auto [routing, gating_output, expert_mask, num_local_tokens, correction_bias, topk_out,
              out] = arguments;
  const auto fields = aiter::routing_fields<Kind::kNumPlain>(routing);
  const auto key = aiter::CallKey<Kind::kNumPlain>::of(fields, out.is_none());
  if (!key) return py::none();
  aiter::FusedMemory memory;
  const auto call = known_calls().find(
      *key, {gating_output, expert_mask, num_local_tokens, correction_bias}, memory);
  if (call == nullptr || aiter::is_negated(gating_output)) return py::none();
  if (!correction_bias.is_none() && aiter::is_negated(correction_bias)) return py::none();
  const aiter::KnownTensor& gating = call->tensors[aiter::kGatingOutput];
  const auto outputs = out.is_none() ? aiter::allocate(call->layouts[0], gating.device_index)
                                     : py::reinterpret_borrow<py::object>(out);
  if (!call->takes(outputs, 0, aiter::kNumSortedBuffers, memory) ||
      !call->takes(topk_out, aiter::kTopkWeights, aiter::kNumFusedOutputs, memory) ||
      call->overlaps(memory)) {
    return py::none();
  }
  if constexpr (aiter::kTargetIsGpu) {
    aiter::make_fused_launch(
        *call->launch, memory,
        aiter::current_gpu_stream(gating_output, gating.device_type, gating.device_index));
  } else {
    const py::gil_scoped_release release;
    aiter::make_fused_launch(*call->launch, memory, nullptr);
  }
  return outputs;
}

}  // namespace

PYBIND11_MODULE(module_fused_topk_moe_sorting, m) {
  m.def(
      "fused_topk_moe_sorting_fwd",
      [](py::handle gating_output, py::handle sorted_ids, py::handle sorted_weights,
         py::handle sorted_expert_ids, py::handle num_valid_ids, py::handle moe_buf,
         py::handle num_experts, py::handle topk, py::handle unit_size, py::handle need_renorm,
         py::handle local_expert_mask, py::handle num_local_tokens, py::handle cluster_size,
         py::handle handover_size, py::handle rule, py::handle correction_bias, py::handle topk_out,
         py::handle id_format) {
        aiter::FusedTopkMoeSortingArgs args{
            aiter::input_arg(gating_output, "gating_output"),
            {aiter::tensor_arg(sorted_ids, "sorted_ids"),
             aiter::tensor_arg(sorted_weights, "sorted_weights"),
             aiter::tensor_arg(sorted_expert_ids, "sorted_expert_ids"),
             aiter::tensor_arg(num_valid_ids, "num_valid_ids"),
             aiter::tensor_arg(moe_buf, "moe_buf"),
             aiter::optional_tensor_arg(local_expert_mask, "local_expert_mask"),
             aiter::optional_tensor_arg(num_local_tokens, "num_local_tokens")},
            aiter::int_arg(num_experts, "num_experts"),
            aiter::int_arg(topk, "topk"),
            aiter::int_arg(unit_size, "unit_size"),
            aiter::bool_arg(need_renorm, "need_renorm"),
            cluster_size.is_none() ? 0 : aiter::int_arg(cluster_size, "cluster_size"),
            handover_size.is_none() ? 0 : aiter::int_arg(handover_size, "handover_size"),
            {},
            {},
            {},
            {},
            aiter::is_flat(id_format)};
        const bool asked = args.need_renorm;
        aiter::set_rule(rule, correction_bias, args);
        if (args.need_renorm != asked) {
          aiter::fail_argument("need_renorm", "that of the rule", asked ? "True" : "False");
        }
        aiter::set_topk_out(topk_out, args);
        void* stream = aiter::current_stream(gating_output, args.gating_output);
        const aiter::ReleaseGilOnCpu release(args.gating_output);
        aiter::fused_topk_moe_sorting_fwd(args, stream);
      },
      py::arg("gating_output"), py::arg("sorted_ids"), py::arg("sorted_weights"),
      py::arg("sorted_expert_ids"), py::arg("num_valid_ids"), py::arg("moe_buf"),
      py::arg("num_experts"), py::arg("topk"), py::arg("unit_size"), py::arg("need_renorm"),
      py::kw_only(), py::arg("local_expert_mask") = py::none(),
      py::arg("num_local_tokens") = py::none(), py::arg("cluster_size") = py::none(),
      py::arg("handover_size") = py::none(), py::arg("rule") = py::none(),
      py::arg("correction_bias") = py::none(), py::arg("topk_out") = py::none(),
      py::arg("id_format") = "slot");
  aiter::def_positional<&fused_topk_moe_sorting_into>(m, "fused_topk_moe_sorting_into");
  aiter::def_positional<&fused_topk_moe_sorting_again>(m, "fused_topk_moe_sorting_again");
  m.def("fused_topk_moe_sorting_forget", [] { known_calls().forget(); });
  m.def(
      "fused_topk_moe_sorting_max_tokens",
      [](py::handle num_experts, py::handle topk, int device_index) {
        return aiter::fused_topk_moe_sorting_max_tokens(aiter::int_arg(num_experts, "num_experts"),
                                                        aiter::int_arg(topk, "topk"), device_index);
      },
      py::arg("num_experts"), py::arg("topk"), py::arg("device_index"));
}
