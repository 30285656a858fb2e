#include "fused_topk_moe_sorting_api.h"
#include "pybind_args.h"

namespace py = pybind11;

namespace {

// Reads `out` if it is a tuple of tensors of exactly the sizes in `expected`, an
// aiter.moe_buffers.Buffers.
bool read_outputs(py::handle out, const py::tuple& expected, aiter::SortTensors& sort) {
  if (!PyTuple_Check(out.ptr()) || PyTuple_GET_SIZE(out.ptr()) != 5) return false;
  const auto output = [&](int index) { return py::handle(PyTuple_GET_ITEM(out.ptr(), index)); };
  if (!aiter::read_exchanged(output(0), "sorted_ids", sort.sorted_ids) ||
      !aiter::read_exchanged(output(1), "sorted_weights", sort.sorted_weights) ||
      !aiter::read_exchanged(output(2), "sorted_expert_ids", sort.sorted_expert_ids) ||
      !aiter::read_exchanged(output(3), "num_valid_ids", sort.num_valid_ids) ||
      !aiter::read_exchanged(output(4), "moe_buf", sort.moe_buf)) {
    return false;
  }
  const auto size = [](const py::tuple& sizes, int index) {
    return PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), index));
  };
  const auto shape = py::reinterpret_borrow<py::tuple>(PyTuple_GET_ITEM(expected.ptr(), 3));
  static PyObject* const dtype_name = PyUnicode_InternFromString("dtype");
  const auto dtype =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(output(4).ptr(), dtype_name));
  if (!dtype) throw py::error_already_set();
  return sort.sorted_ids.numel() == size(expected, 0) &&
         sort.sorted_weights.numel() == size(expected, 1) &&
         sort.sorted_expert_ids.numel() == size(expected, 2) && sort.moe_buf.ndim == 2 &&
         sort.moe_buf.shape[0] == size(shape, 0) && sort.moe_buf.shape[1] == size(shape, 1) &&
         dtype.ptr() == PyTuple_GET_ITEM(expected.ptr(), 4);
}

// As fused_topk_moe_sorting_fwd, into outputs of exactly the expected sizes. False: nothing was
// launched, as they are not plainly that, and the caller is to find out what they are.
bool fused_topk_moe_sorting_into(py::handle gating_output, py::handle out,
                                 const py::tuple& expected, py::handle num_experts, py::handle topk,
                                 py::handle unit_size, py::handle need_renorm,
                                 py::handle local_expert_mask, py::handle num_local_tokens) {
  aiter::FusedTopkMoeSortingArgs args{};
  if (!read_outputs(out, expected, args.sort)) return false;
  args.gating_output = aiter::input_arg(gating_output, "gating_output");
  for (const aiter::TensorView* output :
       {&args.sort.sorted_ids, &args.sort.sorted_weights, &args.sort.sorted_expert_ids,
        &args.sort.num_valid_ids, &args.sort.moe_buf}) {
    aiter::check_memory(*output);
  }
  args.sort.expert_mask = aiter::optional_tensor_arg(local_expert_mask, "local_expert_mask");
  args.sort.num_local_tokens = aiter::optional_tensor_arg(num_local_tokens, "num_local_tokens");
  args.num_experts = aiter::int_arg(num_experts, "num_experts");
  args.topk = aiter::int_arg(topk, "topk");
  args.unit_size = aiter::int_arg(unit_size, "unit_size");
  args.need_renorm = aiter::bool_arg(need_renorm, "need_renorm");
  void* stream = aiter::current_stream(gating_output, args.gating_output);
  const aiter::ReleaseGilOnCpu release(args.gating_output);
  aiter::fused_topk_moe_sorting_fwd(args, stream);
  return true;
}

}  // namespace

PYBIND11_MODULE(module_fused_topk_moe_sorting, m) {
  m.def(
      "fused_topk_moe_sorting_fwd",
      [](py::handle gating_output, py::handle sorted_ids, py::handle sorted_weights,
         py::handle sorted_expert_ids, py::handle num_valid_ids, py::handle moe_buf,
         py::handle num_experts, py::handle topk, py::handle unit_size, py::handle need_renorm,
         py::handle local_expert_mask, py::handle num_local_tokens, py::handle cluster_size) {
        const aiter::FusedTopkMoeSortingArgs args{
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
            cluster_size.is_none() ? 0 : aiter::int_arg(cluster_size, "cluster_size")};
        void* stream = aiter::current_stream(gating_output, args.gating_output);
        const aiter::ReleaseGilOnCpu release(args.gating_output);
        aiter::fused_topk_moe_sorting_fwd(args, stream);
      },
      py::arg("gating_output"), py::arg("sorted_ids"), py::arg("sorted_weights"),
      py::arg("sorted_expert_ids"), py::arg("num_valid_ids"), py::arg("moe_buf"),
      py::arg("num_experts"), py::arg("topk"), py::arg("unit_size"), py::arg("need_renorm"),
      py::kw_only(), py::arg("local_expert_mask") = py::none(),
      py::arg("num_local_tokens") = py::none(), py::arg("cluster_size") = py::none());
  m.def("fused_topk_moe_sorting_into", &fused_topk_moe_sorting_into, py::arg("gating_output"),
        py::arg("out"), py::arg("expected"), py::arg("num_experts"), py::arg("topk"),
        py::arg("unit_size"), py::arg("need_renorm"), py::arg("local_expert_mask"),
        py::arg("num_local_tokens"));
  m.def(
      "fused_topk_moe_sorting_max_tokens",
      [](py::handle num_experts, py::handle topk, int device_index) {
        return aiter::fused_topk_moe_sorting_max_tokens(aiter::int_arg(num_experts, "num_experts"),
                                                        aiter::int_arg(topk, "topk"), device_index);
      },
      py::arg("num_experts"), py::arg("topk"), py::arg("device_index"));
}
