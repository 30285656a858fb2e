"""From hidden states alone to the output of a MoE layer: the router is part of the routing launch.

`fused_moe_from_hidden` is `calls.fused_moe_from_logits` with the router's product in front
(`routing.router`). Calls are not remembered here; checks and plan are made each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.rule import RoutingRule, check_rule, plain_rule, rule_of
from ..routing.arguments import check_apart, check_strided
from ..routing.autograd import checked
from ..routing.buffers import check_size
from ..routing.router import router_topk_sorting
from . import triton_graph
from .arguments import check_knobs, check_layer, check_routing
from .calls import recorded
from .experts import Backend, backend_of, default_block_size, run_experts
from .parts import Activation, Experts
from .types import ActivationType


def fused_moe_from_hidden(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    router_weight: Tensor,
    topk: int,
    renormalize: bool = True,
    expert_mask: Tensor | None = None,
    activation: Activation = ActivationType.Silu,
    doweight_stage1: bool = False,
    block_size_M: int | None = None,  # noqa: N803
    num_local_tokens: Tensor | None = None,
    moe_sorting_dispatch_policy: int = 0,
    dtype: torch.dtype | None = None,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    router_input: Tensor | None = None,
    router_bias: Tensor | None = None,
    rule: RoutingRule | None = None,
    correction_bias: Tensor | None = None,
    logits_out: Tensor | None = None,
    batch_invariant: bool = False,
    gate_up_interleaved: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """The output of a MoE layer for hidden states: one launch makes logits and routes, where one can.

    Equal to `fused_moe_from_logits` with the logits of `router_topk_sorting`; see there for what their
    bits depend on, and for the arguments that are not below.

    Args:
        hidden_states: [M, D] float32, float16 or bfloat16; inner stride 1 where the router reads them.
        router_weight: [E', D'] float32, float16 or bfloat16; inner stride 1, any row stride.
        router_input: [M, D'] float32, float16 or bfloat16, what the router multiplies where that is
            not what the experts do; None for `hidden_states`.
        router_bias, logits_out, batch_invariant: as in `router_topk_sorting`.

    Returns:
        [M, D] of `dtype`.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing was launched.
        aiter.jit.JitError: a module could not be built or loaded (first call on a device).
    """
    experts = Experts(w1, w2, bias1, bias2, activation, gate_up_interleaved)
    hidden_states = check_layer(hidden_states, experts, dtype)
    check_knobs(block_size_M, backend, experts, doweight_stage1)
    check_size("topk", topk)
    check_rule(rule)
    rows = hidden_states if router_input is None else router_input
    _check_router(router_weight, rows, hidden_states)
    if logits_out is not None:
        check_strided("logits_out", logits_out)
        check_apart(
            "logits_out",
            logits_out,
            hidden_states=hidden_states,
            w1=w1,
            w2=w2,
            bias1=bias1,
            bias2=bias2,
        )
    full_rule = plain_rule(renormalize, "renormalize") if rule is None else rule
    num_experts = full_rule.num_experts(router_weight.shape[0])
    check_routing("the rows of router_weight", num_experts, expert_mask, w1.shape[0])
    chosen = backend or backend_of(w1, w2, activation)
    if chosen == "triton" and recorded(hidden_states, experts):
        weight = checked(
            router_weight, router_weight=router_weight, router_input=router_input,
            router_bias=router_bias, correction_bias=correction_bias, logits_out=logits_out,
        )  # fmt: skip
        return triton_graph.as_one_op(
            "fused_moe_from_hidden_triton", hidden_states, experts, weight, router_input,
            router_bias, topk, [float(number) for number in full_rule.packed], correction_bias,
            logits_out, batch_invariant, expert_mask, doweight_stage1, block_size_M,
            num_local_tokens, moe_sorting_dispatch_policy, dtype,
        )  # fmt: skip
    slots = topk + full_rule.num_shared_experts
    block_size = block_size_M or default_block_size(
        chosen, hidden_states, experts, slots, num_experts
    )
    buffers = router_topk_sorting(
        rows, router_weight, topk, num_experts, w2.shape[1], dtype or hidden_states.dtype,
        router_bias=router_bias, rule=full_rule, correction_bias=correction_bias,
        logits_out=logits_out, block_size=block_size, expert_mask=expert_mask,
        num_local_tokens=num_local_tokens, dispatch_policy=moe_sorting_dispatch_policy,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    all_computed = expert_mask is None and not full_rule.num_zero_experts
    return run_experts(
        hidden_states, experts, buffers, slots, block_size, chosen,
        all_routed=all_computed and num_local_tokens is None, weight_first=doweight_stage1,
    )  # fmt: skip


def _check_router(router_weight: Tensor, rows: Tensor, hidden_states: Tensor) -> None:
    """`rows` is what the router multiplies."""
    for name, tensor in (("router_input", rows), ("router_weight", router_weight)):
        check_strided(name, tensor)
        if tensor.device != hidden_states.device:
            raise ValueError(
                f"{name}: expected it on {hidden_states.device}, as hidden_states, got"
                f" {tensor.device}"
            )
    tokens = hidden_states.shape[0]
    if rows.dim() != 2 or rows.shape[0] != tokens:
        raise ValueError(
            f"router_input: expected shape [{tokens}, any], as hidden_states has rows, got"
            f" {list(rows.shape)}"
        )
    if router_weight.dim() != 2 or router_weight.shape[1] != rows.shape[1]:
        raise ValueError(
            f"router_weight: expected shape [any, {rows.shape[1]}], as what it multiplies has"
            f" columns, got {list(router_weight.shape)}"
        )


def _op(*arguments: Any) -> Tensor:
    """The call with the arguments of `triton_graph`'s op, in the order of its schema."""
    hidden, w1, w2, bias1, bias2, activation, interleaved, weight, *rest = arguments
    rows, router_bias, topk, rule, correction_bias, logits_out, batch_invariant, *options = rest
    mask, weight_first, block_size, num_local_tokens, policy, dtype = options
    return fused_moe_from_hidden(
        hidden, w1, w2, weight, topk, expert_mask=mask, activation=ActivationType(activation),
        doweight_stage1=weight_first, block_size_M=block_size, num_local_tokens=num_local_tokens,
        moe_sorting_dispatch_policy=policy, dtype=dtype, bias1=bias1, bias2=bias2,
        router_input=rows, router_bias=router_bias, rule=rule_of(rule), correction_bias=correction_bias,
        logits_out=logits_out, batch_invariant=batch_invariant, gate_up_interleaved=interleaved,
        backend="triton",
    )  # fmt: skip


# NOTE: the registration lives as long as this object does.
_library = triton_graph.register({"fused_moe_from_hidden_triton": _op})
