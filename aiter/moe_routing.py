"""From router logits, or ready top-k ids, to the buffers that the expert GEMMs read: which launches?

Allocates the outputs, picks the path and calls the ops. `last_path()` tells which path the calling
thread's last call took; a failure in a path is raised, never answered by another path. Under a
tracer each function is one node, the registered op of its name (see `aiter.torch_ops`).
`aiter.fused_moe` is where callers find these functions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from aiter import dispatch
from aiter.ops.fused_topk_moe_sorting import fused_topk_moe_sorting_max_tokens
from aiter.ops.moe_sorting_opus import (
    moe_sorting_opus_check,
    moe_sorting_opus_get_workspace_size,
)
from aiter.torch_ops import (
    empty_sorted,
    empty_topk,
    fused_topk_moe_sorting_fwd,
    moe_sorting_opus_fwd,
    topk_softmax,
    traced,
)

SortedBuffers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class _Last(threading.local):
    path: dispatch.Path | None = None


_last = _Last()
_max_tokens: dict[tuple[torch.device, int, int], int] = {}


def last_path() -> dispatch.Path | None:
    """Which path this thread's last routing took: "fused", "oneshot", "multiphase"; None for none."""
    return _last.path


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

    Returns:
        sorted_ids int32 [S], sorted_weights float32 [S], sorted_expert_ids int32 [ceil(S / B)],
        num_valid_ids int32 [2], moe_buf [M, D], with S = M*K + E*B - K; see
        `fused_topk_moe_sorting_fwd` for their contents.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing was launched.
        aiter.jit.JitError: a module could not be built or loaded (first call on a device).
    """
    if traced(gating_output):
        return _as_five(
            torch.ops.aiter.topk_softmax_sorting(
                gating_output, topk, num_experts, model_dim, moebuf_dtype, need_renorm,
                block_size, expert_mask, num_local_tokens, dispatch_policy,
            )
        )  # fmt: skip
    dispatch.check_policy(dispatch_policy)
    _check_matrix("gating_output", gating_output)
    tokens, width = gating_output.shape
    if width != num_experts:
        raise ValueError(
            f"gating_output: expected shape [any, num_experts = {num_experts}], got"
            f" {list(gating_output.shape)}"
        )
    buffers = _allocate(
        gating_output, tokens, topk, num_experts, model_dim, moebuf_dtype, block_size
    )
    if dispatch_policy == dispatch.AUTOMATIC:
        key = (gating_output.device, num_experts, topk)
        most = _max_tokens.get(key)
        if most is None:
            most = fused_topk_moe_sorting_max_tokens(num_experts, topk, device=gating_output.device)
            _max_tokens[key] = most
        if dispatch.takes_fused(dispatch_policy, tokens, most):
            fused_topk_moe_sorting_fwd(
                gating_output,
                *buffers,
                num_experts,
                topk,
                block_size,
                need_renorm,
                local_expert_mask=expert_mask,
                num_local_tokens=num_local_tokens,
            )
            _last.path = "fused"
            return buffers
    weights, ids, token_expert_ids = _allocate_topk(gating_output, topk)
    sort = _sort_call(
        ids, weights, buffers, num_experts, block_size, expert_mask, num_local_tokens,
        dispatch_policy,
    )  # fmt: skip
    # NOTE: nothing may be launched before every argument is known to be good.
    sort(moe_sorting_opus_check)
    topk_softmax(weights, ids, token_expert_ids, gating_output, need_renorm)
    _last.path = sort(moe_sorting_opus_fwd)
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
) -> SortedBuffers:
    """Sorts ready top-k ids by expert.

    Args:
        topk_ids: [M, K] int32, contiguous, distinct in a row.
        topk_weights: [M, K] float32, contiguous.
        The others, the returned tensors and the errors: as in `topk_softmax_sorting`.
    """
    if traced(topk_ids):
        return _as_five(
            torch.ops.aiter.moe_sorting(
                topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype, block_size,
                expert_mask, num_local_tokens, dispatch_policy,
            )
        )  # fmt: skip
    dispatch.check_policy(dispatch_policy)
    _check_matrix("topk_ids", topk_ids)
    tokens, topk = topk_ids.shape
    buffers = _allocate(topk_ids, tokens, topk, num_experts, model_dim, moebuf_dtype, block_size)
    sort = _sort_call(
        topk_ids, topk_weights, buffers, num_experts, block_size, expert_mask, num_local_tokens,
        dispatch_policy,
    )  # fmt: skip
    _last.path = sort(moe_sorting_opus_fwd)
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
    _check_matrix("gating_output", gating_output)
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"hidden_states: expected a tensor, got {type(hidden_states).__name__}")
    if hidden_states.shape[0] != gating_output.shape[0]:
        raise ValueError(
            f"hidden_states: expected {gating_output.shape[0]} rows, as gating_output, got shape"
            f" {list(hidden_states.shape)}"
        )
    _check_positive("topk", topk)
    weights, ids, token_expert_ids = _allocate_topk(gating_output, topk)
    topk_softmax(weights, ids, token_expert_ids, gating_output, renormalize)
    return weights, ids


def _check_matrix(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected a tensor of rank 2, got shape {list(tensor.shape)}")


def _check_positive(name: str, value: int, low: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value < 2**31:
        raise ValueError(f"{name}: expected a value from {low} to {2**31 - 1}, got {value}")


def _allocate(
    like: Tensor,
    tokens: int,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int,
) -> SortedBuffers:
    """The five outputs, uninitialised. Checks only what their sizes are computed from."""
    _check_positive("topk", topk)
    _check_positive("num_experts", num_experts)
    _check_positive("block_size", block_size)
    _check_positive("model_dim", model_dim, low=0)
    if topk > num_experts:
        raise ValueError(f"topk: expected at most num_experts = {num_experts}, got {topk}")
    if not isinstance(moebuf_dtype, torch.dtype):
        raise TypeError(f"moebuf_dtype: expected a torch.dtype, got {type(moebuf_dtype).__name__}")
    slots = tokens * topk + num_experts * block_size - topk
    if slots >= 2**31:
        raise ValueError(
            f"block_size: expected M*topk + num_experts*block_size - topk below {2**31}, got {slots}"
        )
    return empty_sorted(like, topk, num_experts, model_dim, moebuf_dtype, block_size)


def _allocate_topk(gating_output: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    weights, ids = empty_topk(gating_output, topk)
    return weights, ids, torch.empty_like(ids)


def _as_five(outputs: tuple[Tensor, ...]) -> SortedBuffers:
    first, second, third, fourth, fifth = outputs
    return first, second, third, fourth, fifth


def _sort_call(
    topk_ids: Tensor,
    topk_weights: Tensor,
    buffers: SortedBuffers,
    num_experts: int,
    block_size: int,
    expert_mask: Tensor | None,
    num_local_tokens: Tensor | None,
    dispatch_policy: int,
) -> Callable[[Callable[..., None]], dispatch.Path]:
    """A call of the sort or of its check, workspace included; tells which path it is."""
    tokens, topk = topk_ids.shape
    workspace_bytes = moe_sorting_opus_get_workspace_size(
        tokens, num_experts, topk, dispatch_policy, device=topk_ids.device
    )
    workspace = None
    if workspace_bytes:
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=topk_ids.device)

    def call(op: Callable[..., None]) -> dispatch.Path:
        op(
            topk_ids,
            topk_weights,
            *buffers,
            num_experts,
            block_size,
            expert_mask,
            num_local_tokens,
            workspace,
            dispatch_policy,
        )
        return dispatch.chain_path(workspace_bytes)

    return call
