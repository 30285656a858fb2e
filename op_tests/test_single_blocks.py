"""Is the sort right where no expert can have more than one block (`single_blocks.h`), and beside it?

That is n <= B, one routing workgroup and at most 1024 experts. Every case is judged by
``runners.run_fused``, which also sees a slot that is written behind the ones in use, and has the bits
of two routing workgroups, which sort by counts, where the device has clusters.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import _checkout  # noqa: F401
import pytest
import torch
from cases import MASKS, Case
from checks import check_same_bits
from route_calls import has_clusters
from runners import run_fused
from targets import Target

import aiter

EXPERT_COUNTS = (1, 32, 33, 64, 65, 129, 1024, 1025)
BLOCK_SIZES = (1, 2, 3, 4, 7, 32, 33)


def run(case: Case, target: Target) -> None:
    """``case`` by one workgroup, and what two give."""
    one, *others = (
        run_fused(case, target, partial(aiter.fused_topk_moe_sorting_fwd, cluster_size=size))
        for size in ((1, 2) if has_clusters(target) else (1,))
    )
    for other in others:
        check_same_bits(other, one, case.block_size)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_around_the_block_size(target: Target, block_size: int) -> None:
    """n = 0, 1, B - 1, B and B + 1, of as many rows and of more; stores of four slots and of one."""
    for num_local, slots_offset in itertools.product(
        sorted({0, 1, block_size - 1, block_size, block_size + 1}), (0, 4)
    ):
        base = Case(
            max(num_local, 1),
            40,
            3,
            torch.bfloat16,
            block_size=block_size,
            logits="ties",
            num_local=num_local,
            slots_offset=slots_offset,
        )
        run(base, target)
        run(replace(base, num_tokens=num_local + 9), target)


@pytest.mark.parametrize("num_experts", EXPERT_COUNTS)
def test_experts_and_masks(target: Target, num_experts: int) -> None:
    """Sets of experts that end within a word of bits, on its boundary and behind the last; masks that
    drop all experts, all but one, one and some.
    """
    for mask, num_local in itertools.product(MASKS, (None, 5)):
        topk = min(4, num_experts)
        case = Case(8, num_experts, topk, torch.float16, mask=mask, num_local=num_local)
        run(case, target)


def test_more_entries_than_threads(target: Target) -> None:
    """M*K around the 256 threads of a workgroup on the CPU and the 1024 of one on a GPU."""
    for num_tokens, topk in ((64, 4), (65, 4), (51, 5), (52, 5), (128, 8), (129, 8), (150, 9)):
        for dtype in (torch.bfloat16, torch.float32):
            base = Case(num_tokens, 130, topk, dtype, block_size=num_tokens)
            run(base, target)
            run(replace(base, mask="random", num_local=num_tokens - 1, block_size=152), target)


def test_every_row_wants_the_same(target: Target) -> None:
    """All entries in K whole blocks: no padding at all, and none of the others has a block."""
    for block_size in (1, 4, 32):
        run(Case(block_size, 128, 4, torch.bfloat16, logits="equal", block_size=block_size), target)
