"""The block-padded sort by expert of ready top-k ids: the second step of the separate chain."""

from __future__ import annotations

import torch
from torch import Tensor

from ..jit import compile_ops, module_for
from .device import current_device

_MODULE = "module_moe_sorting_opus"


@compile_ops(_MODULE)
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
    id_format: str = "slot",
    num_zero_experts: int = 0,
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
        id_format: "slot" or "flat", as in `fused_topk_moe_sorting_fwd`.
        num_zero_experts: how many of the `num_experts` compute nothing, the last ones; the mask has
            none of them. They are left out like those of the mask.

    Raises:
        ValueError: an argument does not fit.
        TypeError: an argument is of the wrong Python type.
        aiter.jit.JitError: the module could not be built or loaded (first call on a device).
    """


@compile_ops(_MODULE)
def moe_sorting_opus_check(
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
    id_format: str = "slot",
    num_zero_experts: int = 0,
) -> None:
    """Raises what `moe_sorting_opus_fwd` would, and launches nothing."""


def moe_sorting_opus_get_workspace_size(
    tokens: int,
    num_experts: int,
    topk: int,
    dispatch_policy: int = 0,
    *,
    device: torch.device | str | int | None = None,
) -> int:
    """Bytes of workspace that `moe_sorting_opus_fwd` wants for this shape; 0 for none.

    The number is the same on every device; `device` says whose module computes it, None for the
    current GPU if there is one, else the CPU.

    Raises:
        ValueError: an argument is out of range.
    """
    compiled = module_for(_MODULE, current_device(device))
    return int(
        compiled.moe_sorting_opus_get_workspace_size(tokens, num_experts, topk, dispatch_policy)
    )
