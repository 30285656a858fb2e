// The kernels of the fused launch by rules; fused_topk_moe_sorting.cu launches them.
#include "fused_topk_moe_sorting_rules.h"
#include "rule_launch.h"

namespace aiter {

FusedRulesKernel fused_rules_kernel(const RowRule& row) {
  FusedRulesKernel kernel = nullptr;
  dispatch_rule_rows(row, [&](auto tag) {
    kernel = fused_topk_moe_sorting_rules_kernel<typename decltype(tag)::type>;
  });
  return kernel;
}

}  // namespace aiter
