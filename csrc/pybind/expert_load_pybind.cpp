#include "pybind_args.h"

namespace py = pybind11;

namespace aiter {
void expert_load(const TensorView& topk_ids, const TensorView& load, void* stream);
}

PYBIND11_MODULE(module_expert_load, m) {
  m.def(
      "expert_load",
      [](py::handle topk_ids, py::handle load) {
        const aiter::TensorView ids = aiter::tensor_arg(topk_ids, "topk_ids");
        const aiter::TensorView out = aiter::tensor_arg(load, "load");
        void* stream = aiter::current_stream(topk_ids, ids);
        const aiter::ReleaseGilOnCpu release(ids);
        aiter::expert_load(ids, out, stream);
      },
      py::arg("topk_ids"), py::arg("load"));
}
