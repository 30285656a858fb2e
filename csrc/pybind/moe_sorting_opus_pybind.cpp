#include "moe_sorting_opus_api.h"
#include "pybind_args.h"

namespace py = pybind11;

namespace {

template <void (*kRun)(const aiter::MoeSortingOpusArgs&, void*)>
void moe_sorting_opus(py::handle topk_ids, py::handle topk_weights, py::handle sorted_token_ids,
                      py::handle sorted_weights, py::handle sorted_expert_ids,
                      py::handle num_valid_ids, py::handle moe_buf, py::handle num_experts,
                      py::handle unit_size, py::handle local_expert_mask,
                      py::handle num_local_tokens, py::handle workspace, py::handle dispatch_policy,
                      py::handle id_format, py::handle num_zero_experts) {
  const aiter::MoeSortingOpusArgs args{
      aiter::tensor_arg(topk_ids, "topk_ids"),
      aiter::input_arg(topk_weights, "topk_weights"),
      {aiter::tensor_arg(sorted_token_ids, "sorted_token_ids"),
       aiter::tensor_arg(sorted_weights, "sorted_weights"),
       aiter::tensor_arg(sorted_expert_ids, "sorted_expert_ids"),
       aiter::tensor_arg(num_valid_ids, "num_valid_ids"), aiter::tensor_arg(moe_buf, "moe_buf"),
       aiter::optional_tensor_arg(local_expert_mask, "local_expert_mask"),
       aiter::optional_tensor_arg(num_local_tokens, "num_local_tokens")},
      aiter::int_arg(num_experts, "num_experts"),
      aiter::int_arg(unit_size, "unit_size"),
      aiter::optional_tensor_arg(workspace, "workspace"),
      aiter::int_arg(dispatch_policy, "dispatch_policy"),
      aiter::is_flat(id_format),
      aiter::int_arg(num_zero_experts, "num_zero_experts")};
  void* stream = aiter::current_stream(topk_ids, args.topk_ids);
  const aiter::ReleaseGilOnCpu release(args.topk_ids);
  kRun(args, stream);
}

void check_only(const aiter::MoeSortingOpusArgs& args, void*) {
  aiter::moe_sorting_opus_check(args);
}

template <typename Function>
void define(py::module_& m, const char* name, Function function) {
  m.def(name, function, py::arg("topk_ids"), py::arg("topk_weights"), py::arg("sorted_token_ids"),
        py::arg("sorted_weights"), py::arg("sorted_expert_ids"), py::arg("num_valid_ids"),
        py::arg("moe_buf"), py::arg("num_experts"), py::arg("unit_size"),
        py::arg("local_expert_mask") = py::none(), py::arg("num_local_tokens") = py::none(),
        py::arg("workspace") = py::none(), py::arg("dispatch_policy") = 0,
        py::arg("id_format") = "slot", py::arg("num_zero_experts") = 0);
}

}  // namespace

PYBIND11_MODULE(module_moe_sorting_opus, m) {
  define(m, "moe_sorting_opus_fwd", &moe_sorting_opus<&aiter::moe_sorting_opus_fwd>);
  define(m, "moe_sorting_opus_place", &moe_sorting_opus<&aiter::moe_sorting_opus_place>);
  define(m, "moe_sorting_opus_check", &moe_sorting_opus<&check_only>);
  m.def(
      "moe_sorting_opus_get_workspace_size",
      [](py::handle tokens, py::handle num_experts, py::handle topk, py::handle dispatch_policy) {
        return aiter::moe_sorting_opus_get_workspace_size(
            aiter::int_arg(tokens, "tokens"), aiter::int_arg(num_experts, "num_experts"),
            aiter::int_arg(topk, "topk"), aiter::int_arg(dispatch_policy, "dispatch_policy"));
      },
      py::arg("tokens"), py::arg("num_experts"), py::arg("topk"), py::arg("dispatch_policy") = 0);
}
