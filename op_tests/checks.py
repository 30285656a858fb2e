"""Is a routing result right? Against the reference, and against the contract's own words.

:func:`check_sorted` compares with the expected five tensors: integers exactly, weights within
``WEIGHT_RTOL``. :func:`check_structure` and :func:`check_selection` know nothing of the reference:
they decode the sorted buffers, rebuild the table of experts per token and state the invariants, so
that an error shared by the reference and a kernel still shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from buffers import Mismatch, require
from numpy.typing import NDArray
from torch import Tensor

WEIGHT_RTOL = 1e-6
"""The contract's bound: exp, sum and division in f32, in any order."""

WEIGHT_ATOL = 2.0**-126
"""The smallest normal f32: a device may round a subnormal exp or quotient to zero."""

SUM_TOLERANCE_PER_SLOT = 2.0**-23
"""Each of the K weights may be off by an f32 rounding or two, and so may their divisor."""

SELECTION_BUDGET = 1 << 24
"""Logit comparisons that :func:`check_selection` spends; it samples the tokens beyond that."""

TOKEN_MASK = 0xFFFFFF

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


def check_weights(what: str, got: Tensor, expected: Tensor) -> None:
    """Weights agree within the tolerance; weights that are exactly 0 must be so in both."""
    got, expected = got.cpu(), expected.cpu()
    require(
        got.dtype == torch.float32 and got.shape == expected.shape,
        f"{what}: expected f32 {list(expected.shape)}, got {got.dtype} {list(got.shape)}",
    )
    error = (got.double() - expected.double()).abs()
    bound = WEIGHT_RTOL * expected.double().abs() + WEIGHT_ATOL
    # Written so that a NaN fails.
    wrong = (~(error <= bound)).nonzero()
    if wrong.numel():
        at = tuple(wrong[0].tolist())
        raise Mismatch(
            f"{what}{list(at)}: expected {expected[at].item()!r} within {WEIGHT_RTOL} relative, "
            f"got {got[at].item()!r}; {len(wrong)} weights differ"
        )


def check_equal(what: str, got: Tensor, expected: Tensor) -> None:
    """Integer tensors agree in dtype, shape and every value."""
    got, expected = got.cpu(), expected.cpu()
    require(
        got.dtype == expected.dtype and got.shape == expected.shape,
        f"{what}: expected {expected.dtype} {list(expected.shape)}, "
        f"got {got.dtype} {list(got.shape)}",
    )
    wrong = (got != expected).nonzero()
    if wrong.numel():
        at = tuple(wrong[0].tolist())
        raise Mismatch(
            f"{what}{list(at)}: expected {expected[at].item():#x}, got {got[at].item():#x}; "
            f"{len(wrong)} entries differ"
        )


def check_sorted(got: Sequence[Tensor], expected: Sequence[Tensor], block_size: int) -> None:
    """The defined part of (sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids).

    The four tensors may be followed by others, which are ignored. Shapes must agree in full.
    """
    names = ("sorted_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids")
    for name, tensor, model in zip(names, got, expected, strict=False):
        require(
            tensor.shape == model.shape and tensor.dtype == model.dtype,
            f"{name}: expected {model.dtype} {list(model.shape)}, "
            f"got {tensor.dtype} {list(tensor.shape)}",
        )
    check_equal("num_valid_ids", got[3], expected[3])
    num_valid = int(expected[3][0])
    num_blocks = num_valid // block_size
    check_equal("sorted_expert_ids", got[2][:num_blocks], expected[2][:num_blocks])
    check_equal("sorted_ids", got[0][:num_valid], expected[0][:num_valid])
    check_weights("sorted_weights", got[1][:num_valid], expected[1][:num_valid])


def check_same_bits(got: Sequence[Tensor], expected: Sequence[Tensor], block_size: int) -> None:
    """The defined parts of two sorts of the same: counts, slots, weights to the bit, expert ids."""
    check_equal("num_valid_ids", got[3], expected[3])
    slots = int(expected[3][0])
    check_equal("sorted_ids", got[0][:slots], expected[0][:slots])
    bits = [outputs[1][:slots].view(torch.int32) for outputs in (got, expected)]
    check_equal("bits of sorted_weights", *bits)
    blocks = slots // block_size
    check_equal("sorted_expert_ids", got[2][:blocks], expected[2][:blocks])


def check_structure(
    got: Sequence[Tensor],
    *,
    num_tokens: int,
    num_experts: int,
    topk: int,
    block_size: int,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Ints, Floats]:
    """The invariants of the sorted buffers, without a reference; ``num_tokens`` is ``n``.

    ``ids`` [tokens, K] are what a caller gave: any, also repeated in a row. None for ids of a
    selection, which are experts and distinct in a row.

    Returns the decoded expert and weight of every (token, slot), -1 and NaN where the mask
    removed the expert.
    """
    packed, weights, block_experts, counts = (tensor.cpu().numpy() for tensor in got[:4])
    num_valid = int(counts[0])
    require(
        0 <= num_valid <= len(packed) and num_valid % block_size == 0,
        f"num_valid_ids[0]: expected a multiple of {block_size} up to {len(packed)}, "
        f"got {num_valid}",
    )
    require(
        int(counts[1]) == num_tokens,
        f"num_valid_ids[1]: expected n = {num_tokens}, got {int(counts[1])}",
    )
    words = packed[:num_valid].astype(np.uint32).astype(np.int64)
    tokens, slots = words & TOKEN_MASK, words >> 24
    weights = weights[:num_valid]
    experts = _slot_experts(block_experts[: num_valid // block_size], num_experts, mask, block_size)

    padding = slots == topk
    require(
        bool(np.all(tokens[padding] == num_tokens)),
        f"sorted_ids: expected token n = {num_tokens} in padding, "
        f"got {sorted(set(tokens[padding].tolist()))[:4]}",
    )
    require(
        bool(np.all(weights[padding] == 0.0)),
        "sorted_weights: expected exactly 0.0 in padding, "
        f"got {weights[padding][weights[padding] != 0.0][:4]}",
    )
    real = ~padding
    strange = np.flatnonzero(real & ((slots > topk) | (tokens >= num_tokens)))
    if len(strange):
        at = int(strange[0])
        raise Mismatch(
            f"sorted_ids[{at}]: expected slot < {topk} of a token < {num_tokens} or padding, "
            f"got slot {slots[at]} of token {tokens[at]}"
        )
    # A token is once among a selection's entries of an expert; a caller's may repeat it in other slots.
    order = tokens if ids is None else tokens * (topk + 1) + slots
    _check_blocks(experts, order, padding, block_size)

    table = np.full((num_tokens, topk), -1, dtype=np.int64)
    table_weights = np.full((num_tokens, topk), np.nan, dtype=np.float32)
    pairs = tokens[real] * topk + slots[real]
    repeated = len(pairs) - len(np.unique(pairs))
    require(repeated == 0, f"sorted_ids: expected each (token, slot) once, {repeated} are repeated")
    table[tokens[real], slots[real]] = experts[real]
    table_weights[tokens[real], slots[real]] = weights[real]
    if ids is not None:
        _check_table(table, ids, num_experts, mask)
        return table, table_weights
    if mask is None:
        missing = np.argwhere(table < 0)
        require(
            len(missing) == 0,
            f"sorted_ids: expected every (token, slot), {len(missing)} are missing, "
            f"first {missing[:1].tolist()}",
        )
    check_distinct(table)
    return table, table_weights


def _check_table(table: Ints, ids: Tensor, num_experts: int, mask: Tensor | None) -> None:
    """The experts [tokens, K] are those of ``ids``, -1 where there is none or the mask removed it."""
    wanted = ids.cpu().numpy().astype(np.int64)
    exists = (wanted >= 0) & (wanted < num_experts)
    if mask is not None:
        exists &= mask.cpu().numpy().astype(bool)[np.where(exists, wanted, 0)]
    wrong = np.argwhere(table != np.where(exists, wanted, -1))
    require(
        len(wrong) == 0,
        f"sorted_ids: expected an entry for every id and no others, {len(wrong)} are wrong, "
        f"first at (token, slot) {wrong[:1].tolist()}",
    )


def check_distinct(table: Ints) -> None:
    """No row of the experts [tokens, K] repeats one; -1 stands for a masked-out expert."""
    ascending = np.sort(table, axis=1)
    repeated = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)
    rows = np.flatnonzero(repeated.any(axis=1))
    if len(rows):
        row = int(rows[0])
        raise Mismatch(
            f"expert ids: expected distinct experts in a row, got {table[row].tolist()} "
            f"for token {row}"
        )


def check_selection(table: Ints, logits: Tensor) -> None:
    """Slot k of a token holds the expert with exactly k better ones: larger, or equal and lower.

    NaN counts as -inf. ``logits`` [tokens, E] in any dtype; -1 in ``table`` is skipped.
    """
    keys = logits.float().cpu().numpy()
    keys = np.where(np.isnan(keys), -np.inf, keys).astype(np.float32)
    num_tokens, topk = table.shape
    num_experts = keys.shape[1]
    sample = max(1, SELECTION_BUDGET // max(1, topk * num_experts))
    rows = np.unique(np.linspace(0, num_tokens - 1, min(sample, num_tokens), dtype=np.int64))
    keys, table = keys[rows], table[rows]
    index = np.arange(num_experts)
    for slot in range(topk):
        chosen = table[:, slot : slot + 1]
        chosen_key = np.take_along_axis(keys, np.maximum(chosen, 0), axis=1)
        better = (keys > chosen_key) | ((keys == chosen_key) & (index < chosen))
        num_better = better.sum(axis=1)
        wrong = np.flatnonzero((chosen[:, 0] >= 0) & (num_better != slot))
        if len(wrong):
            at = int(wrong[0])
            raise Mismatch(
                f"token {rows[at]} slot {slot}: expected the expert with {slot} better ones, "
                f"got expert {chosen[at, 0]} with {num_better[at]}"
            )


def check_weight_sums(weights: Floats) -> None:
    """Renormalised weights [tokens, K] are finite, not negative and sum to 1 per token."""
    topk = weights.shape[1]
    require(
        bool(np.all(np.isfinite(weights) & (weights >= 0))),
        "weights: expected finite values from 0 to 1, "
        f"got {weights[~(np.isfinite(weights) & (weights >= 0))][:4]}",
    )
    error = np.abs(weights.astype(np.float64).sum(axis=1) - 1.0)
    tolerance = (topk + 2) * SUM_TOLERANCE_PER_SLOT
    worst = float(error.max(initial=0.0))
    require(worst <= tolerance, f"weights: expected sum 1 within {tolerance:.1e}, off by {worst}")


def _slot_experts(
    block_experts: NDArray[np.int32], num_experts: int, mask: Tensor | None, block_size: int
) -> Ints:
    """The global expert of every slot, from the local expert of every block."""
    kept = np.arange(num_experts) if mask is None else np.flatnonzero(mask.cpu().numpy())
    strange = block_experts[(block_experts < 0) | (block_experts >= len(kept))]
    require(
        len(strange) == 0,
        f"sorted_expert_ids: expected local experts below {len(kept)}, got {strange[:4].tolist()}",
    )
    require(
        bool(np.all(np.diff(block_experts) >= 0)),
        f"sorted_expert_ids: expected ascending experts, got {block_experts.tolist()[:16]}",
    )
    return np.repeat(kept[block_experts], block_size).astype(np.int64)


def _check_blocks(experts: Ints, order: Ints, padding: NDArray[np.bool_], block_size: int) -> None:
    """No block without an entry, padding only at the end of an expert, ``order`` ascending."""
    empty = np.flatnonzero(padding.reshape(-1, block_size).all(axis=1))
    require(
        len(empty) == 0,
        f"sorted_ids: expected an entry in every block, got blocks {empty[:4].tolist()} empty",
    )
    same_expert = experts[1:] == experts[:-1]
    resumed = np.flatnonzero(same_expert & padding[:-1] & ~padding[1:])
    require(
        len(resumed) == 0,
        "sorted_ids: expected padding only at the end of an expert, "
        f"got entries after it at {(resumed[:4] + 1).tolist()}",
    )
    entries = same_expert & ~padding[:-1] & ~padding[1:]
    descending = np.flatnonzero(entries & (order[1:] <= order[:-1]))
    require(
        len(descending) == 0,
        "sorted_ids: expected strictly ascending tokens within an expert, "
        f"got otherwise at {(descending[:4] + 1).tolist()}",
    )
