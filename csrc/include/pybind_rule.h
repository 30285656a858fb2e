// How the bindings of the fused launches take a rule and the outputs of top-k.
#pragma once

#include <tuple>

#include "fused_topk_moe_sorting_api.h"
#include "pybind_args.h"

namespace aiter {

// `rule` is None or a bool, its need_renorm, for plain softmax.
inline void set_rule(py::handle rule, py::handle correction_bias, FusedTopkMoeSortingArgs& args) {
  args.correction_bias = optional_input_arg(correction_bias, "correction_bias");
  if (rule.is_none()) return;
  if (PyBool_Check(rule.ptr())) {
    args.need_renorm = rule.ptr() == Py_True;
  } else {
    args.rule = packed_arg<std::tuple_size_v<RuleNumbers>>(rule, "rule");
    args.need_renorm = (*args.rule)[kRuleNeedRenorm] != 0;
  }
}

// `topk_out` is None or two tensors.
inline void set_topk_out(py::handle topk_out, FusedTopkMoeSortingArgs& args) {
  if (topk_out.is_none()) return;
  if (!is_tuple_of(2, topk_out)) {
    throw py::type_error("topk_out: expected a tuple of two tensors or None, got " +
                         detail::type_name(topk_out));
  }
  args.topk_weights = tensor_arg(PyTuple_GET_ITEM(topk_out.ptr(), 0), "topk_out[0]");
  args.topk_ids = tensor_arg(PyTuple_GET_ITEM(topk_out.ptr(), 1), "topk_out[1]");
}

}  // namespace aiter
