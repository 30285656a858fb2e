"""How does a layer on the Triton backend take part in torch.compile and torch.export?

As one op per entry, `torch.ops.aiter.fused_moe_triton` and `fused_moe_from_logits_triton`, which make
the eager call when they run (`aiter.routing.graph` says why ops are registered this way). The size of
the sort's blocks and the tiles follow from M; decided inside of the op, no tracer sees a comparison
of M, and a graph made for any number of tokens is not made again for another one.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..routing.graph import NAMESPACE
from .types import ActivationType

_WEIGHTS = (
    "Tensor hidden_states, Tensor w1, Tensor w2, Tensor? bias1, Tensor? bias2, int activation,"
    " bool gate_up_interleaved"
)
_OPTIONS = (
    "bool doweight_stage1, int? block_size_M, Tensor? num_local_tokens,"
    " int moe_sorting_dispatch_policy, ScalarType? dtype"
)
SCHEMAS = {
    "fused_moe_triton": (
        f"({_WEIGHTS}, Tensor topk_weight, Tensor topk_ids, Tensor? expert_mask, {_OPTIONS}) -> Tensor"
    ),
    "fused_moe_from_logits_triton": (
        f"({_WEIGHTS}, Tensor gating_output, int topk, bool renormalize, Tensor? expert_mask,"
        f" {_OPTIONS}) -> Tensor"
    ),
}


def as_one_op(name: str, hidden_states: Tensor, experts: Any, *arguments: Any) -> Tensor:
    """The call as a tracer is to see it; `arguments` in the order of the op's schema."""
    w1, w2, bias1, bias2, activation, interleaved = experts
    out: Tensor = getattr(torch.ops.aiter, name)(
        hidden_states, w1, w2, bias1, bias2, int(activation), interleaved, *arguments
    )
    return out


def _fused_moe(
    hidden_states: Tensor, w1: Tensor, w2: Tensor, bias1: Tensor | None, bias2: Tensor | None,
    activation: int, interleaved: bool, topk_weight: Tensor, topk_ids: Tensor,
    expert_mask: Tensor | None, weight_first: bool, block_size: int | None,
    num_local_tokens: Tensor | None, policy: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    from ..fused_moe import fused_moe

    return fused_moe(
        hidden_states, w1, w2, topk_weight, topk_ids, expert_mask, ActivationType(activation),
        doweight_stage1=weight_first, block_size_M=block_size, num_local_tokens=num_local_tokens,
        moe_sorting_dispatch_policy=policy, dtype=dtype, bias1=bias1, bias2=bias2,
        gate_up_interleaved=interleaved, backend="triton",
    )  # fmt: skip


def _fused_moe_from_logits(
    hidden_states: Tensor, w1: Tensor, w2: Tensor, bias1: Tensor | None, bias2: Tensor | None,
    activation: int, interleaved: bool, gating_output: Tensor, topk: int, renormalize: bool,
    expert_mask: Tensor | None, weight_first: bool, block_size: int | None,
    num_local_tokens: Tensor | None, policy: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    from ..fused_moe import fused_moe_from_logits

    return fused_moe_from_logits(
        hidden_states, w1, w2, gating_output, topk, renormalize, expert_mask,
        ActivationType(activation), weight_first, block_size, num_local_tokens, policy, dtype,
        bias1, bias2, gate_up_interleaved=interleaved, backend="triton",
    )  # fmt: skip


def _fake(hidden_states: Tensor, *arguments: Any) -> Tensor:
    """The output's shape and dtype; the last argument is the dtype."""
    # NOTE: contiguous, as `moe_buf` is, whatever the strides of `hidden_states`.
    return torch.empty(
        tuple(hidden_states.shape), dtype=arguments[-1] or hidden_states.dtype,
        device=hidden_states.device,
    )  # fmt: skip


def _register() -> Any:
    library: Any = cast(Any, torch.library.Library)(NAMESPACE, "FRAGMENT")
    kernels = {
        "fused_moe_triton": _fused_moe,
        "fused_moe_from_logits_triton": _fused_moe_from_logits,
    }
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, kernels[name], "CompositeExplicitAutograd")
        library.impl(name, _fake, "Meta")
    return library


_library = _register()  # NOTE: the registrations live as long as this object does.
