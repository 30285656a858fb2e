#include "fused_router_sorting_api.h"
#include "pybind_args.h"
#include "pybind_rule.h"

namespace py = pybind11;

namespace {

aiter::RouterTensors router_args(py::handle hidden_states, py::handle router_weight,
                                 py::handle router_bias) {
  return {aiter::input_arg(hidden_states, "hidden_states"),
          aiter::input_arg(router_weight, "router_weight"),
          aiter::optional_input_arg(router_bias, "router_bias")};
}

// Defines a function of everything that a launch takes, which `run` gets.
template <typename Run>
void def_launch(py::module_& m, const char* name, Run run) {
  m.def(
      name,
      [run](py::handle hidden_states, py::handle router_weight, py::handle logits_out,
            py::handle sorted_ids, py::handle sorted_weights, py::handle sorted_expert_ids,
            py::handle num_valid_ids, py::handle moe_buf, py::handle num_experts, py::handle topk,
            py::handle unit_size, py::handle router_bias, py::handle rule,
            py::handle correction_bias, py::handle local_expert_mask, py::handle num_local_tokens,
            py::handle topk_out, py::handle id_format, py::handle num_workgroups) {
        aiter::FusedRouterSortingArgs args{
            router_args(hidden_states, router_weight, router_bias),
            {aiter::tensor_arg(logits_out, "logits_out"),
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
             true,
             1,
             1,
             {},
             {},
             {},
             {},
             aiter::is_flat(id_format)},
            {}};
        if (!num_workgroups.is_none()) {
          args.num_workgroups = aiter::int_arg(num_workgroups, "num_workgroups");
        }
        aiter::set_rule(rule, correction_bias, args.routing);
        aiter::set_topk_out(topk_out, args.routing);
        void* stream = aiter::current_stream(hidden_states, args.router.hidden_states);
        const aiter::ReleaseGilOnCpu release(args.router.hidden_states);
        run(args, stream);
      },
      py::arg("hidden_states"), py::arg("router_weight"), py::arg("logits_out"),
      py::arg("sorted_ids"), py::arg("sorted_weights"), py::arg("sorted_expert_ids"),
      py::arg("num_valid_ids"), py::arg("moe_buf"), py::arg("num_experts"), py::arg("topk"),
      py::arg("unit_size"), py::kw_only(), py::arg("router_bias") = py::none(),
      py::arg("rule") = py::none(), py::arg("correction_bias") = py::none(),
      py::arg("local_expert_mask") = py::none(), py::arg("num_local_tokens") = py::none(),
      py::arg("topk_out") = py::none(), py::arg("id_format") = "slot",
      py::arg("num_workgroups") = py::none());
}

}  // namespace

PYBIND11_MODULE(module_fused_router_sorting, m) {
  def_launch(m, "fused_router_sorting_fwd", aiter::fused_router_sorting_fwd);
  def_launch(m, "fused_router_sorting_check", [](const aiter::FusedRouterSortingArgs& args, void*) {
    aiter::fused_router_sorting_check(args);
  });
  m.def(
      "router_product",
      [](py::handle hidden_states, py::handle router_weight, py::handle logits_out,
         py::handle router_bias) {
        const aiter::RouterTensors router = router_args(hidden_states, router_weight, router_bias);
        const aiter::TensorView logits = aiter::tensor_arg(logits_out, "logits_out");
        void* stream = aiter::current_stream(hidden_states, router.hidden_states);
        const aiter::ReleaseGilOnCpu release(router.hidden_states);
        aiter::router_product(router, logits, stream);
      },
      py::arg("hidden_states"), py::arg("router_weight"), py::arg("logits_out"), py::kw_only(),
      py::arg("router_bias") = py::none());
  m.def(
      "fused_router_sorting_max_tokens",
      [](py::handle num_experts, py::handle topk, int device_index) {
        return aiter::fused_router_sorting_max_tokens(aiter::int_arg(num_experts, "num_experts"),
                                                      aiter::int_arg(topk, "topk"), device_index);
      },
      py::arg("num_experts"), py::arg("topk"), py::arg("device_index"));
}
