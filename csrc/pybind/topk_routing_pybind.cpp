#include "pybind_counts.h"
#include "topk_routing_api.h"

namespace py = pybind11;

namespace {

void topk_routing(py::handle topk_weights, py::handle topk_ids, py::handle gating_output,
                  py::handle rule, py::handle correction_bias,
                  const std::optional<aiter::CountsArgs>& counts) {
  aiter::TopkRoutingArgs args{aiter::tensor_arg(topk_weights, "topk_weights"),
                              aiter::tensor_arg(topk_ids, "topk_ids"),
                              aiter::input_arg(gating_output, "gating_output"),
                              aiter::RoutingRule::plain(true),
                              aiter::optional_input_arg(correction_bias, "correction_bias"),
                              counts};
  if (!rule.is_none()) {
    const auto numbers = aiter::packed_arg<aiter::RoutingRule::kNumNumbers>(rule, "rule");
    args.rule = aiter::RoutingRule::of(numbers.data());
  }
  void* stream = aiter::current_stream(gating_output, args.gating_output);
  const aiter::ReleaseGilOnCpu release(args.gating_output);
  aiter::topk_routing(args, stream);
}

}  // namespace

PYBIND11_MODULE(module_topk_routing, m) {
  m.def(
      "topk_routing",
      [](py::handle topk_weights, py::handle topk_ids, py::handle gating_output, py::handle rule,
         py::handle correction_bias) {
        topk_routing(topk_weights, topk_ids, gating_output, rule, correction_bias, std::nullopt);
      },
      py::arg("topk_weights"), py::arg("topk_ids"), py::arg("gating_output"), py::kw_only(),
      py::arg("rule") = py::none(), py::arg("correction_bias") = py::none());
  m.def(
      "topk_routing_counting",
      [](py::handle topk_weights, py::handle topk_ids, py::handle gating_output, py::handle rule,
         py::handle correction_bias, py::handle workspace, py::handle moe_buf,
         py::handle num_experts, py::handle num_local_tokens) {
        topk_routing(topk_weights, topk_ids, gating_output, rule, correction_bias,
                     aiter::counts_arg(workspace, moe_buf, num_experts, num_local_tokens));
      },
      py::arg("topk_weights"), py::arg("topk_ids"), py::arg("gating_output"), py::arg("rule"),
      py::arg("correction_bias"), py::arg("workspace"), py::arg("moe_buf"), py::arg("num_experts"),
      py::arg("num_local_tokens"));
}
