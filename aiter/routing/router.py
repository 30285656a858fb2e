"""From hidden states to the buffers that the expert GEMMs read.

Up to `dispatch.MOST_ROUTER_TOKENS` tokens one launch makes the router's product and routes by it
(`ops.fused_router_sorting`), where `dispatch.choose_router` takes that for the fastest. Else the product
is a launch of its own, whose logits `calls.topk_routing_sorting` routes: ours, in the same order of
additions, where the bits are promised, and else PyTorch's, which is the faster for many rows.

As in `calls`, a call with a launch of ours is first looked for among the known ones
(`known.router_again`). That is all where there is one launch. Where the product is a launch of its own,
that launch is what is remembered, of a call whose arguments all passed, and the routing behind it is a
known call of `calls`. On the CPU of an AMD EPYC (2026-11-27, `python op_tests/bench_host.py --tokens 1`,
fastest rounds) a known call takes 2.0 us for this module, 0.25 us for finding it and 2.5 us for six
allocations, beside its launch; when it was checked and bound anew every time, all of that took 11.7 us.

Rejected: a known call that holds both launches of the other way, as the second belongs to another
compiled module, whose own table knows it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..jit.target import cpu_wave_override
from ..ops.fused_router_sorting import (
    fused_router_sorting_check,
    fused_router_sorting_fwd,
    router_product,
)
from ..ops.rule import RoutingRule
from . import known
from .autograd import checked, gradients_matter
from .buffers import (
    BUFFER_NAMES,
    TOPK_NAMES,
    Buffers,
    SortedBuffers,
    TopkOut,
    allocate,
    empty,
    five,
    given,
    sorted_layouts,
)
from .calls import count_writes, named_outputs, refuse_matrix, route
from .plan import Plan, Router
from .request import CPU_WAVE, Request, rule_key
from .tracing import recorded, refuse_some_meta, registered, simulated, traced, transformed

# PyTorch from 2.8 on, for GPUs: a product of 16-bit matrices that is not rounded to them.
_MM: Any = torch.ops.aten.mm
_HAS_F32_RESULT = "dtype" in _MM.overloads()


def router_topk_sorting(
    hidden_states: Tensor,
    router_weight: Tensor,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    *,
    router_bias: Tensor | None = None,
    rule: RoutingRule | None = None,
    correction_bias: Tensor | None = None,
    logits_out: Tensor | None = None,
    block_size: int = 32,
    expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    dispatch_policy: int = 0,
    topk_out: TopkOut | None = None,
    id_format: str = "slot",
    batch_invariant: bool = False,
    out: SortedBuffers | None = None,
) -> SortedBuffers:
    """As `topk_routing_sorting` of the logits hidden_states @ router_weight.T + router_bias.

    Logits are float32 and are not rounded to another type. Up to M = 64, and for every M with
    `batch_invariant`, they are added up in the order of docs/contract.md, so that the bits of a row's
    logits do not depend on M, on other rows, on the device or on what else is asked for; up to there
    one launch does everything (`last_path()` is "router") where dispatch finds that the fastest, and
    else our own product is launched first. Beyond, PyTorch makes the product, with a
    float32 result, whose bits may differ: they follow its own choice of kernel and its settings.

    Args:
        hidden_states: [M, D'] float32, float16 or bfloat16; inner stride 1, any row stride.
        router_weight: [E', D'] float32, float16 or bfloat16; inner stride 1, any row stride. E' is the
            width that `topk_routing_sorting` expects of logits: `num_experts` without shared and zero
            experts in the rule.
        model_dim: D, the width of `moe_buf`.
        router_bias: [E'] float32, float16 or bfloat16, contiguous, added to the logits; None for none.
        logits_out: float32 [M, E'], to be written: inner stride 1, rows that do not overlap. Rows from
            `num_local_tokens` on are left undefined. None for none.
        dispatch_policy: as in `topk_routing_sorting`; 1 and 2 force the chain behind the product.
        batch_invariant: see above.
        topk, num_experts, moebuf_dtype, rule, correction_bias, block_size, expert_mask,
            num_local_tokens, topk_out, id_format, out: as in `topk_routing_sorting`.

    Returns:
        As `topk_routing_sorting`.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing was launched.
        aiter.jit.JitError: a module could not be built or loaded (first call on a device).
    """
    fields: tuple[Any, ...] = (
        topk, num_experts, model_dim, moebuf_dtype, rule_key(rule), block_size, dispatch_policy,
        id_format,
    )  # fmt: skip
    written = (topk_out, out, logits_out)
    if gradients_matter(hidden_states, router_weight, router_bias, correction_bias, *written):
        hidden_states = checked(
            hidden_states, hidden_states=hidden_states, router_weight=router_weight,
            router_bias=router_bias, correction_bias=correction_bias, logits_out=logits_out,
            **named_outputs(topk_out, TOPK_NAMES), **named_outputs(out, BUFFER_NAMES),
        )  # fmt: skip
    read = (router_bias, expert_mask, num_local_tokens, correction_bias)
    runs = not recorded()
    if runs:
        fields = (*fields, cpu_wave_override.get())
        found = known.router_again(
            (*fields, batch_invariant), hidden_states, router_weight, *read, *written
        )
        if found is not None:
            return _routed(fields, found, read, written)
    request = Request(*fields)  # NOTE: a tracer cannot read the override, and has no use for it.
    if simulated(hidden_states) if runs else traced(hidden_states):
        return _as_traced(request, hidden_states, router_weight, read, batch_invariant, written)
    if not isinstance(hidden_states, Tensor) or hidden_states.dim() != 2:
        refuse_matrix("hidden_states", hidden_states)
    if not isinstance(router_weight, Tensor) or router_weight.dim() != 2:
        refuse_matrix("router_weight", router_weight)
    device = hidden_states.device
    sizes = (device, *hidden_states.shape, router_weight.shape[0], batch_invariant, *fields)
    plan = known.plan_of("plan_router", sizes)
    router = cast(Router, plan.router)  # plans of hidden states have one
    buffers = five(allocate(plan.layouts, device)) if out is None else out
    (logits,) = allocate(router.layouts, device) if logits_out is None else (logits_out,)
    in_one = plan.path == "router"
    if router.calls is not None:
        known.router_again = router.calls.again
    if router.calls is None or not router.calls.into(
        (*request, batch_invariant), hidden_states, router_weight, *read, topk_out, buffers, logits,
        plan.buffers, plan.layouts if out is None else None,
        router.layouts if logits_out is None else None, in_one,
    ):  # fmt: skip
        _launch(request, plan, hidden_states, router_weight, read, (topk_out, buffers, logits))
    return _routed(request, (buffers, None if in_one else logits), read, written)


def _routed(
    fields: tuple[Any, ...],
    found: tuple[SortedBuffers, Tensor | None],
    read: tuple[Tensor | None, ...],
    written: tuple[TopkOut | None, SortedBuffers | None, Tensor | None],
) -> SortedBuffers:
    """The sorted buffers, once the launch is made; of the logits, if they are still to be routed."""
    buffers, logits = found
    topk_out, out, logits_out = written
    _, *others = read
    if logits is None:
        known.last.path = "router"
        count_writes(topk_out, out)
    else:
        route(tuple(fields[:CPU_WAVE]), (logits, *others, topk_out, buffers))
    if logits_out is not None:
        count_writes((logits_out,))
    return buffers


def _launch(
    request: Request,
    plan: Plan,
    hidden_states: Tensor,
    router_weight: Tensor,
    read: tuple[Tensor | None, ...],
    written: tuple[TopkOut | None, SortedBuffers, Tensor],
) -> None:
    """One launch, or the product alone, of a call that is not to be remembered."""
    router_bias, expert_mask, num_local_tokens, correction_bias = read
    topk_out, out, logits = written
    buffers = given(out, plan.buffers)
    in_one = plan.path == "router"
    run = fused_router_sorting_fwd if in_one else fused_router_sorting_check
    run(
        hidden_states, router_weight, logits, *buffers, request.num_experts, request.topk,
        request.block_size, router_bias=router_bias, rule=request.rule,
        correction_bias=correction_bias, local_expert_mask=expert_mask,
        num_local_tokens=num_local_tokens, topk_out=topk_out, id_format=request.id_format,
    )  # fmt: skip
    if in_one:
        return
    if cast(Router, plan.router).calls is None:
        _product_by_pytorch(hidden_states, router_weight, router_bias, logits)
    else:
        router_product(hidden_states, router_weight, logits, router_bias=router_bias)


def _product_by_pytorch(
    hidden_states: Tensor, router_weight: Tensor, router_bias: Tensor | None, logits: Tensor
) -> None:
    """Writes hidden_states @ router_weight.T + router_bias, in float32, to `logits`."""
    columns = router_weight.t()
    is_16_bit = hidden_states.dtype == columns.dtype != torch.float32
    if is_16_bit and hidden_states.is_cuda and _HAS_F32_RESULT:
        mm: Any = torch.mm
        product = mm(hidden_states, columns, out_dtype=torch.float32)
    else:
        product = hidden_states.float() @ columns.float()
    if router_bias is None:
        logits.copy_(product)
    else:
        torch.add(product, router_bias.float(), out=logits)


def _as_traced(
    request: Request,
    hidden_states: Tensor,
    router_weight: Tensor,
    read: tuple[Tensor | None, ...],
    batch_invariant: bool,
    written: tuple[TopkOut | None, SortedBuffers | None, Tensor | None],
) -> SortedBuffers:
    """The call as a tracer is to see it: one registered op, which allocates or writes to `out`."""
    router_bias, expert_mask, num_local_tokens, correction_bias = read
    topk_out, out, logits_out = written
    tensors = {
        "hidden_states": hidden_states, "router_weight": router_weight, "router_bias": router_bias,
        "correction_bias": correction_bias, "expert_mask": expert_mask,
        "num_local_tokens": num_local_tokens, "logits_out": logits_out,
        **named_outputs(topk_out, TOPK_NAMES), **named_outputs(out, BUFFER_NAMES),
    }  # fmt: skip
    refuse_some_meta(tensors, hidden_states)
    arguments = (
        hidden_states, router_weight, *request[:4],
        [float(number) for number in request.full_rule.packed], router_bias, correction_bias,
        request.block_size, expert_mask, num_local_tokens, request.dispatch_policy,
        request.id_format, batch_invariant,
    )  # fmt: skip
    if written == (None, None, None):
        return five(registered("router_topk_sorting")(*arguments))
    if out is None:
        buffers = Buffers.of(
            hidden_states.shape[0], request.num_slots, request.num_sorted_experts,
            request.model_dim, request.moebuf_dtype, request.block_size,
        )  # fmt: skip
        layouts = sorted_layouts(buffers, hidden_states.device)
        if (
            transformed()
        ):  # NOTE: of the hidden states, so that torch.func.vmap has outputs per slice.
            made = (
                hidden_states.new_empty(shape, dtype=dtype) for shape, _, dtype in layouts.tensors
            )
            out = five(tuple(made))
        else:
            out = five(empty(layouts, hidden_states.device))
    weights, ids = topk_out or (None, None)
    registered("router_topk_sorting_out")(
        *arguments, **dict(zip(BUFFER_NAMES, out, strict=True)), topk_weights=weights,
        topk_ids=ids, logits_out=logits_out,
    )  # fmt: skip
    return out
