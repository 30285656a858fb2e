"""What does a MoE layer call? Routing alone, or the whole layer, by the names of ROCm's aiter.

`fused_moe_from_logits` goes from router logits to the layer's output: one fused launch for the
routing where one can do it, then the experts. `fused_moe` starts from ready top-k ids. The routing
by itself (`topk_softmax_sorting`, `moe_sorting`, `fused_topk`) is for engines with expert GEMMs of
their own. Names, argument orders and defaults are those of ROCm's aiter; extras are keyword-only.

One module per question: `moe_routing` which launches route, `moe_experts` how the experts are
applied and on which backend, `moe_arguments` what is refused.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from .layer import triton_known
from .layer.arguments import check_knobs, check_layer, check_routing, check_unsupported
from .layer.experts import (
    Backend,
    Experts,
    default_block_size,
    expert_backend,
    run_experts,
)
from .layer.triton_experts import compile_ahead, fixed_of, plan_of, run_plan, why_not
from .layer.triton_graph import as_one_op
from .layer.types import ActivationType, QuantType
from .routing.buffers import SortedBuffers
from .routing.calls import (
    empty_sorted_buffers,
    fused_topk,
    last_path,
    moe_sorting,
    topk_softmax_sorting,
)
from .routing.graph import traced
from .routing.plan import check_size

__all__ = [
    "ActivationType",
    "QuantType",
    "SortedBuffers",
    "empty_sorted_buffers",
    "expert_backend",
    "fused_moe",
    "fused_moe_from_logits",
    "fused_topk",
    "last_path",
    "moe_sorting",
    "topk_softmax_sorting",
    "warmup_layer",
]


def fused_moe(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weight: Tensor,
    topk_ids: Tensor,
    expert_mask: Tensor | None = None,
    activation: ActivationType = ActivationType.Silu,
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
        topk_ids: [M, K] int32, contiguous, distinct in a row; global ids. Ids outside [0, E)
            contribute nothing.
        expert_mask: int32 [E] of 0 and 1, with E' ones, in the order of w1; None for E' = E.
        activation: Silu, Gelu or Swiglu.
        quant_type: QuantType.No.
        doweight_stage1: see above.
        w1_scale, w2_scale, a1_scale, a2_scale: None.
        block_size_M: slots per block of the sort; None for the backend's own.
        num_local_tokens: int32 [1] on the device: rows from there on are ignored and come out zero.
        moe_sorting_dispatch_policy: 0, 1 or 2, as in `moe_sorting`. The result is the same.
        dtype: of the output: float32, float16 or bfloat16; None for `hidden_states`'.
        hidden_pad, intermediate_pad: 0.
        bias1: [E', 2*inter] or [E', inter], as w1; rounded to `hidden_states`' dtype.
        bias2: [E', D]; rounded likewise.
        gate_up_interleaved: gate and up take turns along w1's and bias1's rows (g0, u0, g1, ...).
        backend: of the expert products; None for `expert_backend(w1, w2)`.

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
    experts = Experts(w1, w2, bias1, bias2, activation, gate_up_interleaved)
    check_layer(hidden_states, experts, dtype)
    check_knobs(block_size_M, backend, hidden_states.device)
    _check_rows("topk_ids", topk_ids, hidden_states)
    check_routing("the rows of w1", w1.shape[0], expert_mask, w1.shape[0])
    num_experts = w1.shape[0] if expert_mask is None else expert_mask.numel()
    chosen = backend or expert_backend(w1, w2)
    if chosen == "triton" and traced(hidden_states):
        return as_one_op(
            "fused_moe_triton", hidden_states, experts, topk_weight, topk_ids, expert_mask,
            doweight_stage1, block_size_M, num_local_tokens, moe_sorting_dispatch_policy, dtype,
        )  # fmt: skip
    block_size = block_size_M or default_block_size(
        chosen, hidden_states, experts, topk_ids.shape[1], num_experts
    )
    buffers = moe_sorting(
        topk_ids,
        topk_weight,
        num_experts,
        w2.shape[1],
        dtype or hidden_states.dtype,
        block_size,
        expert_mask,
        num_local_tokens,
        moe_sorting_dispatch_policy,
    )
    return run_experts(
        hidden_states,
        experts,
        buffers,
        topk_ids.shape[1],
        block_size,
        chosen,
        all_routed=False,
        weight_first=doweight_stage1,
    )


def fused_moe_from_logits(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool = True,
    expert_mask: Tensor | None = None,
    activation: ActivationType = ActivationType.Silu,
    doweight_stage1: bool = False,
    block_size_M: int | None = None,  # noqa: N803
    num_local_tokens: Tensor | None = None,
    moe_sorting_dispatch_policy: int = 0,
    dtype: torch.dtype | None = None,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    gate_up_interleaved: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """The output of a MoE layer for router logits: one launch routes, where one can.

    Equal to `fused_moe` with the weights and ids of `fused_topk`; see there for the formula and for
    the arguments that are not below.

    Args:
        gating_output: [M, E] float32, float16 or bfloat16 logits; inner stride 1, any row stride.
        topk: K, 1 to min(E, 255).
        renormalize: weights sum to 1 over the chosen experts (True) or over all (False).
        moe_sorting_dispatch_policy: 0 automatic, 1 and 2 the separate chain, as in
            `topk_softmax_sorting`; `last_path()` tells which path ran.

    Returns:
        [M, D] of `dtype`.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing was launched.
        aiter.jit.JitError: a module could not be built or loaded (first call on a device).
    """
    key = triton_known.key_of(
        hidden_states, gating_output, (w1, w2, bias1, bias2),
        (
            topk, renormalize, activation, activation.__class__, doweight_stage1, block_size_M,
            block_size_M.__class__, moe_sorting_dispatch_policy, dtype, gate_up_interleaved, backend,
            expert_mask is None, num_local_tokens is None,
        ),
    )  # fmt: skip
    known = triton_known.known(key)
    if known is not None:
        buffers = topk_softmax_sorting(
            gating_output, topk, gating_output.shape[1], w2.shape[1], known.dtype, renormalize,
            known.block, expert_mask, num_local_tokens, moe_sorting_dispatch_policy,
        )  # fmt: skip
        return run_plan(known.plan, known.fixed, hidden_states, buffers)
    experts = Experts(w1, w2, bias1, bias2, activation, gate_up_interleaved)
    check_layer(hidden_states, experts, dtype)
    check_knobs(block_size_M, backend, hidden_states.device)
    _check_rows("gating_output", gating_output, hidden_states)
    num_experts = gating_output.shape[1]
    check_routing("the width of gating_output", num_experts, expert_mask, w1.shape[0])
    chosen = backend or expert_backend(w1, w2)
    if chosen == "triton" and traced(hidden_states):
        return as_one_op(
            "fused_moe_from_logits_triton", hidden_states, experts, gating_output, topk, renormalize,
            expert_mask, doweight_stage1, block_size_M, num_local_tokens,
            moe_sorting_dispatch_policy, dtype,
        )  # fmt: skip
    block_size = block_size_M or default_block_size(
        chosen, hidden_states, experts, topk, num_experts
    )
    buffers = topk_softmax_sorting(
        gating_output,
        topk,
        num_experts,
        w2.shape[1],
        dtype or hidden_states.dtype,
        renormalize,
        block_size,
        expert_mask,
        num_local_tokens,
        moe_sorting_dispatch_policy,
    )
    complete = expert_mask is None and num_local_tokens is None
    if chosen == "triton" and key is not None and hidden_states.shape[0]:
        plan = plan_of(hidden_states, experts, buffers, topk, block_size, complete, doweight_stage1)
        call = triton_known.Known(block_size, buffers[4].dtype, plan, fixed_of(plan, experts))
        triton_known.remember(key, call)
    return run_experts(
        hidden_states,
        experts,
        buffers,
        topk,
        block_size,
        chosen,
        all_routed=complete,
        weight_first=doweight_stage1,
    )


def warmup_layer(
    w1: Tensor,
    w2: Tensor,
    topk: int,
    *,
    num_experts: int | None = None,
    max_tokens: int = 8192,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: ActivationType = ActivationType.Silu,
    gate_up_interleaved: bool = False,
    doweight_stage1: bool = False,
    dtype: torch.dtype | None = None,
    all_routed: bool = True,
) -> float:
    """Compiles what a layer with these weights launches for 1 to `max_tokens` rows, ahead of use.

    The Triton backend compiles on first use, about a second for each of some ten kernels; all layers of
    a model share them. The other backends compile nothing. Launches nothing. `aiter.warmup` does the
    same for the routing.

    Args:
        w1, w2, bias1, bias2, activation, gate_up_interleaved, doweight_stage1, dtype: as in
            `fused_moe`; hidden states are taken to be dense rows.
        topk: K.
        num_experts: E of the router; None for the experts of w1.
        max_tokens: the largest M.
        all_routed: for calls of `fused_moe_from_logits` without `expert_mask` and
            `num_local_tokens`; False for all others.

    Returns:
        The seconds that it took.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    experts = Experts(w1, w2, bias1, bias2, activation, gate_up_interleaved)
    check_layer(w1[0, :1], experts, dtype)
    check_size("topk", topk)
    check_size("max_tokens", max_tokens)
    start = time.monotonic()
    if why_not(w1.device) is None:
        compile_ahead(
            experts, topk, num_experts or w1.shape[0], max_tokens, dtype or w1.dtype, all_routed,
            doweight_stage1,
        )  # fmt: skip
    return time.monotonic() - start


def _check_rows(name: str, tensor: Tensor, hidden_states: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 2 or tensor.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"{name}: expected a tensor of rank 2 with {hidden_states.shape[0]} rows, as"
            f" hidden_states, got shape {list(tensor.shape)}"
        )
