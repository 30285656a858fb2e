// The kernels of the launch from hidden states by rules; fused_router_sorting.cu launches them.
#include "fused_router_sorting.h"
#include "rule_launch.h"

namespace aiter {

RouterRulesKernel router_rules_kernel(const RowRule& row) {
  RouterRulesKernel kernel = nullptr;
  dispatch_rule_rows(row, [&](auto tag) {
    kernel = fused_router_sorting_rules_kernel<typename decltype(tag)::type>;
  });
  return kernel;
}

}  // namespace aiter
