#include <array>

#include "fused_topk_moe_sorting_api.h"
#include "known_calls.h"
#include "pybind_args.h"
#include "pybind_rule.h"
#include "target.h"

namespace py = pybind11;

namespace {

// Reads `out` if it is a tuple of tensors of exactly the sizes in `expected`, an
// aiter.routing.buffers.Buffers.
bool read_outputs(py::handle out, py::handle expected, aiter::SortTensors& sort) {
  if (!aiter::is_tuple_of(aiter::kNumSortedBuffers, expected)) {
    throw py::type_error("expected: expected a tuple of 5, got " +
                         aiter::detail::type_name(expected));
  }
  if (!aiter::is_tuple_of(aiter::kNumSortedBuffers, out)) return false;
  const auto output = [&](int index) { return py::handle(PyTuple_GET_ITEM(out.ptr(), index)); };
  if (!aiter::read_exchanged(output(0), "sorted_ids", sort.sorted_ids) ||
      !aiter::read_exchanged(output(1), "sorted_weights", sort.sorted_weights) ||
      !aiter::read_exchanged(output(2), "sorted_expert_ids", sort.sorted_expert_ids) ||
      !aiter::read_exchanged(output(3), "num_valid_ids", sort.num_valid_ids) ||
      !aiter::read_exchanged(output(4), "moe_buf", sort.moe_buf)) {
    return false;
  }
  const auto size = [&](int index) {
    return aiter::int_arg(PyTuple_GET_ITEM(expected.ptr(), index), "expected");
  };
  const auto shape = py::cast<std::pair<int64_t, int64_t>>(PyTuple_GET_ITEM(expected.ptr(), 3));
  static PyObject* const dtype_name = PyUnicode_InternFromString("dtype");
  const auto dtype =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(output(4).ptr(), dtype_name));
  if (!dtype) throw py::error_already_set();
  return sort.sorted_ids.numel() == size(0) && sort.sorted_weights.numel() == size(1) &&
         sort.sorted_expert_ids.numel() == size(2) && sort.moe_buf.ndim == 2 &&
         sort.moe_buf.shape[0] == shape.first && sort.moe_buf.shape[1] == shape.second &&
         dtype.ptr() == PyTuple_GET_ITEM(expected.ptr(), 4);
}

// An aiter.routing.buffers.Layouts of five tensors.
void check_layouts(py::handle layouts) {
  using aiter::is_tuple_of;
  bool fits = is_tuple_of(2, layouts) &&
              is_tuple_of(aiter::kNumSortedBuffers, PyTuple_GET_ITEM(layouts.ptr(), 1));
  for (int i = 0; fits && i < aiter::kNumSortedBuffers; ++i) {
    fits = is_tuple_of(3, PyTuple_GET_ITEM(PyTuple_GET_ITEM(layouts.ptr(), 1), i));
  }
  if (!fits) {
    throw py::type_error("layouts: expected the Layouts of five tensors, got " +
                         std::string(py::repr(layouts)));
  }
}

aiter::KnownCalls& known_calls() {
  // NOTE: kept for the life of the process; it holds Python objects and would outlive the interpreter.
  static auto& calls = *new aiter::KnownCalls;
  return calls;
}

// What a call asks for beside its tensors, in the order of an aiter.routing.request.Request.
struct RoutingFields {
  py::handle topk, num_experts, model_dim, moebuf_dtype, rule, block_size, dispatch_policy,
      id_format, cpu_wave;

  static RoutingFields of(py::handle routing) {
    if (!aiter::is_tuple_of(aiter::CallKey::kNumPlain, routing)) {
      throw py::type_error("routing: expected a tuple of " +
                           std::to_string(aiter::CallKey::kNumPlain) + ", got " +
                           aiter::detail::type_name(routing));
    }
    const auto at = [&](int i) { return py::handle(PyTuple_GET_ITEM(routing.ptr(), i)); };
    return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
  }
  aiter::CallKey::Plain plain() const {
    return {topk,       num_experts,     model_dim, moebuf_dtype, rule,
            block_size, dispatch_policy, id_format, cpu_wave};
  }
};

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
  const RoutingFields fields = RoutingFields::of(routing);
  aiter::FusedTopkMoeSortingArgs args{};
  if (!read_outputs(out, expected, args.sort)) return py::bool_(false);
  args.gating_output = aiter::input_arg(gating_output, "gating_output");
  const auto views = aiter::tensors_of(args);
  for (int i = 0; i < aiter::kNumSortedBuffers; ++i) aiter::check_memory(*views[i]);
  args.sort.expert_mask = aiter::optional_tensor_arg(expert_mask, "local_expert_mask");
  args.sort.num_local_tokens = aiter::optional_tensor_arg(num_local_tokens, "num_local_tokens");
  aiter::set_topk_out(topk_out, args);
  args.num_experts = aiter::int_arg(fields.num_experts, "num_experts");
  args.topk = aiter::int_arg(fields.topk, "topk");
  args.unit_size = aiter::int_arg(fields.block_size, "unit_size");
  aiter::set_rule(fields.rule, correction_bias, args);
  args.flat_ids = aiter::is_flat(fields.id_format);
  void* stream = aiter::current_stream(gating_output, args.gating_output);
  if (!layouts.is_none()) check_layouts(layouts);
  auto launch = aiter::prepare_fused_launch(args);
  {
    const aiter::ReleaseGilOnCpu release(args.gating_output);
    aiter::make_fused_launch(*launch, stream);
  }
  known_calls().remember(generation, args, gating_output,
                         py::reinterpret_borrow<py::tuple>(routing), layouts, std::move(launch));
  return py::bool_(true);
}

// New outputs, as aiter.routing.buffers.allocate makes them; nothing where that takes another way than the
// quick allocator.
py::object allocate(const py::tuple& layouts, int device_index) {
  static const py::handle deterministic = aiter::kept_from_torch("_get_deterministic_algorithms");
  const auto fills = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(deterministic.ptr()));
  if (!fills) throw py::error_already_set();
  if (fills.ptr() != Py_False || !aiter::is_current_device(device_index)) return py::none();
  PyObject* const quick = PyTuple_GET_ITEM(layouts.ptr(), 0);
  PyObject* const tensors = PyTuple_GET_ITEM(layouts.ptr(), 1);
  py::tuple outputs(aiter::kNumSortedBuffers);
  for (int i = 0; i < aiter::kNumSortedBuffers; ++i) {
    PyObject* const layout = PyTuple_GET_ITEM(tensors, i);  // shape, strides, dtype
    PyObject* const output =
        PyObject_Vectorcall(quick, &PyTuple_GET_ITEM(layout, 0),
                            static_cast<size_t>(PyTuple_GET_SIZE(layout)), nullptr);
    if (output == nullptr) throw py::error_already_set();
    PyTuple_SET_ITEM(outputs.ptr(), i, output);
  }
  return outputs;
}

// The launch of a call like one that fused_topk_moe_sorting_into remembers: returns the outputs, `out`
// itself or new ones. None: there is none, nothing was launched.
//
// Arguments: routing, gating_output, expert_mask, num_local_tokens, correction_bias, topk_out, out.
py::object fused_topk_moe_sorting_again(const std::array<py::handle, 7>& arguments) {
  const auto [routing, gating_output, expert_mask, num_local_tokens, correction_bias, topk_out,
              out] = arguments;
  const auto key = aiter::CallKey::of(RoutingFields::of(routing).plain(), out.is_none());
  if (!key) return py::none();
  aiter::FusedMemory memory;
  const auto call = known_calls().find(*key, gating_output, expert_mask, num_local_tokens,
                                       correction_bias, memory);
  if (call == nullptr || aiter::is_negated(gating_output)) return py::none();
  if (!correction_bias.is_none() && aiter::is_negated(correction_bias)) return py::none();
  const aiter::KnownTensor& gating = call->tensors[aiter::kGatingOutput];
  const auto outputs = out.is_none() ? allocate(call->layouts, gating.device_index)
                                     : py::reinterpret_borrow<py::object>(out);
  if (!call->takes(outputs, topk_out, memory) || call->overlaps(memory)) return py::none();
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
