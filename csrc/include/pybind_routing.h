// How the bindings of the fused launches take a routing call's options and outputs, for calls inside the
// package.
#pragma once

#include <array>
#include <string>
#include <utility>

#include "fused_topk_moe_sorting_api.h"
#include "pybind_args.h"
#include "pybind_rule.h"

namespace aiter {

// Reads `out` if it is a tuple of tensors of exactly the sizes in `expected`, an
// aiter.routing.buffers.Buffers.
inline bool read_outputs(py::handle out, py::handle expected, SortTensors& sort) {
  if (!is_tuple_of(kNumSortedBuffers, expected)) {
    throw py::type_error("expected: expected a tuple of 5, got " + detail::type_name(expected));
  }
  if (!is_tuple_of(kNumSortedBuffers, out)) return false;
  const auto output = [&](int index) { return py::handle(PyTuple_GET_ITEM(out.ptr(), index)); };
  if (!read_exchanged(output(0), "sorted_ids", sort.sorted_ids) ||
      !read_exchanged(output(1), "sorted_weights", sort.sorted_weights) ||
      !read_exchanged(output(2), "sorted_expert_ids", sort.sorted_expert_ids) ||
      !read_exchanged(output(3), "num_valid_ids", sort.num_valid_ids) ||
      !read_exchanged(output(4), "moe_buf", sort.moe_buf)) {
    return false;
  }
  const auto size = [&](int index) {
    return int_arg(PyTuple_GET_ITEM(expected.ptr(), index), "expected");
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

// An aiter.routing.buffers.Layouts of `count` tensors, or None.
inline void check_layouts(py::handle layouts, int count) {
  if (layouts.is_none()) return;
  bool fits = is_tuple_of(2, layouts) && is_tuple_of(count, PyTuple_GET_ITEM(layouts.ptr(), 1));
  for (int i = 0; fits && i < count; ++i) {
    fits = is_tuple_of(3, PyTuple_GET_ITEM(PyTuple_GET_ITEM(layouts.ptr(), 1), i));
  }
  if (!fits) {
    throw py::type_error("layouts: expected the Layouts of " + std::to_string(count) +
                         " tensors, got " + std::string(py::repr(layouts)));
  }
}

// What a call asks for beside its tensors: an aiter.routing.request.Request, in its order.
enum RoutingField {
  kTopkField,
  kNumExpertsField,
  kModelDimField,
  kMoeBufDtypeField,
  kRuleField,
  kBlockSizeField,
  kDispatchPolicyField,
  kIdFormatField,
  kCpuWaveField
};
constexpr size_t kNumRoutingFields = kCpuWaveField + 1;

// These, and what an op asks for behind them.
template <size_t kCount>
std::array<py::handle, kCount> routing_fields(py::handle routing) {
  if (!is_tuple_of(kCount, routing)) {
    throw py::type_error("routing: expected a tuple of " + std::to_string(kCount) + ", got " +
                         detail::type_name(routing));
  }
  std::array<py::handle, kCount> fields;
  for (size_t i = 0; i < kCount; ++i) fields[i] = PyTuple_GET_ITEM(routing.ptr(), i);
  return fields;
}

// Reads what a call asks for, whose outputs but for `topk_out` were read.
template <size_t kCount>
void set_options(const std::array<py::handle, kCount>& fields, py::handle expert_mask,
                 py::handle num_local_tokens, py::handle correction_bias, py::handle topk_out,
                 FusedTopkMoeSortingArgs& args) {
  const auto views = tensors_of(args);
  for (int i = 0; i < kNumSortedBuffers; ++i) check_memory(*views[i]);
  args.sort.expert_mask = optional_tensor_arg(expert_mask, "local_expert_mask");
  args.sort.num_local_tokens = optional_tensor_arg(num_local_tokens, "num_local_tokens");
  set_topk_out(topk_out, args);
  args.num_experts = int_arg(fields[kNumExpertsField], "num_experts");
  args.topk = int_arg(fields[kTopkField], "topk");
  args.unit_size = int_arg(fields[kBlockSizeField], "unit_size");
  set_rule(fields[kRuleField], correction_bias, args);
  args.flat_ids = is_flat(fields[kIdFormatField]);
}

// New outputs, as aiter.routing.buffers.allocate makes them; nothing where that takes another way than the
// quick allocator.
inline py::object allocate(py::handle layouts, int device_index) {
  static const py::handle deterministic = kept_from_torch("_get_deterministic_algorithms");
  const auto fills = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(deterministic.ptr()));
  if (!fills) throw py::error_already_set();
  if (fills.ptr() != Py_False || !is_current_device(device_index)) return py::none();
  PyObject* const quick = PyTuple_GET_ITEM(layouts.ptr(), 0);
  PyObject* const tensors = PyTuple_GET_ITEM(layouts.ptr(), 1);
  const Py_ssize_t count = PyTuple_GET_SIZE(tensors);
  py::tuple outputs(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const layout = PyTuple_GET_ITEM(tensors, i);  // shape, strides, dtype
    PyObject* const output =
        PyObject_Vectorcall(quick, &PyTuple_GET_ITEM(layout, 0),
                            static_cast<size_t>(PyTuple_GET_SIZE(layout)), nullptr);
    if (output == nullptr) throw py::error_already_set();
    PyTuple_SET_ITEM(outputs.ptr(), i, output);
  }
  return outputs;
}

}  // namespace aiter
