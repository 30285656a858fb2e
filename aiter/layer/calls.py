"""From hidden states and router logits, or ready top-k ids, to the output of a MoE layer.

`fused_moe_from_logits` goes from router logits to the layer's output: one fused launch for the
routing where one can do it, then the experts. `fused_moe` starts from ready top-k ids. `experts` says
how the experts are applied and on which backend, `arguments` what is refused, `triton_known` which calls
are known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.rule import RoutingRule, plain_rule, rule_of
from ..routing.arguments import check_strided
from ..routing.autograd import checked
from ..routing.buffers import check_size
from ..routing.calls import moe_sorting, topk_routing_sorting
from ..routing.request import rule_key
from ..routing.tracing import traced
from . import triton_graph, triton_known
from .arguments import (
    GATE_MODES,
    check_knobs,
    check_layer,
    check_routing,
    check_unsupported,
    check_upstream,
)
from .experts import Backend, backend_of, default_block_size, run_experts
from .parts import SWIGLU_LIMIT, Activation, Experts
from .triton_experts import fixed_of, plan_of, run_plan
from .types import ActivationType, QuantType


def fused_moe(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weight: Tensor,
    topk_ids: Tensor,
    expert_mask: Tensor | None = None,
    activation: Activation = ActivationType.Silu,
    quant_type: QuantType = QuantType.No,
    doweight_stage1: bool = False,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    block_size_M: int | None = None,  # noqa: N803
    num_local_tokens: Tensor | None = None,
    moe_sorting_dispatch_policy: int = 0,
    dtype: torch.dtype | None = None,
    hidden_pad: int = 0,
    intermediate_pad: int = 0,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    splitk: int = 0,
    swiglu_limit: float | None = None,
    beta: float | None = None,
    linear_beta: float | None = None,
    gate_mode: str | None = "separated",
    shared_w1: Tensor | None = None,
    shared_w2: Tensor | None = None,
    shared_w1_scale: Tensor | None = None,
    shared_w2_scale: Tensor | None = None,
    shared_expert_id: int = -1,
    stage2_scatter: object | None = None,
    *,
    gate_up_interleaved: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """The output of a MoE layer for ready top-k ids.

    For token t with experts e_k of weight r_k, everything in `hidden_states`' dtype but the last
    product and the sum over k, which are float32:

        h_k = x_t @ w1[e_k].T + bias1[e_k]
        g, u = halves of h_k                        (w1 with 2*inter rows)
        a_k = silu(g) * u                           Silu
              gelu(g) * u                           Gelu (exact, by erf)
              g * sigmoid(1.702 * g) * (u + 1)      Swiglu, g clamped to at most 7, u to -7..7
              silu(h_k) or gelu(h_k)                (w1 with inter rows)
        out_t = sum over k of r_k * (a_k @ w2[e_k].T + bias2[e_k])

    With `doweight_stage1`, r_k multiplies x_t @ w1[e_k].T instead, before the bias.

    Args:
        hidden_states: [M, D] float32, float16 or bfloat16.
        w1: [E', 2*inter, D] (gate, then up) or [E', inter, D], same dtype, any strides; E' the
            experts of this rank.
        w2: [E', D, inter], same dtype, any strides.
        topk_weight: [M, K] float32, contiguous.
        topk_ids: [M, K] int32, contiguous; global ids, each a term of the sum, also where they
            repeat in a row. Ids outside [0, E) contribute nothing.
        expert_mask: int32 [E] of 0 and 1, with E' ones, in the order of w1; None for E' = E.
        activation: Silu, Gelu or Swiglu; or a function of the first product, [R, rows of w1] of some
            rows to [R, inter], which sees rows that nobody asked for and must keep rows apart.
        quant_type: QuantType.No.
        doweight_stage1: see above.
        w1_scale, w2_scale, a1_scale, a2_scale: None.
        block_size_M: slots per block of the sort; None or 0 for the backend's own.
        num_local_tokens: int32 [1] on the device: rows from there on are ignored and come out zero.
        moe_sorting_dispatch_policy: 0, 1 or 2, as in `moe_sorting`. The result is the same.
        dtype: of the output: float32, float16 or bfloat16; None for `hidden_states`'.
        hidden_pad, intermediate_pad: 0.
        bias1: [E', 2*inter] or [E', inter], as w1; rounded to `hidden_states`' dtype.
        bias2: [E', D]; rounded likewise.
        splitk: any int; the products divide their work as they see fit.
        swiglu_limit: what Swiglu clamps to in place of 7; None for 7.
        beta, linear_beta: None.
        gate_mode: "separated", or "interleave" for what `gate_up_interleaved=True` says.
        shared_w1, shared_w2, shared_w1_scale, shared_w2_scale, stage2_scatter: None.
        shared_expert_id: -1.
        gate_up_interleaved: gate and up take turns along w1's and bias1's rows (g0, u0, g1, ...).
        backend: of the expert products; None for `expert_backend(w1, w2, activation)`.

    Returns:
        [M, D] of `dtype`. The same call gives the same bits.

    Raises:
        ValueError, TypeError: an argument does not fit or asks for what is not supported; nothing
            was launched.
        aiter.jit.JitError: a module could not be built or loaded (first call on a device).
    """
    check_unsupported(
        quant_type,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        a1_scale=a1_scale,
        a2_scale=a2_scale,
        hidden_pad=hidden_pad,
        intermediate_pad=intermediate_pad,
    )
    check_upstream(
        splitk,
        swiglu_limit,
        gate_mode,
        activation,
        beta=beta,
        linear_beta=linear_beta,
        shared_w1=shared_w1,
        shared_w2=shared_w2,
        shared_w1_scale=shared_w1_scale,
        shared_w2_scale=shared_w2_scale,
        shared_expert_id=shared_expert_id,
        stage2_scatter=stage2_scatter,
    )
    interleaved = GATE_MODES[gate_mode] or gate_up_interleaved
    limit = SWIGLU_LIMIT if swiglu_limit is None else swiglu_limit
    experts = Experts(w1, w2, bias1, bias2, activation, interleaved, limit)
    hidden_states = check_layer(hidden_states, experts, dtype)
    check_knobs(block_size_M, backend, experts, doweight_stage1)
    _check_rows("topk_ids", topk_ids, hidden_states)
    topk_weight = checked(topk_weight, topk_weight=topk_weight)
    check_routing("the rows of w1", w1.shape[0], expert_mask, w1.shape[0])
    num_experts = w1.shape[0] if expert_mask is None else expert_mask.numel()
    chosen = backend or backend_of(w1, w2, activation)
    if chosen == "triton" and recorded(hidden_states, experts):
        return triton_graph.as_one_op(
            "fused_moe_triton", hidden_states, experts, topk_weight, topk_ids, limit, expert_mask,
            doweight_stage1, block_size_M, num_local_tokens, moe_sorting_dispatch_policy, dtype,
        )  # fmt: skip
    block_size = block_size_M or default_block_size(
        chosen, hidden_states, experts, topk_ids.shape[1], num_experts
    )
    buffers = moe_sorting(
        topk_ids, topk_weight, num_experts, w2.shape[1], dtype or hidden_states.dtype, block_size,
        expert_mask, num_local_tokens, moe_sorting_dispatch_policy,
    )  # fmt: skip
    return run_experts(
        hidden_states, experts, buffers, topk_ids.shape[1], block_size, chosen,
        all_routed=False, weight_first=doweight_stage1,
    )  # fmt: skip


def fused_moe_from_logits(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    gating_output: Tensor,
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
    rule: RoutingRule | None = None,
    correction_bias: Tensor | None = None,
    gate_up_interleaved: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """The output of a MoE layer for router logits: one launch routes, where one can.

    Equal to `fused_moe` with the weights and ids of `fused_topk`; see there for the formula and for
    the arguments that are not below.

    Args:
        gating_output: [M, E] float32, float16 or bfloat16 logits; inner stride 1, any row stride.
        topk: K, 1 to min(E, 255).
        renormalize: weights sum to 1 over the chosen experts (True) or over all (False). Only for
            rule None; a rule says it itself.
        moe_sorting_dispatch_policy: 0 automatic, 1 and 2 the separate chain, as in
            `topk_softmax_sorting`; `last_path()` tells which path ran.
        rule, correction_bias: as in `topk_routing_sorting`. Shared experts are the last of w1 and w2.
            Zero experts add nothing to the output.

    Returns:
        [M, D] of `dtype`.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing was launched.
        aiter.jit.JitError: a module could not be built or loaded (first call on a device).
    """
    by_rule = renormalize if rule is None else rule_key(rule)
    key = triton_known.key_of(
        hidden_states, gating_output, (w1, w2, bias1, bias2), by_rule,
        (
            topk, activation, activation.__class__, doweight_stage1, block_size_M,
            block_size_M.__class__, moe_sorting_dispatch_policy, dtype, gate_up_interleaved, backend,
            expert_mask is None, num_local_tokens is None, correction_bias is None,
        ),
    )  # fmt: skip
    known = triton_known.known(key)
    if known is not None:
        buffers = topk_routing_sorting(
            gating_output, topk, known.num_experts, w2.shape[1], known.dtype, rule=known.rule,
            correction_bias=correction_bias, block_size=known.block, expert_mask=expert_mask,
            num_local_tokens=num_local_tokens, dispatch_policy=moe_sorting_dispatch_policy,
        )  # fmt: skip
        return run_plan(known.plan, known.fixed, hidden_states, buffers)
    experts = Experts(w1, w2, bias1, bias2, activation, gate_up_interleaved)
    hidden_states = check_layer(hidden_states, experts, dtype)
    check_knobs(block_size_M, backend, experts, doweight_stage1)
    check_size("topk", topk)
    _check_rows("gating_output", gating_output, hidden_states)
    full_rule = plain_rule(renormalize, "renormalize") if rule is None else rule
    num_experts = full_rule.num_experts(gating_output.shape[1])
    check_routing("the width of gating_output", num_experts, expert_mask, w1.shape[0])
    chosen = backend or backend_of(w1, w2, activation)
    if chosen == "triton" and recorded(hidden_states, experts):
        logits = checked(
            gating_output, gating_output=gating_output, correction_bias=correction_bias
        )
        return triton_graph.as_one_op(
            "fused_moe_from_logits_triton", hidden_states, experts, logits, topk,
            [float(number) for number in full_rule.packed], correction_bias, expert_mask,
            doweight_stage1, block_size_M, num_local_tokens, moe_sorting_dispatch_policy, dtype,
        )  # fmt: skip
    slots = topk + full_rule.num_shared_experts
    block_size = block_size_M or default_block_size(
        chosen, hidden_states, experts, slots, num_experts
    )
    buffers = topk_routing_sorting(
        gating_output, topk, num_experts, w2.shape[1], dtype or hidden_states.dtype,
        rule=full_rule, correction_bias=correction_bias, block_size=block_size,
        expert_mask=expert_mask, num_local_tokens=num_local_tokens,
        dispatch_policy=moe_sorting_dispatch_policy,
    )  # fmt: skip
    all_computed = expert_mask is None and not full_rule.num_zero_experts
    all_routed = all_computed and num_local_tokens is None
    if chosen == "triton" and key is not None and w1.numel() and hidden_states.numel():
        plan = plan_of(
            hidden_states, experts, buffers, slots, block_size, all_routed, doweight_stage1
        )
        fixed = fixed_of(plan, experts)
        call = triton_known.Known(block_size, num_experts, buffers[4].dtype, full_rule, plan, fixed)
        triton_known.remember(key, call)
    return run_experts(
        hidden_states, experts, buffers, slots, block_size, chosen,
        all_routed=all_routed, weight_first=doweight_stage1,
    )  # fmt: skip


def recorded(hidden_states: Tensor, experts: Experts) -> bool:
    """Whether a tracer, a transform or a tensor subclass stands for what a kernel would read."""
    tensors = (hidden_states, experts.w1, experts.w2, experts.bias1, experts.bias2)
    return any(map(traced, tensors))


def _check_rows(name: str, tensor: Tensor, hidden_states: Tensor) -> None:
    check_strided(name, tensor)
    if tensor.dim() != 2 or tensor.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"{name}: expected a tensor of rank 2 with {hidden_states.shape[0]} rows, as"
            f" hidden_states, got shape {list(tensor.shape)}"
        )
    if tensor.device != hidden_states.device:
        raise ValueError(
            f"{name}: expected it on {hidden_states.device}, as hidden_states, got {tensor.device}"
        )


def _fused_moe_op(*arguments: Any) -> Tensor:
    """`fused_moe` with the arguments of `triton_graph`'s op, in the order of its schema."""
    hidden, w1, w2, bias1, bias2, activation, interleaved, weights, ids, limit, *options = arguments
    mask, weight_first, block_size, num_local_tokens, policy, dtype = options
    kind = ActivationType(activation)
    return fused_moe(
        hidden, w1, w2, weights, ids, mask, kind, doweight_stage1=weight_first,
        block_size_M=block_size, num_local_tokens=num_local_tokens,
        moe_sorting_dispatch_policy=policy, dtype=dtype, bias1=bias1, bias2=bias2,
        swiglu_limit=limit if kind == ActivationType.Swiglu else None,
        gate_up_interleaved=interleaved, backend="triton",
    )  # fmt: skip


def _fused_moe_from_logits_op(*arguments: Any) -> Tensor:
    """As above."""
    hidden, w1, w2, bias1, bias2, activation, interleaved, logits, topk, rule, *options = arguments
    correction_bias, mask, weight_first, block_size, num_local_tokens, policy, dtype = options
    return fused_moe_from_logits(
        hidden, w1, w2, logits, topk, expert_mask=mask, activation=ActivationType(activation),
        doweight_stage1=weight_first, block_size_M=block_size, num_local_tokens=num_local_tokens,
        moe_sorting_dispatch_policy=policy, dtype=dtype, bias1=bias1, bias2=bias2,
        rule=rule_of(rule), correction_bias=correction_bias, gate_up_interleaved=interleaved,
        backend="triton",
    )  # fmt: skip


# NOTE: the registrations live as long as this object does.
_library = triton_graph.register(
    {"fused_moe_triton": _fused_moe_op, "fused_moe_from_logits_triton": _fused_moe_from_logits_op}
)
