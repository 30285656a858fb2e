"""From router logits, or ready top-k ids, to the buffers that the expert GEMMs read: which launches?

Allocates the outputs unless the caller gives some, and calls the ops on the path that the call's
plan names (`aiter.routing.plan`). `last_path()` tells which path the calling thread's last call
took; a failure in a path is raised, never answered by another path. Under a tracer each function is
one node, the registered op of its name (see `aiter.routing.graph`). `aiter.fused_moe` is where callers
find these functions.

Host time is what a decode step pays per layer. A first eager call looks its plan up, allocates and
goes to the binding, which checks the tensors. The plan holds the binding's function, which saves the
0.7 us of an op's Python function, and that function compares the sizes of given outputs, which takes
0.5 us in Python. A call that took the fused launch is remembered: `_again`, of the module that was
called last, knows one like it by its arguments and by what the tensors are like at that moment
(`csrc/include/known_calls.h`), allocates unless there is `out`, and launches, without a lookup or a
check. So nothing that only a first call needs stands before `_again`.

`python op_tests/bench_host.py --tokens 1` prints the pieces; on the CPU of an AMD EPYC (2026-11-23)
they are 1.9 us for the five allocations (`routing.buffers`), 1.7 us for this module, 1.0 us for the
binding and its checks; of a known call 0.4 us for this module and 0.4 us for finding it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.compiler import is_dynamo_compiling

from ..jit.target import cpu_wave_override
from ..ops.device import current_device
from ..ops.fused_topk_moe_sorting import FusedAgain
from . import dispatch
from .buffers import (
    BUFFER_NAMES,
    SortedBuffers,
    allocate,
    empty,
    five,
    given,
    sorted_layouts,
)
from .graph import (
    empty_topk,
    fused_topk_moe_sorting_fwd,
    moe_sorting_opus_fwd,
    topk_softmax,
    traced,
)
from .plan import Chain, Plan, check_size, plan_routing, plan_sorting, sorted_buffers

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper

_cpu_wave = cpu_wave_override.get


class _Last(threading.local):
    path: dispatch.Path | None = None


_last = _Last()


def _never(*arguments: object) -> None:
    return None


_again: FusedAgain = _never  # of the module that was called last


def last_path() -> dispatch.Path | None:
    """Which path this thread's last routing took: "fused", "oneshot", "multiphase"; None for none."""
    return _last.path


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
    buffers = sorted_buffers(tokens, topk, num_experts, model_dim, moebuf_dtype, block_size)
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
    global _again
    # NOTE: asks what `traced` asks, but for the type of the tensor, which is among what `_again` knows
    # a call by.
    if not is_dynamo_compiling() and not _len_torch_dispatch_stack():
        buffers = _again(
            gating_output, topk, num_experts, model_dim, moebuf_dtype, need_renorm, block_size,
            expert_mask, num_local_tokens, dispatch_policy, out, _cpu_wave(),
        )  # fmt: skip
        if buffers is not None:
            _last.path = "fused"
            return buffers
    if traced(gating_output):
        return _as_traced(
            "topk_softmax_sorting", out,
            gating_output, topk, num_experts, model_dim, moebuf_dtype, need_renorm, block_size,
            expert_mask, num_local_tokens, dispatch_policy,
        )  # fmt: skip
    if not isinstance(gating_output, Tensor) or gating_output.dim() != 2:
        _refuse_matrix("gating_output", gating_output)
    device, cpu_wave = gating_output.device, _cpu_wave()
    tokens, width = gating_output.shape
    sizes = (
        device, cpu_wave, tokens, width, topk, num_experts, model_dim, moebuf_dtype, block_size,
        dispatch_policy, gating_output.dtype,
    )  # fmt: skip
    path, _, expected, layouts, fused, chain = _known(plan_routing, sizes)
    buffers = five(allocate(layouts, device)) if out is None else out
    if fused is not None:
        into, _again = fused
        plain = (
            topk, num_experts, model_dim, moebuf_dtype, need_renorm, block_size, dispatch_policy,
            cpu_wave,
        )  # fmt: skip
        # NOTE: checks the outputs' sizes, too, in 0.05 us; in Python that takes 0.5 us.
        if not into(
            gating_output, buffers, expected, num_experts, topk, block_size, need_renorm,
            expert_mask, num_local_tokens, plain, layouts if out is None else None,
        ):  # fmt: skip
            buffers = given(buffers, expected)
            fused_topk_moe_sorting_fwd(
                gating_output, *buffers, num_experts, topk, block_size, need_renorm,
                local_expert_mask=expert_mask, num_local_tokens=num_local_tokens,
            )  # fmt: skip
    else:
        select, check, sort, scratch = cast(Chain, chain)  # a plan has one or the other
        if out is not None:
            given(out, expected)
        weights, ids, sources, *workspace = allocate(scratch, device)
        sorting = (
            ids, weights, *buffers, num_experts, block_size, expert_mask, num_local_tokens,
            workspace[0] if workspace else None, dispatch.POLICY_OF_CHAIN[path],
        )  # fmt: skip
        # NOTE: nothing may be launched before every argument is known to be good.
        check(*sorting)
        select(weights, ids, sources, gating_output, need_renorm)
        sort(*sorting)
    _last.path = path
    return buffers


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
        topk_ids: [M, K] int32, contiguous, distinct in a row.
        topk_weights: [M, K] float32, contiguous.
        The others, the returned tensors and the errors: as in `topk_softmax_sorting`.
    """
    if traced(topk_ids):
        return _as_traced(
            "moe_sorting", out,
            topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype, block_size, expert_mask,
            num_local_tokens, dispatch_policy,
        )  # fmt: skip
    if not isinstance(topk_ids, Tensor) or topk_ids.dim() != 2:
        _refuse_matrix("topk_ids", topk_ids)
    device = topk_ids.device
    tokens, topk = topk_ids.shape
    sizes = (
        device, tokens, topk, num_experts, model_dim, moebuf_dtype, block_size, dispatch_policy,
    )  # fmt: skip
    path, workspace_bytes, expected, layouts, *_ = _known(plan_sorting, sizes)
    buffers = five(allocate(layouts, device)) if out is None else given(out, expected)
    moe_sorting_opus_fwd(
        topk_ids, topk_weights, *buffers, num_experts, block_size, expert_mask, num_local_tokens,
        _workspace(workspace_bytes, device), dispatch.POLICY_OF_CHAIN[path],
    )  # fmt: skip
    _last.path = path
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
    if traced(gating_output):
        weights, ids = torch.ops.aiter.fused_topk(hidden_states, gating_output, topk, renormalize)
        return weights, ids
    if not isinstance(gating_output, Tensor) or gating_output.dim() != 2:
        _refuse_matrix("gating_output", gating_output)
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"hidden_states: expected a tensor, got {type(hidden_states).__name__}")
    if hidden_states.shape[:1] != gating_output.shape[:1]:
        raise ValueError(
            f"hidden_states: expected {gating_output.shape[0]} rows, as gating_output, got shape"
            f" {list(hidden_states.shape)}"
        )
    check_size("topk", topk)
    weights, ids = empty_topk(gating_output, topk)
    topk_softmax(weights, ids, torch.empty_like(ids), gating_output, renormalize)
    return weights, ids


def _refuse_matrix(name: str, value: object) -> NoReturn:
    """Raises that a tensor of rank 2 was expected."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    raise ValueError(f"{name}: expected a tensor of rank 2, got shape {list(value.shape)}")


def _known(plan_for: _lru_cache_wrapper[Plan], sizes: tuple[Any, ...]) -> Plan:
    """The plan of a call, from the memo if it was asked for before."""
    try:
        return plan_for(*sizes)
    except TypeError:
        pass
    # NOTE: an argument of the wrong type, or one that no memo can look up, such as a list: made
    # without the memo, the plan says which.
    return plan_for.__wrapped__(*sizes)


def _workspace(num_bytes: int, device: torch.device) -> Tensor | None:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device) if num_bytes else None


def _as_traced(name: str, out: SortedBuffers | None, *arguments: Any) -> SortedBuffers:
    """The call as a tracer is to see it: one registered op, which allocates or writes to `out`."""
    if out is None:
        first, second, third, fourth, fifth = getattr(torch.ops.aiter, name)(*arguments)
        return first, second, third, fourth, fifth
    named = dict(zip(BUFFER_NAMES, out, strict=True))
    getattr(torch.ops.aiter, f"{name}_out")(*arguments, **named)
    return out
