"""What do the routing ops compute? A plain PyTorch answer, on any device.

Three functions mirror the public ops: :func:`topk_softmax` chooses the experts of each token,
:func:`moe_sorting` groups the chosen (token, slot) pairs by expert in padded blocks, and
:func:`topk_softmax_sorting` is one after the other. They state the rules in the fewest tensor
operations that keep 65536 tokens practical, so that a kernel, or a reader, can be checked
against them. They synchronise with the device and allocate freely: they are not for serving.

Notation: ``M`` tokens, ``E`` experts, ``K`` = ``topk``, ``B`` = ``block_size``, ``D`` =
``model_dim``, ``n`` = ``num_local_tokens[0]`` where given, else ``M``.

Design. Selection is one stable descending sort of the logits with NaN read as -inf. That single
rule gives every special case: ties and unused experts come in index order, and no row repeats an
expert. ``torch.topk`` was rejected because it promises no order among equal logits. Weights use
``exp(x - max)`` with the exponential defined as 1 where ``x == max``, which is the softmax limit
for infinite maxima and the equal share for rows without a usable logit, without a branch.
The sum over the selected experts runs in slot order in f32, as the ops specify; the sum over all
experts has no specified order and is taken in f64, so that it favours no kernel's order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing.arguments import check_bool, check_int, check_strided
from ..routing.buffers import TOKEN_BITS, TOKEN_MASK

MAX_TOKENS = TOKEN_MASK
MAX_TOPK = 255

TAIL_ID = -1
"""Fills ``sorted_ids`` and ``sorted_expert_ids`` past the defined part; no defined entry has it."""

TAIL_WEIGHT = float("nan")
"""Fills ``sorted_weights`` past the defined part, so that using it shows."""

_GATING_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def topk_softmax(gating_output: Tensor, topk: int, need_renorm: bool) -> tuple[Tensor, Tensor]:
    """Choose ``topk`` experts per token and weigh them by softmax.

    With ``x`` the f32 logits of a row, NaN read as -inf::

        slots     = experts by descending x, the lower index first among equals (-0.0 == +0.0)
        w_k       = exp(x_k - max(x)) / Z
        Z         = sum over the K slots, in slot order      (need_renorm)
        Z         = sum over all E experts                   (not need_renorm)

    A row always yields ``K`` distinct experts and finite weights. Where fewer than ``K`` logits
    exceed -inf, the lowest unused indices follow with weight 0. Where none does, all slots weigh
    ``1/K`` (``need_renorm``) or ``1/E``. Entries of +inf come first and share the whole weight
    equally: among the selected ones (``need_renorm``) or all of the row.

    Args:
        gating_output: logits [M, E], f32, f16 or bf16, any strides.
        topk: experts per token, 1 <= topk <= E.
        need_renorm: whether the selected weights sum to 1.

    Returns:
        weights f32 [M, K] and expert ids i32 [M, K], both contiguous.

    Raises:
        TypeError: an argument has the wrong Python type.
        ValueError: a dtype, rank or value is not as above.
    """
    _require_tensor("gating_output", gating_output)
    check_int("topk", topk)
    check_bool("need_renorm", need_renorm)
    if gating_output.dtype not in _GATING_DTYPES:
        raise ValueError(
            f"gating_output: expected dtype float32, float16 or bfloat16, got {gating_output.dtype}"
        )
    if gating_output.dim() != 2:
        raise ValueError(
            f"gating_output: expected shape [tokens, experts], got {list(gating_output.shape)}"
        )
    num_experts = gating_output.shape[1]
    if not 1 <= topk <= min(num_experts, MAX_TOPK):
        raise ValueError(
            f"topk: expected 1 to {min(num_experts, MAX_TOPK)} for {num_experts} experts, "
            f"got {topk}"
        )

    logits = gating_output.float()
    # Adding 0.0 turns -0.0 into +0.0, for sorts that order keys by their bits.
    logits = torch.where(logits.isnan(), float("-inf"), logits) + 0.0
    order = torch.sort(logits, dim=1, descending=True, stable=True)
    ids = order.indices[:, :topk]

    row_max = order.values[:, :1]
    selected = _shifted_exp(order.values[:, :topk], row_max)
    if need_renorm:
        total = torch.zeros_like(row_max)
        for slot in range(topk):
            total = total + selected[:, slot : slot + 1]
    else:
        total = _shifted_exp(logits, row_max).sum(dim=1, keepdim=True, dtype=torch.float64).float()
    return (selected / total).contiguous(), ids.to(torch.int32).contiguous()


def moe_sorting(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int = 32,
    expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Group the (token, slot) pairs by expert, each expert padded to whole blocks of ``B``.

    Experts ascend, tokens and then slots ascend within an expert, and an expert without a token gets
    no block::

        entry   = (slot << 24) | token                 one per pair
        padding = (K << 24) | n, weight exactly 0.0    up to the next multiple of B
        num_valid_ids = (sum over experts of ceil(count / B) * B, n)

    An entry is 32 bits in an i32, so a slot or padding of 128 and more makes it negative.

    Args:
        topk_ids: expert of each slot, i32 [M, K]; may repeat in a row. Ids outside [0, E) are left
            out.
        topk_weights: weight of each slot, f32 [M, K].
        num_experts: global expert count ``E``.
        model_dim: columns ``D`` of ``moe_buf``.
        moebuf_dtype: dtype of ``moe_buf``.
        block_size: slots per block, ``B``.
        expert_mask: i32 [E] of 0 and 1. An expert with 0 contributes nothing, and
            ``sorted_expert_ids`` holds local ids: the exclusive prefix sum of the mask.
        num_local_tokens: i32 [1], the ``n`` rows to use. Rows from ``n`` on may hold anything.

    Returns:
        * sorted_ids i32 [M*K + E*B - K], the entries; ``TAIL_ID`` past ``num_valid_ids[0]``.
        * sorted_weights f32 [M*K + E*B - K]; ``TAIL_WEIGHT`` past ``num_valid_ids[0]``.
        * sorted_expert_ids i32 [ceil((M*K + E*B - K) / B)], one per block; then ``TAIL_ID``.
        * num_valid_ids i32 [2].
        * moe_buf [M, D], rows below ``n`` zero, the others uninitialised.

    Raises:
        TypeError: an argument has the wrong Python type.
        ValueError: a dtype, shape or value is not as above.
    """
    _check_sorting_arguments(
        topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype, block_size
    )
    num_tokens, topk = topk_ids.shape
    device = topk_ids.device
    num_local = _local_token_count(num_local_tokens, num_tokens)
    mask = _expert_mask(expert_mask, num_experts, device)

    # Pairs in (token, slot) order; a stable sort by expert keeps that within an expert.
    experts = topk_ids[:num_local].reshape(-1).long()
    kept = (experts >= 0) & (experts < num_experts)
    kept &= mask[experts.clamp(0, num_experts - 1)]
    pairs = torch.arange(experts.numel(), device=device)[kept]
    pairs = pairs[torch.argsort(experts[pairs], stable=True)]
    experts = experts[pairs]
    tokens, slots = pairs // topk, pairs % topk

    counts = torch.bincount(experts, minlength=num_experts)
    blocks = (counts + block_size - 1) // block_size
    padded = blocks * block_size
    expert_start = padded.cumsum(0) - padded
    first_pair = counts.cumsum(0) - counts
    rank = torch.arange(pairs.numel(), device=device) - first_pair[experts]
    positions = expert_start[experts] + rank
    num_valid = int(padded.sum())
    num_blocks = num_valid // block_size

    capacity = num_tokens * topk + num_experts * block_size - topk
    entries = torch.full((capacity,), TAIL_ID, dtype=torch.int64, device=device)
    entries[:num_valid] = (topk << TOKEN_BITS) | num_local
    entries[positions] = (slots << TOKEN_BITS) | tokens
    sorted_weights = torch.full((capacity,), TAIL_WEIGHT, dtype=torch.float32, device=device)
    sorted_weights[:num_valid] = 0.0
    sorted_weights[positions] = topk_weights[:num_local].reshape(-1)[pairs]

    max_blocks = (capacity + block_size - 1) // block_size
    local_ids = mask.cumsum(0) - mask.long()
    sorted_expert_ids = torch.full((max_blocks,), TAIL_ID, dtype=torch.int32, device=device)
    sorted_expert_ids[:num_blocks] = torch.repeat_interleave(local_ids, blocks).to(torch.int32)
    num_valid_ids = torch.tensor([num_valid, num_local], dtype=torch.int32, device=device)
    moe_buf = torch.empty((num_tokens, model_dim), dtype=moebuf_dtype, device=device)
    moe_buf[:num_local].view(torch.uint8).zero_()
    return _as_int32(entries), sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Route tokens to experts: :func:`topk_softmax`, then :func:`moe_sorting` of its result.

    Args:
        gating_output: logits [M, E], f32, f16 or bf16. Rows from ``n`` on may hold anything.
        topk: experts per token, 1 <= topk <= E.
        num_experts: ``E``, the number of columns of ``gating_output``.
        model_dim, moebuf_dtype, block_size, expert_mask, num_local_tokens: as in
            :func:`moe_sorting`.
        need_renorm: as in :func:`topk_softmax`.

    Returns:
        The five tensors of :func:`moe_sorting`.

    Raises:
        TypeError, ValueError: as the two functions above, or ``num_experts`` is not ``E``.
    """
    weights, ids = topk_softmax(gating_output, topk, need_renorm)
    check_int("num_experts", num_experts)
    if gating_output.shape[1] != num_experts:
        raise ValueError(
            f"gating_output: expected num_experts = {num_experts} columns, "
            f"got {gating_output.shape[1]}"
        )
    return moe_sorting(
        ids,
        weights,
        num_experts,
        model_dim,
        moebuf_dtype,
        block_size,
        expert_mask,
        num_local_tokens,
    )


def _shifted_exp(logits: Tensor, row_max: Tensor) -> Tensor:
    """exp(logits - row_max), with inf - inf taken as 0."""
    return torch.where(logits == row_max, 1.0, torch.exp(logits - row_max))


def _as_int32(values: Tensor) -> Tensor:
    """Keep the low 32 bits of non-negative or -1 int64 values."""
    return torch.where(values >= 1 << 31, values - (1 << 32), values).to(torch.int32)


def _local_token_count(num_local_tokens: Tensor | None, num_tokens: int) -> int:
    if num_local_tokens is None:
        return num_tokens
    _require_tensor("num_local_tokens", num_local_tokens)
    if num_local_tokens.dtype != torch.int32 or num_local_tokens.numel() != 1:
        raise ValueError(
            "num_local_tokens: expected one int32, "
            f"got {list(num_local_tokens.shape)} of {num_local_tokens.dtype}"
        )
    count = int(num_local_tokens.reshape(-1)[0])
    if not 0 <= count <= num_tokens:
        raise ValueError(f"num_local_tokens: expected 0 to {num_tokens} tokens, got {count}")
    return count


def _expert_mask(expert_mask: Tensor | None, num_experts: int, device: torch.device) -> Tensor:
    """The mask as bool [E]; all true where there is none."""
    if expert_mask is None:
        return torch.ones(num_experts, dtype=torch.bool, device=device)
    _require_tensor("expert_mask", expert_mask)
    if expert_mask.device != device:
        raise ValueError(
            f"expert_mask: expected it on {device}, as what it masks, got {expert_mask.device}"
        )
    if expert_mask.dtype != torch.int32 or list(expert_mask.shape) != [num_experts]:
        raise ValueError(
            f"expert_mask: expected shape [{num_experts}] of int32, "
            f"got {list(expert_mask.shape)} of {expert_mask.dtype}"
        )
    strange = expert_mask[(expert_mask != 0) & (expert_mask != 1)]
    if strange.numel() > 0:
        raise ValueError(f"expert_mask: expected values 0 and 1, got {int(strange[0])}")
    return expert_mask.bool()


def _check_sorting_arguments(
    topk_ids: Tensor, topk_weights: Tensor, num_experts: int, model_dim: int,
    moebuf_dtype: torch.dtype, block_size: int,
) -> None:  # fmt: skip
    for name, tensor, dtype in (
        ("topk_ids", topk_ids, torch.int32),
        ("topk_weights", topk_weights, torch.float32),
    ):
        _require_tensor(name, tensor)
        if tensor.dim() != 2 or tensor.dtype != dtype:
            raise ValueError(
                f"{name}: expected shape [tokens, topk] of {dtype}, "
                f"got {list(tensor.shape)} of {tensor.dtype}"
            )
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights: expected the shape of topk_ids, {list(topk_ids.shape)}, "
            f"got {list(topk_weights.shape)}"
        )
    if topk_weights.device != topk_ids.device:
        raise ValueError(
            f"topk_weights: expected it on {topk_ids.device}, as topk_ids, got {topk_weights.device}"
        )
    if not isinstance(moebuf_dtype, torch.dtype):
        raise TypeError(f"moebuf_dtype: expected a torch.dtype, got {type(moebuf_dtype).__name__}")
    num_tokens, topk = topk_ids.shape
    sizes = {"num_experts": num_experts, "model_dim": model_dim, "block_size": block_size}
    for name, value in sizes.items():
        check_int(name, value)
    for name, value, low, high in (
        ("num_experts", num_experts, 1, 2**31 - 1),
        ("model_dim", model_dim, 0, 2**31 - 1),
        ("block_size", block_size, 1, 2**31 - 1),
        ("tokens (rows of topk_ids)", num_tokens, 0, MAX_TOKENS),
        ("topk (columns of topk_ids)", topk, 1, min(num_experts, MAX_TOPK)),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name}: expected {low} to {high}, got {value}")


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    check_strided(name, value)
    if value.is_meta:
        raise ValueError(f"{name}: expected a tensor with numbers, got one on the meta device")
