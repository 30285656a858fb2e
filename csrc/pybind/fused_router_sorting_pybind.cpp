#include <array>

#include "fused_router_sorting_api.h"
#include "known_calls.h"
#include "pybind_args.h"
#include "pybind_routing.h"
#include "pybind_rule.h"
#include "target.h"

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

// Of fused_router_sorting_into.
struct Kind {
  using Launch = aiter::RouterLaunch;
  static constexpr size_t kNumPlain = aiter::kNumRoutingFields + 1;  // and batch_invariant
  static constexpr int kNumTensors = aiter::kNumRouterTensors;
  static constexpr int kNumOutputs = aiter::kNumRouterOutputs;
  static constexpr int kNumGroups = 2;  // the sorted buffers, the logits
};

aiter::KnownCalls<Kind>& known_calls() {
  // NOTE: kept for the life of the process; it holds Python objects and would outlive the interpreter.
  static auto& calls = *new aiter::KnownCalls<Kind>;
  return calls;
}

// As fused_topk_moe_sorting_into, from hidden states: all in one launch or, with every argument checked, the
// product alone, behind which the caller routes its logits.
//
// Arguments: routing, hidden_states, router_weight, router_bias, expert_mask, num_local_tokens,
// correction_bias, topk_out, out, logits, expected, layouts, logits_layouts, in_one. `routing` is a Request
// and batch_invariant behind it.
py::object fused_router_sorting_into(const std::array<py::handle, 14>& arguments) {
  const auto [routing, hidden_states, router_weight, router_bias, expert_mask, num_local_tokens,
              correction_bias, topk_out, out, logits, expected, layouts, logits_layouts, in_one] =
      arguments;
  const uint64_t generation = known_calls().generation();
  const auto fields = aiter::routing_fields<Kind::kNumPlain>(routing);
  aiter::FusedRouterSortingArgs args{};
  if (!aiter::read_outputs(out, expected, args.routing.sort)) return py::bool_(false);
  args.router = router_args(hidden_states, router_weight, router_bias);
  args.routing.gating_output = aiter::tensor_arg(logits, "logits_out");
  args.routing.cluster_size = args.routing.handover_size = 1;
  aiter::set_options(fields, expert_mask, num_local_tokens, correction_bias, topk_out,
                     args.routing);
  void* stream = aiter::current_stream(hidden_states, args.router.hidden_states);
  aiter::check_layouts(layouts, aiter::kNumSortedBuffers);
  aiter::check_layouts(logits_layouts, 1);
  auto launch = aiter::prepare_router_launch(args, aiter::bool_arg(in_one, "in_one"));
  {
    const aiter::ReleaseGilOnCpu release(args.router.hidden_states);
    aiter::make_router_launch(*launch, stream);
  }
  known_calls().remember(generation, aiter::tensors_of(args), hidden_states,
                         py::reinterpret_borrow<py::tuple>(routing), {layouts, logits_layouts},
                         std::move(launch));
  return py::bool_(true);
}

// The launch of a call like one that fused_router_sorting_into remembers: returns the sorted buffers, `out`
// itself or new ones, and the logits, if they are still to be routed, else None. None: there is none,
// nothing was launched.
//
// Arguments: routing, hidden_states, router_weight, router_bias, expert_mask, num_local_tokens,
// correction_bias, topk_out, out, logits_out.
py::object fused_router_sorting_again(const std::array<py::handle, 10>& arguments) {
  const auto [routing, hidden_states, router_weight, router_bias, expert_mask, num_local_tokens,
              correction_bias, topk_out, out, logits_out] = arguments;
  const auto fields = aiter::routing_fields<Kind::kNumPlain>(routing);
  const uint32_t allocated = (out.is_none() ? 1u : 0u) | (logits_out.is_none() ? 2u : 0u);
  const auto key = aiter::CallKey<Kind::kNumPlain>::of(fields, allocated);
  if (!key) return py::none();
  aiter::RouterMemory memory;
  const auto call = known_calls().find(
      *key,
      {hidden_states, router_weight, router_bias, expert_mask, num_local_tokens, correction_bias},
      memory);
  if (call == nullptr) return py::none();
  for (const py::handle input : {hidden_states, router_weight, router_bias, correction_bias}) {
    if (!input.is_none() && aiter::is_negated(input)) return py::none();
  }
  const aiter::KnownTensor& hidden = call->tensors[aiter::kHiddenStates];
  const auto given_or_new = [&](py::handle given, int group) {
    return given.is_none() ? aiter::allocate(call->layouts[group], hidden.device_index)
                           : py::reinterpret_borrow<py::object>(given);
  };
  const auto outputs = given_or_new(out, 0);
  auto logits = given_or_new(logits_out, 1);
  if (logits_out.is_none() && !logits.is_none()) {
    logits = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(logits.ptr(), 0));
  }
  if (!call->takes(outputs, 0, aiter::kNumSortedBuffers, memory) ||
      !call->takes(topk_out, aiter::kTopkWeights, aiter::kRouterLogits, memory) ||
      !call->tensors[aiter::kRouterLogits].is(logits, memory[aiter::kRouterLogits]) ||
      call->overlaps(memory)) {
    return py::none();
  }
  if constexpr (aiter::kTargetIsGpu) {
    aiter::make_router_launch(
        *call->launch, memory,
        aiter::current_gpu_stream(hidden_states, hidden.device_type, hidden.device_index));
  } else {
    const py::gil_scoped_release release;
    aiter::make_router_launch(*call->launch, memory, nullptr);
  }
  return py::make_tuple(outputs, aiter::is_in_one(*call->launch) ? py::none() : logits);
}

}  // namespace

PYBIND11_MODULE(module_fused_router_sorting, m) {
  def_launch(m, "fused_router_sorting_fwd", aiter::fused_router_sorting_fwd);
  def_launch(m, "fused_router_sorting_check", [](const aiter::FusedRouterSortingArgs& args, void*) {
    aiter::fused_router_sorting_check(args);
  });
  aiter::def_positional<&fused_router_sorting_into>(m, "fused_router_sorting_into");
  aiter::def_positional<&fused_router_sorting_again>(m, "fused_router_sorting_again");
  m.def("fused_router_sorting_forget", [] { known_calls().forget(); });
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
