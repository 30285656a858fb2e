"""Is a single token sorted right in registers (`one_token.h`), and where it is not?

That is M = 1, K <= 32, no expert mask and one routing workgroup. Every case is judged by
``runners.run_fused``, which also sees a slot that is written behind the ones in use, and has the bits of
the ways around it: a mask that keeps all experts and, where there are clusters, two workgroups.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from cases import GATING_DTYPES, LOGITS, Case
from checks import check_same_bits
from route_calls import has_clusters
from runners import run_fused
from targets import Target
from torch import Tensor

import aiter

TOPKS = (1, 4, 32, 33)
BLOCK_SIZES = (1, 2, 3, 4, 7, 32, 64)

alone = partial(aiter.fused_topk_moe_sorting_fwd, cluster_size=1)


def with_all_experts(gating: Tensor, *arguments: Any, **options: Any) -> None:
    """The op with a mask that keeps all experts, which must change nothing."""
    mask = torch.ones(gating.shape[1], dtype=torch.int32, device=gating.device)
    alone(gating, *arguments, **(options | {"local_expert_mask": mask}))


def run(case: Case, target: Target) -> None:
    """``case`` in registers, if it is one for that, and by the ways around."""
    ways = [alone, with_all_experts]
    if has_clusters(target):
        ways.append(partial(aiter.fused_topk_moe_sorting_fwd, cluster_size=2))
    expected, *others = (run_fused(case, target, way) for way in ways)
    num_valid = int(expected[3][0])
    assert num_valid == case.local_tokens * case.topk * case.block_size
    for other in others:
        check_same_bits(other, expected, case.block_size)


@pytest.mark.parametrize("topk", TOPKS)
@pytest.mark.parametrize("dtype", GATING_DTYPES, ids=str)
def test_winners(target: Target, dtype: torch.dtype, topk: int) -> None:
    """Up to as many winners as a wave of 32 has lanes and one more; as many experts as winners, and
    many more.
    """
    for num_experts, need_renorm in itertools.product((topk, 128, 1030), (True, False)):
        run(Case(1, num_experts, topk, dtype, need_renorm, logits="ties"), target)


@pytest.mark.parametrize("slots_offset", [0, 4])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_padding(target: Target, block_size: int, slots_offset: int) -> None:
    """Stores of four slots and of one; as little padding as none."""
    for topk in (1, 4, 32):
        case = Case(1, 40, topk, torch.bfloat16, block_size=block_size, slots_offset=slots_offset)
        run(case, target)


def test_more_padding_than_threads(target: Target) -> None:
    """More stores than a workgroup has threads: several rounds, the last of which ends early."""
    for topk, block_size, slots_offset in ((32, 512, 0), (32, 129, 0), (7, 1000, 4), (8, 1024, 0)):
        case = Case(1, 64, topk, torch.float16, block_size=block_size, slots_offset=slots_offset)
        run(case, target)


@pytest.mark.parametrize("num_local", [0, 1])
@pytest.mark.parametrize("topk", [1, 8, 32, 33])
def test_num_local_tokens(target: Target, topk: int, num_local: int) -> None:
    for dtype in GATING_DTYPES:
        run(Case(1, 64, topk, dtype, block_size=4, num_local=num_local), target)


@pytest.mark.parametrize("logits", LOGITS)
def test_logits(target: Target, logits: str) -> None:
    """Ties, NaN, infinities: winners are as many as ever, and weights may be NaN."""
    for dtype, need_renorm in itertools.product(GATING_DTYPES, (True, False)):
        run(Case(1, 37, 5, dtype, need_renorm, logits=logits, block_size=4), target)


@pytest.mark.parametrize("mask", ["zeros", "first", "last", "all_but_first", "random"])
def test_masks_are_obeyed(target: Target, mask: str) -> None:
    for topk, num_local in itertools.product((4, 32), (None, 0, 1)):
        case = Case(1, 48, topk, torch.bfloat16, mask=mask, num_local=num_local)
        run_fused(case, target, aiter.fused_topk_moe_sorting_fwd)


def test_moe_buf(target: Target) -> None:
    """The row is zeroed by the other workgroups, whatever its length and alignment."""
    for model_dim, offset in ((1, 0), (33, 6), (2880, 0), (70_000, 14)):
        run(Case(1, 128, 4, torch.bfloat16, model_dim=model_dim, moe_buf_offset=offset), target)
