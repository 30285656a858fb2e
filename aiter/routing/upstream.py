"""What do the sort and the top-k of ROCm's aiter take beyond ours, and how is it had here?

`docs/rocm_aiter_names.md` pins the state of ROCm's aiter that is meant, with every argument. What the
sort's kernels do not write themselves follows from what they do, by small PyTorch operations on the
device, without a wait for it; only calls that ask for it pay:

    local_topk_ids [M, K]   the id within expert_mask's ones, -1 where the mask has a 0
    m_indices [S]           the token of every sorted slot, n in padding
    reverse_sorted [M * K]  the sorted slot of every (token, slot); of those without one, -1

Rejected: the same in the kernels, four more pointers in every sort for what this project's layer and
the grouped products of other engines do not read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.moe_sorting_opus import moe_sorting_opus_get_workspace_size
from .arguments import check_apart, check_bool, check_strided, check_topk, is_matrix
from .autograd import checked
from .buffers import TOKEN_BITS, TOKEN_MASK, SortedBuffers
from .calls import fused_topk as _fused_topk
from .calls import moe_sorting as _moe_sorting
from .graph import moe_sorting_opus_fwd as _moe_sorting_opus_fwd
from .graph import topk_softmax
from .tracing import traced, transformed


def moe_sorting_opus_fwd(
    topk_ids: Tensor,
    topk_weights: Tensor,
    sorted_token_ids: Tensor,
    sorted_weights: Tensor,
    sorted_expert_ids: Tensor,
    num_valid_ids: Tensor,
    moe_buf: Tensor,
    num_experts: int,
    unit_size: int,
    local_expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    workspace: Tensor | None = None,
    dispatch_policy: int = 0,
    local_topk_ids: Tensor | None = None,
    m_indices: Tensor | None = None,
    reverse_sorted: Tensor | None = None,
) -> None:
    """Sorts the entries (token, slot) of `topk_ids` by expert into blocks of `unit_size` slots.

    Args:
        topk_ids: [M, K] int32, contiguous. Ids may repeat in a row: every (token, slot) is an entry,
            ascending by token, then slot, within an expert. Ids outside [0, E) are left out.
        topk_weights: [M, K] float32, contiguous.
        sorted_token_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf: outputs, as in
            `fused_topk_moe_sorting_fwd`.
        num_experts: E, at most 4096.
        unit_size: B, slots per block.
        local_expert_mask, num_local_tokens: as in `fused_topk_moe_sorting_fwd`.
        workspace: at least `moe_sorting_opus_get_workspace_size(M, E, K, dispatch_policy)` bytes,
            any dtype, aligned to 4 bytes; None where that is 0. Its contents do not matter.
        dispatch_policy: 0 automatic, 1 one workgroup ("oneshot"), 2 multi-phase. The result is the
            same.
        local_topk_ids: out, int32 [M, K], or None: the ids within the mask's ones, -1 where the mask
            has 0 or the id is no expert's; rows from `num_local_tokens` on are undefined.
        m_indices: out, int32, as many as `sorted_token_ids`, or None: the token of every slot in use,
            n in padding.
        reverse_sorted: out, int32 [M * K], or None: the slot of entry (t, k) at t * K + k, -1 for what
            has no entry.

    With the last three None nothing is allocated; they cost a few PyTorch operations each.

    Raises:
        ValueError: an argument does not fit.
        TypeError: an argument is of the wrong Python type.
        aiter.jit.JitError: the module could not be built or loaded (first call on a device).
    """
    extras = {
        "local_topk_ids": local_topk_ids, "m_indices": m_indices, "reverse_sorted": reverse_sorted,
    }  # fmt: skip
    if any(extra is not None for extra in extras.values()):
        _check_extras(
            extras, topk_ids=topk_ids, topk_weights=topk_weights, sorted_token_ids=sorted_token_ids,
            sorted_weights=sorted_weights, sorted_expert_ids=sorted_expert_ids,
            num_valid_ids=num_valid_ids, moe_buf=moe_buf, local_expert_mask=local_expert_mask,
            num_local_tokens=num_local_tokens, workspace=workspace,
        )  # fmt: skip
    _moe_sorting_opus_fwd(
        topk_ids, topk_weights, sorted_token_ids, sorted_weights, sorted_expert_ids, num_valid_ids,
        moe_buf, num_experts, unit_size, local_expert_mask, num_local_tokens, workspace,
        dispatch_policy,
    )  # fmt: skip
    if local_topk_ids is not None:
        local_topk_ids.copy_(_local_ids(topk_ids, num_experts, local_expert_mask))
    if m_indices is not None:
        m_indices.copy_(sorted_token_ids & TOKEN_MASK)
    if reverse_sorted is not None:
        reverse_sorted.copy_(_reverse(sorted_token_ids, num_valid_ids, topk_ids))


def moe_sorting_fwd(
    topk_ids: Tensor,
    topk_weights: Tensor,
    sorted_token_ids: Tensor,
    sorted_weights: Tensor,
    sorted_expert_ids: Tensor,
    num_valid_ids: Tensor,
    moe_buf: Tensor,
    num_experts: int,
    unit_size: int,
    local_expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    dispatch_policy: int = 0,
) -> None:
    """As `moe_sorting_opus_fwd`, with a workspace that is allocated here where one is wanted.

    Raises:
        As `moe_sorting_opus_fwd`.
    """
    workspace = None
    if traced(topk_ids) and isinstance(moe_buf, Tensor) and moe_buf.dim() == 2:
        # NOTE: the size of the workspace is asked of the compiled module, into which no tracer sees.
        out = (sorted_token_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf)
        _moe_sorting(
            topk_ids, topk_weights, num_experts, moe_buf.shape[1], moe_buf.dtype, unit_size,
            local_expert_mask, num_local_tokens, dispatch_policy, out=out,
        )  # fmt: skip
        return
    if is_matrix(topk_ids):
        tokens, topk = topk_ids.shape
        size = moe_sorting_opus_get_workspace_size(
            tokens, num_experts, topk, dispatch_policy, device=topk_ids.device
        )
        if size:
            workspace = torch.empty(size, dtype=torch.uint8, device=topk_ids.device)
    _moe_sorting_opus_fwd(
        topk_ids, topk_weights, sorted_token_ids, sorted_weights, sorted_expert_ids, num_valid_ids,
        moe_buf, num_experts, unit_size, local_expert_mask, num_local_tokens, workspace,
        dispatch_policy,
    )  # fmt: skip


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
    return_local_topk_ids: bool = False,
    accumulate: bool = True,
    flat: bool = False,
    output_aux: bool = False,
    *,
    out: SortedBuffers | None = None,
) -> Any:
    """Sorts ready top-k ids by expert.

    Args:
        topk_ids: [M, K] int32, contiguous. Ids may repeat in a row: every (token, slot) is an entry,
            ascending by token, then slot, within an expert. Ids outside [0, E) are left out.
        topk_weights: [M, K] float32, contiguous.
        return_local_topk_ids: return local_topk_ids int32 [M, K] behind the five tensors: the ids
            within the mask's ones, -1 for others.
        accumulate: False asks for no `moe_buf`, where there is no `expert_mask`: the fifth tensor is of
            shape [0, 0] then. With `out`, True.
        flat: False: unsorted input is for kernels that sort by themselves, of which there are none here.
        output_aux: return m_indices int32 [S] and reverse_sorted int32 [M * K] behind the five tensors
            (and not local_topk_ids): see `moe_sorting_opus_fwd`.
        The others, the five returned tensors and the errors: as in `topk_softmax_sorting`.
    """
    flags = {
        "return_local_topk_ids": return_local_topk_ids, "accumulate": accumulate, "flat": flat,
        "output_aux": output_aux,
    }  # fmt: skip
    for name, flag in flags.items():
        check_bool(name, flag)
    if flat:
        raise ValueError(
            "flat: expected False, as no kernel here takes unsorted ids in place of sorted ones, got"
            f" {flat!r}"
        )
    placeholder = not accumulate and expert_mask is None
    if placeholder and out is not None:
        raise ValueError("accumulate: expected True where out gives a moe_buf, got False")
    buffers = _moe_sorting(
        topk_ids, topk_weights, num_experts, 0 if placeholder else model_dim, moebuf_dtype,
        block_size, expert_mask, num_local_tokens, dispatch_policy, out=out,
    )  # fmt: skip
    if placeholder:
        buffers = (*buffers[:4], buffers[4].new_empty((0, 0)))
    if output_aux:
        ids, _, _, counts, _ = buffers
        return (*buffers, ids & TOKEN_MASK, _reverse(ids, counts, topk_ids))
    if return_local_topk_ids:
        return (*buffers, _local_ids(topk_ids, num_experts, expert_mask))
    return buffers


def fused_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    topk_ids: Tensor | None = None,
    topk_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights float32 [M, K] and ids int32 [M, K] of the K best experts of every row.

    Args:
        hidden_states: [M, ...], only its number of rows is looked at.
        gating_output: [M, E] float32, float16 or bfloat16 logits; inner stride 1, any row stride.
        topk: K, 1 to min(E, 255).
        renormalize: weights sum to 1 over the chosen experts (True) or over all (False).
        topk_ids, topk_weights: int32 and float32 [M or more, K], contiguous, to write the first M rows
            of, which are returned; None allocates.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing was launched.
        aiter.jit.JitError: the module could not be built or loaded (first call on a device).
    """
    if topk_ids is None and topk_weights is None:
        return _fused_topk(hidden_states, gating_output, topk, renormalize)
    for name, tensor in (("hidden_states", hidden_states), ("gating_output", gating_output)):
        check_strided(name, tensor)
    if gating_output.dim() != 2 or hidden_states.shape[:1] != gating_output.shape[:1]:
        raise ValueError(
            f"gating_output: expected a tensor of rank 2 with the rows of hidden_states"
            f" {list(hidden_states.shape)}, got shape {list(gating_output.shape)}"
        )
    check_topk(topk, gating_output.shape[1])
    gating_output = checked(gating_output, gating_output=gating_output, topk_weights=topk_weights)
    weights, ids = (
        _rows_of(name, given, gating_output, topk, dtype)
        for name, given, dtype in (
            ("topk_weights", topk_weights, torch.float32),
            ("topk_ids", topk_ids, torch.int32),
        )
    )
    topk_softmax(weights, ids, torch.empty_like(ids), gating_output, renormalize)
    return weights, ids


def _rows_of(
    name: str, given: Tensor | None, gating: Tensor, topk: int, dtype: torch.dtype
) -> Tensor:
    """The first M rows of a given output, or a new one."""
    if given is None:
        return gating.new_empty((gating.shape[0], topk), dtype=dtype)
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(given).__name__}")
    check_strided(name, given)
    tokens = gating.shape[0]
    if given.dim() != 2 or given.shape[1] != topk or given.shape[0] < tokens:
        raise ValueError(
            f"{name}: expected shape [at least {tokens}, {topk}], got {list(given.shape)}"
        )
    if given.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype}, got {given.dtype}")
    return given[:tokens]


def _check_extras(extras: dict[str, Any], **others: Any) -> None:
    """Raises for what PyTorch is to write behind the sort, unless it fits and is apart from all else."""
    topk_ids, sorted_token_ids = others["topk_ids"], others["sorted_token_ids"]
    check_strided("topk_ids", topk_ids)
    check_strided("sorted_token_ids", sorted_token_ids)
    shapes = {
        "local_topk_ids": topk_ids.shape,
        "m_indices": sorted_token_ids.shape,
        "reverse_sorted": (topk_ids.numel(),),
    }
    for name, extra in extras.items():
        if extra is None:
            continue
        _check_extra(name, extra, topk_ids, shapes[name])
        check_apart(name, extra, **others)
        others[name] = extra


def _check_extra(name: str, tensor: Any, topk_ids: Tensor, shape: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(tensor).__name__}")
    check_strided(name, tensor)
    if list(tensor.shape) != list(shape) or tensor.dtype != torch.int32:
        raise ValueError(
            f"{name}: expected int32 of shape {list(shape)}, got {tensor.dtype} of shape"
            f" {list(tensor.shape)}"
        )
    if tensor.device != topk_ids.device or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous memory on {topk_ids.device}, as topk_ids, got strides"
            f" {list(tensor.stride())} on {tensor.device}"
        )


def _local_ids(topk_ids: Tensor, num_experts: int, mask: Tensor | None) -> Tensor:
    """The ids within the mask's ones; -1 for those outside of it or of [0, E)."""
    exists = (topk_ids >= 0) & (topk_ids < num_experts)
    if mask is None:
        return torch.where(exists, topk_ids, -1)
    local = torch.where(mask != 0, mask.cumsum(0) - 1, -1).to(torch.int32)
    return torch.where(exists, local[topk_ids.clamp(0, num_experts - 1).long()], -1)


def _reverse(sorted_ids: Tensor, num_valid_ids: Tensor, topk_ids: Tensor) -> Tensor:
    """The sorted slot of every (token, slot), int32 [M * K]; -1 for those that have none."""
    topk, entries = topk_ids.shape[1], topk_ids.numel()
    slots = torch.arange(sorted_ids.shape[0], dtype=torch.int32, device=sorted_ids.device)
    token, k = sorted_ids & TOKEN_MASK, (sorted_ids >> TOKEN_BITS) & 0xFF
    is_entry = (slots < num_valid_ids[0]) & (k < topk)
    where = torch.where(is_entry, token * topk + k, entries).long()
    reverse = slots.new_full((entries + 1,), -1)
    if transformed():
        return reverse.index_copy(0, where, slots)[:entries]
    return reverse.index_copy_(0, where, slots)[:entries]
