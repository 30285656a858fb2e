#include "pybind_counts.h"
#include "topk_softmax_api.h"

namespace py = pybind11;

namespace {

void topk_softmax(py::handle topk_weights, py::handle topk_indices,
                  const std::optional<aiter::TensorView>& token_expert_indices,
                  py::handle gating_output, py::handle need_renorm,
                  const std::optional<aiter::CountsArgs>& counts) {
  const aiter::TopkSoftmaxArgs args{aiter::tensor_arg(topk_weights, "topk_weights"),
                                    aiter::tensor_arg(topk_indices, "topk_indices"),
                                    token_expert_indices,
                                    aiter::input_arg(gating_output, "gating_output"),
                                    aiter::bool_arg(need_renorm, "need_renorm"),
                                    counts};
  void* stream = aiter::current_stream(gating_output, args.gating_output);
  const aiter::ReleaseGilOnCpu release(args.gating_output);
  aiter::topk_softmax(args, stream);
}

}  // namespace

PYBIND11_MODULE(module_topk_softmax, m) {
  m.def(
      "topk_softmax",
      [](py::handle topk_weights, py::handle topk_indices, py::handle token_expert_indices,
         py::handle gating_output, py::handle need_renorm) {
        topk_softmax(topk_weights, topk_indices,
                     aiter::tensor_arg(token_expert_indices, "token_expert_indices"), gating_output,
                     need_renorm, std::nullopt);
      },
      py::arg("topk_weights"), py::arg("topk_indices"), py::arg("token_expert_indices"),
      py::arg("gating_output"), py::arg("need_renorm"));
  m.def(
      "topk_softmax_counting",
      [](py::handle topk_weights, py::handle topk_indices, py::handle gating_output,
         py::handle need_renorm, py::handle workspace, py::handle moe_buf, py::handle num_experts,
         py::handle num_local_tokens) {
        topk_softmax(topk_weights, topk_indices, std::nullopt, gating_output, need_renorm,
                     aiter::counts_arg(workspace, moe_buf, num_experts, num_local_tokens));
      },
      py::arg("topk_weights"), py::arg("topk_indices"), py::arg("gating_output"),
      py::arg("need_renorm"), py::arg("workspace"), py::arg("moe_buf"), py::arg("num_experts"),
      py::arg("num_local_tokens"));
}
