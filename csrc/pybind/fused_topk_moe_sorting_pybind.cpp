#include "fused_topk_moe_sorting_api.h"
#include "pybind_args.h"

namespace py = pybind11;

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
  m.def(
      "fused_topk_moe_sorting_max_tokens",
      [](py::handle num_experts, py::handle topk, int device_index) {
        return aiter::fused_topk_moe_sorting_max_tokens(aiter::int_arg(num_experts, "num_experts"),
                                                        aiter::int_arg(topk, "topk"), device_index);
      },
      py::arg("num_experts"), py::arg("topk"), py::arg("device_index"));
}
