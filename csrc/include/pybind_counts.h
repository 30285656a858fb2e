// How bindings of a launch that selects take the counts that it leaves to the sort.
#pragma once

#include "pybind_args.h"
#include "routing_checks.h"

namespace aiter {

// No workspace, no counts.
inline std::optional<CountsArgs> counts_arg(py::handle workspace, py::handle moe_buf,
                                            py::handle num_experts, py::handle num_local_tokens) {
  if (workspace.is_none()) return std::nullopt;
  return CountsArgs{tensor_arg(workspace, "workspace"), tensor_arg(moe_buf, "moe_buf"),
                    int_arg(num_experts, "num_experts"),
                    optional_tensor_arg(num_local_tokens, "num_local_tokens")};
}

}  // namespace aiter
