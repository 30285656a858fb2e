"""From router logits, or ready top-k ids, to the buffers that the expert GEMMs read.

Every function here makes a `Request` of what its caller asks for and hands it to `route`, which

1. asks whether such a call was made before (`known.again`), which launches and is all;
2. gives a call that somebody records to the registered op of its name (`graph`);
3. else looks up the plan, allocates what the caller did not give, and calls the compiled functions of
   the path that the plan names (`launches`).

Host time is what a decode step pays per layer, so nothing that only a first call needs stands before
`known.again`. `python op_tests/bench_host.py --tokens 1` prints the pieces; on the CPU of an AMD EPYC
(2026-11-26) they are 2.1 us for the five allocations (`buffers`), 4.1 us for this module, 1.1 us for the
binding and its checks; of a known call 0.9 us for this module, 1.3 if outputs are given, whose versions
it counts, and 0.2 us for finding it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from ..jit.target import cpu_wave_override
from ..ops import topk_softmax as topk_softmax_op
from ..ops.device import current_device
from ..ops.moe_sorting_opus import moe_sorting_opus_fwd
from ..ops.rule import RoutingRule
from . import dispatch, known
from .autograd import checked, gradients_matter, wrote
from .buffers import (
    BUFFER_NAMES,
    TOPK_NAMES,
    Buffers,
    SortedBuffers,
    TopkOut,
    allocate,
    check_size,
    checked_buffers,
    empty,
    empty_topk,
    five,
    given,
    sorted_layouts,
)
from .launches import launch_chain, launch_fused
from .request import Request, Tensors, rule_key
from .tracing import (
    refuse_some_meta,
    registered,
    simulated,
    traced,
    tracing_state,
    transformed,
    transforms_active,
)

_cpu_wave = cpu_wave_override.get


def empty_sorted_buffers(
    tokens: int,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int = 32,
    *,
    device: torch.device | str | int | None = None,
) -> SortedBuffers:
    """The five outputs of a routing, uninitialised: what `out` of the functions below takes.

    Args:
        tokens: M.
        topk, num_experts, model_dim, moebuf_dtype, block_size: as in `topk_softmax_sorting`.
        device: where; None for the current GPU if there is one, else the CPU.

    Returns:
        sorted_ids int32 [S], sorted_weights float32 [S], sorted_expert_ids int32 [ceil(S / B)],
        num_valid_ids int32 [2], moe_buf [M, D], with S = M*K + E*B - K.

    Raises:
        ValueError, TypeError: a size or the dtype does not fit.
    """
    check_size("tokens", tokens, low=0)
    buffers = checked_buffers(tokens, topk, num_experts, model_dim, moebuf_dtype, block_size)
    chosen = current_device(device)
    return five(empty(sorted_layouts(buffers, chosen), chosen))


def topk_softmax_sorting(
    gating_output: Tensor,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    need_renorm: bool = True,
    block_size: int = 32,
    expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    dispatch_policy: int = 0,
    *,
    out: SortedBuffers | None = None,
) -> SortedBuffers:
    """From router logits to what the expert GEMMs read, in one launch where one can do it.

    Args:
        gating_output: [M, E] float32, float16 or bfloat16 logits; inner stride 1, any row stride.
        topk: K, 1 to min(E, 255).
        num_experts: E, the global number of experts.
        model_dim: D, the width of `moe_buf`.
        moebuf_dtype: dtype of `moe_buf`.
        need_renorm: weights sum to 1 over the chosen experts (True) or over all (False).
        block_size: B, slots per block.
        expert_mask: int32 [E] of 0 and 1, the experts of this rank; None for all.
        num_local_tokens: int32 [1] on the device, the rows that count; None for all.
        dispatch_policy: 0 automatic, 1 the chain with the oneshot sort, 2 the chain with the
            multi-phase sort. The result is the same.
        out: the five tensors to write to, of exactly the shapes, dtypes and device below, contiguous
            and without overlap: those of an earlier call, or `empty_sorted_buffers`. None allocates.

    Returns:
        `out`, or new tensors: sorted_ids int32 [S], sorted_weights float32 [S],
        sorted_expert_ids int32 [ceil(S / B)], num_valid_ids int32 [2], moe_buf [M, D], with
        S = M*K + E*B - K; see `fused_topk_moe_sorting_fwd` for their contents.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing was launched.
        aiter.jit.JitError: a module could not be built or loaded (first call on a device).
    """
    return route(
        (
            topk, num_experts, model_dim, moebuf_dtype, need_renorm, block_size, dispatch_policy,
            "slot",
        ),
        (gating_output, expert_mask, num_local_tokens, None, None, out),
    )  # fmt: skip


def topk_routing_sorting(
    gating_output: Tensor,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    *,
    rule: RoutingRule | None = None,
    correction_bias: Tensor | None = None,
    block_size: int = 32,
    expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    dispatch_policy: int = 0,
    topk_out: TopkOut | None = None,
    id_format: str = "slot",
    out: SortedBuffers | None = None,
) -> SortedBuffers:
    """As `topk_softmax_sorting`, which is its plain case, by any rule.

    Args:
        gating_output: [M, E' + Z] logits, with shared experts that are weighed by their sigmoid
            [M, E' + S]; E' = `num_experts` - S the routed experts, S the shared and Z the zero
            experts of the rule.
        topk: K, the routed experts of a row, 1 to min(E' + Z, 255 - S), and to E' with ids by slot.
        num_experts: E = E' + S.
        rule: None for softmax and top-k, renormalised.
        correction_bias: [E' + Z] float32, float16 or bfloat16, added to the scores for the choice
            alone; None for none.
        topk_out: (weights float32 [M, K+S], ids int32 [M, K+S]), to be written as `topk_routing`
            does, by the same launch; rows from `num_local_tokens` on are left undefined.
        id_format: "slot": `sorted_ids` holds token | slot << 24. "flat": token * (K+S) + slot, with
            blocks for masked-out and zero experts as well, whose expert id is -1: what vLLM's and
            SGLang's Triton experts read.
        The others, the returned tensors and the errors: as in `topk_softmax_sorting`, with K+S in
            place of K, and with E+Z in place of E for flat ids.
    """
    return route(
        (
            topk, num_experts, model_dim, moebuf_dtype, rule_key(rule), block_size,
            dispatch_policy, id_format,
        ),
        (gating_output, expert_mask, num_local_tokens, correction_bias, topk_out, out),
    )  # fmt: skip


def route(fields: tuple[Any, ...], arguments: tuple[Any, ...]) -> SortedBuffers:
    """A routing of logits: a `Request` without its last field, and `Tensors`, as plain tuples."""
    # NOTE: the first half is the beginning of the second, 0.1 us quicker where gradients are off.
    if (is_grad_enabled() or forward_ad._current_level >= 0) and gradients_matter(*arguments):
        arguments = (_checked_gradients(Tensors(*arguments)), *arguments[1:])
    # NOTE: asks what `traced` asks, but for the tensor, which is among what `again` knows a call by.
    runs = not (
        is_dynamo_compiling()
        or _len_torch_dispatch_stack()
        or transforms_active()
        or tracing_state() is not None
    )
    if runs:
        fields = (*fields, _cpu_wave())
        buffers = known.again(fields, *arguments)
        if buffers is not None:
            known.last.path = "fused"
            if arguments[-1] is not None:
                wrote(arguments[-1])
            if arguments[-2] is not None:
                wrote(arguments[-2])
            return buffers
    request = Request(*fields)  # NOTE: a tracer cannot read the override, and has no use for it.
    tensors = Tensors(*arguments)
    gating_output, out = tensors.gating_output, tensors.out
    if simulated(gating_output) if runs else traced(gating_output):
        return _as_traced(request, tensors)
    if not isinstance(gating_output, Tensor) or gating_output.dim() != 2:
        refuse_matrix("gating_output", gating_output)
    has_bias = tensors.correction_bias is not None
    sizes = (gating_output.device, *gating_output.shape, gating_output.dtype, has_bias, *fields)
    plan = known.plan_of("plan_routing", sizes)
    buffers = five(allocate(plan.layouts, gating_output.device)) if out is None else out
    if plan.fused is not None:
        known.again = plan.fused.again
        launch_fused(request, plan, tensors, buffers)
    else:
        launch_chain(request, plan, tensors, buffers)
    known.last.path = plan.path
    count_writes(tensors.topk_out, out)
    return buffers


def _checked_gradients(tensors: Tensors) -> Tensor:
    """The logits, if no gradient of the call's tensors would be lost."""
    return checked(
        tensors.gating_output,
        gating_output=tensors.gating_output,
        correction_bias=tensors.correction_bias,
        **named_outputs(tensors.topk_out, TOPK_NAMES),
        **named_outputs(tensors.out, BUFFER_NAMES),
    )


def count_writes(*given: Sequence[Tensor] | None) -> None:
    """Bumps the version counters of the outputs that the caller gave."""
    for tensors in given:
        if tensors is not None:
            wrote(tensors)


def named_outputs(given: object, names: Sequence[str]) -> dict[str, object]:
    """The outputs that a caller gives, by name; what they are is checked later."""
    return dict(zip(names, given, strict=False)) if isinstance(given, tuple | list) else {}


def moe_sorting(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int = 32,
    expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    dispatch_policy: int = 0,
    *,
    out: SortedBuffers | None = None,
) -> SortedBuffers:
    """Sorts ready top-k ids by expert.

    Args:
        topk_ids: [M, K] int32, contiguous. Ids may repeat in a row: every (token, slot) is an entry,
            ascending by token, then slot, within an expert. Ids outside [0, E) are left out.
        topk_weights: [M, K] float32, contiguous.
        The others, the returned tensors and the errors: as in `topk_softmax_sorting`.
    """
    if gradients_matter(topk_weights, out):
        topk_weights = checked(
            topk_weights, topk_weights=topk_weights, **named_outputs(out, BUFFER_NAMES)
        )
    if traced(topk_ids):
        tensors = {
            "topk_ids": topk_ids, "topk_weights": topk_weights, "expert_mask": expert_mask,
            "num_local_tokens": num_local_tokens, **named_outputs(out, BUFFER_NAMES),
        }  # fmt: skip
        refuse_some_meta(tensors, topk_ids)
        arguments = (
            topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype, block_size, expert_mask,
            num_local_tokens, dispatch_policy,
        )  # fmt: skip
        return _into_or_new("moe_sorting", out, *arguments)
    if not isinstance(topk_ids, Tensor) or topk_ids.dim() != 2:
        refuse_matrix("topk_ids", topk_ids)
    device = topk_ids.device
    sizes = (
        device, *topk_ids.shape, num_experts, model_dim, moebuf_dtype, block_size, dispatch_policy,
    )  # fmt: skip
    path, workspace_bytes, expected, layouts, *_ = known.plan_of("plan_sorting", sizes)
    buffers = five(allocate(layouts, device)) if out is None else given(out, expected)
    workspace = None
    if workspace_bytes:
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
    moe_sorting_opus_fwd(
        topk_ids, topk_weights, *buffers, num_experts, block_size, expert_mask, num_local_tokens,
        workspace, dispatch.POLICY_OF_CHAIN[path],
    )  # fmt: skip
    count_writes(out)
    known.last.path = path
    return buffers


def fused_topk(
    hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """The weights float32 [M, K] and ids int32 [M, K] of the K best experts of every row.

    Args:
        hidden_states: [M, ...], only its number of rows is looked at.
        gating_output: [M, E] float32, float16 or bfloat16 logits; inner stride 1, any row stride.
        topk: K, 1 to min(E, 255).
        renormalize: weights sum to 1 over the chosen experts (True) or over all (False).

    Raises:
        ValueError, TypeError: an argument does not fit; nothing was launched.
        aiter.jit.JitError: the module could not be built or loaded (first call on a device).
    """
    if gradients_matter(gating_output):
        gating_output = checked(gating_output, gating_output=gating_output)
    if traced(gating_output):
        weights, ids = registered("fused_topk")(hidden_states, gating_output, topk, renormalize)
        return weights, ids
    if not isinstance(gating_output, Tensor) or gating_output.dim() != 2:
        refuse_matrix("gating_output", gating_output)
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"hidden_states: expected a tensor, got {type(hidden_states).__name__}")
    if hidden_states.shape[:1] != gating_output.shape[:1]:
        raise ValueError(
            f"hidden_states: expected {gating_output.shape[0]} rows, as gating_output, got shape"
            f" {list(hidden_states.shape)}"
        )
    check_size("topk", topk)
    weights, ids = empty_topk(gating_output.shape[0], topk, gating_output.device)
    topk_softmax_op.topk_softmax(weights, ids, torch.empty_like(ids), gating_output, renormalize)
    return weights, ids


def refuse_matrix(name: str, value: object) -> NoReturn:
    """Raises that a tensor of rank 2 was expected."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    raise ValueError(f"{name}: expected a tensor of rank 2, got shape {list(value.shape)}")


def _as_traced(request: Request, tensors: Tensors) -> SortedBuffers:
    """The call as a tracer is to see it: one registered op, which allocates or writes to `out`."""
    gating_output, expert_mask, num_local_tokens, correction_bias, topk_out, out = tensors
    given_outputs = named_outputs(topk_out, TOPK_NAMES) | named_outputs(out, BUFFER_NAMES)
    refuse_some_meta(tensors._asdict() | given_outputs, gating_output)
    sizes = request[:4]
    later = (request.block_size, expert_mask, num_local_tokens, request.dispatch_policy)
    if (
        isinstance(request.rule, bool)
        and request.id_format == "slot"
        and correction_bias is None
        and topk_out is None
    ):
        plain = (*sizes, request.rule, *later)
        return _into_or_new("topk_softmax_sorting", out, gating_output, *plain)
    rule = [float(number) for number in request.full_rule.packed]
    arguments = (gating_output, *sizes, rule, correction_bias, *later, request.id_format)
    if topk_out is None:
        return _into_or_new("topk_routing_sorting", out, *arguments)
    if out is None and transformed():
        # NOTE: what is allocated here would be one for all that vmap maps over.
        by_rule = {"rule": rule, "correction_bias": correction_bias}
        registered("topk_routing")(*topk_out, gating_output, **by_rule)
        return _into_or_new("topk_routing_sorting", out, *arguments)
    if out is None:
        buffers = Buffers.of(
            gating_output.shape[0], request.num_slots, request.num_sorted_experts,
            request.model_dim, request.moebuf_dtype, request.block_size,
        )  # fmt: skip
        out = five(empty(sorted_layouts(buffers, gating_output.device), gating_output.device))
    weights, ids = topk_out
    named = dict(zip(BUFFER_NAMES, out, strict=True))
    registered("topk_routing_sorting_out")(*arguments, **named, topk_weights=weights, topk_ids=ids)
    return out


def _into_or_new(name: str, out: SortedBuffers | None, *arguments: Any) -> SortedBuffers:
    """What the registered op `name` returns, or `out`, which its namesake with `_out` writes to."""
    if out is None:
        return five(registered(name)(*arguments))
    registered(f"{name}_out")(*arguments, **dict(zip(BUFFER_NAMES, out, strict=True)))
    return out
