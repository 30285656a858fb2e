#include "pybind_args.h"
#include "topk_softmax_api.h"

namespace py = pybind11;

PYBIND11_MODULE(module_topk_softmax, m) {
  m.def(
      "topk_softmax",
      [](py::handle topk_weights, py::handle topk_indices, py::handle token_expert_indices,
         py::handle gating_output, py::handle need_renorm) {
        const aiter::TopkSoftmaxArgs args{
            aiter::tensor_arg(topk_weights, "topk_weights"),
            aiter::tensor_arg(topk_indices, "topk_indices"),
            aiter::tensor_arg(token_expert_indices, "token_expert_indices"),
            aiter::input_arg(gating_output, "gating_output"),
            aiter::bool_arg(need_renorm, "need_renorm")};
        void* stream = aiter::current_stream(gating_output, args.gating_output);
        const aiter::ReleaseGilOnCpu release(args.gating_output);
        aiter::topk_softmax(args, stream);
      },
      py::arg("topk_weights"), py::arg("topk_indices"), py::arg("token_expert_indices"),
      py::arg("gating_output"), py::arg("need_renorm"));
}
