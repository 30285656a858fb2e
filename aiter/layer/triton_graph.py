"""How does a layer on the Triton backend take part in torch.compile and torch.export?

As one registered op per entry, `fused_moe_triton`, `fused_moe_from_logits_triton` and
`fused_moe_from_hidden_triton`, which make the eager call when they run (`routing.graph` says why ops
are registered this way). The size of the sort's blocks and the tiles follow from M; decided inside of
the op, no tracer sees a comparison of M, and a graph made for any number of tokens is not made again
for another one.

The calls themselves are in `calls` and `from_hidden`, which import this module and hand them to
`register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ..routing.autograd import refusing
from ..routing.tracing import NAMESPACE, registered

_WEIGHTS = (
    "Tensor hidden_states, Tensor w1, Tensor w2, Tensor? bias1, Tensor? bias2, int activation,"
    " bool gate_up_interleaved"
)
_OPTIONS = (
    "Tensor? expert_mask, bool doweight_stage1, int? block_size_M, Tensor? num_local_tokens,"
    " int moe_sorting_dispatch_policy, ScalarType? dtype"
)
SCHEMAS = {
    "fused_moe_triton": (
        f"({_WEIGHTS}, Tensor topk_weight, Tensor topk_ids, float swiglu_limit, {_OPTIONS})"
        " -> Tensor"
    ),
    "fused_moe_from_logits_triton": (
        f"({_WEIGHTS}, Tensor gating_output, int topk, float[] rule, Tensor? correction_bias,"
        f" {_OPTIONS}) -> Tensor"
    ),
    "fused_moe_from_hidden_triton": (
        f"({_WEIGHTS}, Tensor router_weight, Tensor? router_input, Tensor? router_bias, int topk,"
        f" float[] rule, Tensor? correction_bias, Tensor(a!)? logits_out, bool batch_invariant,"
        f" {_OPTIONS}) -> Tensor"
    ),
}


def as_one_op(name: str, hidden_states: Tensor, experts: Any, *arguments: Any) -> Tensor:
    """The call as a tracer is to see it; `arguments` in the order of the op's schema."""
    w1, w2, bias1, bias2, activation, interleaved, _ = experts
    given = (hidden_states, w1, w2, bias1, bias2, int(activation), interleaved, *arguments)
    # NOTE: the layer has refused what needs a gradient, if not now then when its graph runs.
    out: Tensor = registered(name)(
        *(each.detach() if isinstance(each, Tensor) else each for each in given)
    )
    return out


def _fake(hidden_states: Tensor, *arguments: Any) -> Tensor:
    """The output's shape and dtype; the last argument is the dtype."""
    # NOTE: contiguous, as `moe_buf` is, whatever the strides of `hidden_states`.
    return torch.empty(
        tuple(hidden_states.shape), dtype=arguments[-1] or hidden_states.dtype,
        device=hidden_states.device,
    )  # fmt: skip


def register(calls: Mapping[str, Callable[..., Tensor]]) -> Any:
    """Registers ops by name with the functions that run them; they live as long as what is returned."""
    library: Any = cast(Any, torch.library.Library)(NAMESPACE, "FRAGMENT")
    for name, run in calls.items():
        library.define(name + SCHEMAS[name])
        library.impl(name, run, "CompositeExplicitAutograd")
        library.impl(name, _fake, "Meta")
        library.impl(name, refusing(registered(name).default), "Autograd")
    return library
