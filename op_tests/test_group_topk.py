"""Are rows that share a wave (`group_topk.h`, `key_topk.h`) treated as if each had one of its own?

Renormalised logits are selected by an instance per range of E, K and M. Every range is run at both ends
and beside them, with neighbouring rows of different kinds: exact against the reference, and bit for bit
what f32 logits of the same values give, wherever rows begin in memory. Lists of f32 logits leave bits
out, and threshold and candidates have room for some: rows for which that does not do are among others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import _checkout  # noqa: F401
import pytest
import torch
from cases import INF, Case, make_inputs
from checks import check_equal, check_same_bits
from route_calls import route
from runners import expected_sorted, reporting, run_fused, run_topk_softmax
from targets import Target
from torch import Tensor

import aiter
import aiter.fused_moe
import aiter.reference

DTYPES = (torch.bfloat16, torch.float16)
EXPERT_COUNTS = (9, 127, 128, 129, 256, 257, 512, 513)
TOPKS = (1, 4, 5, 8, 9)
FEW_TOKENS = 512  # kFewTokens
PER_BOUNDARY = 8  # 16-bit logits of a 16-byte load


# Above kMaxGroupTopk, of 16-bit and f32 logits: around the limits of best_keys.h.
KEY_SHAPES = (
    (160, 9), (159, 9), (161, 16), (512, 10), (513, 16), (896, 16), (1024, 13), (385, 22), (160, 17),
    (512, 32), (1024, 31), (520, 3), (1000, 1),
)  # fmt: skip


def layouts(logits: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same rows where they can be read 16 bytes at a time and where not; gaps hold +inf."""
    num_tokens, num_experts = logits.shape
    whole = -(-num_experts // PER_BOUNDARY) * PER_BOUNDARY
    for name, stride, first in (
        ("dense", num_experts, 0),
        ("rows on boundaries", whole + PER_BOUNDARY, PER_BOUNDARY),
        ("base off its boundary", whole, 1),
        ("row stride off it", whole + 1, 0),
    ):
        flat = torch.full((num_tokens * stride + first,), INF, dtype=logits.dtype)
        rows = flat.to(logits.device)[first:].view(num_tokens, stride)[:, :num_experts]
        rows.copy_(logits)
        yield name, rows


def check_values(case: Case, target: Target) -> None:
    """Both ops against the reference."""
    run_fused(case, target, aiter.fused_topk_moe_sorting_fwd)
    run_topk_softmax(case, target, aiter.topk_softmax)


def check_bits(case: Case, target: Target) -> None:
    """Every layout and path of ``case`` gives the bits of the chain with f32 logits."""
    inputs = make_inputs(case, target.device)
    wide = replace(inputs, gating=inputs.gating.float())
    expected = route(case, wide, target, policy=1)
    check_equal("f32 num_valid_ids", expected[3], expected_sorted(case, inputs)[3])
    for (name, gating), policy in itertools.product(layouts(inputs.gating), (0, 1)):
        with reporting(f"{name}, policy {policy}, {case}", target):
            got = route(case, replace(inputs, gating=gating), target, policy)
            assert aiter.fused_moe.last_path() == ("fused", "oneshot")[policy]
            check_same_bits(got, expected, case.block_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_experts", EXPERT_COUNTS)
def test_limits_of_the_instances(target: Target, num_experts: int, dtype: torch.dtype) -> None:
    """A last wave has rows for all of its groups, for some or for one."""
    for topk, count in zip(TOPKS, (1, 48, 7, 35, 9), strict=True):
        case = Case(count, num_experts, topk, dtype, logits="every_kind")
        check_values(case, target)
        check_bits(case, target)


@pytest.mark.parametrize("count", [FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("num_experts", [129, 256])
def test_limits_of_few_tokens(target: Target, num_experts: int, count: int) -> None:
    """Where M decides between instances; blocks are of one token and of many."""
    for dtype, topk in zip(DTYPES, (8, 4), strict=True):
        case = Case(count, num_experts, topk, dtype, logits="every_kind")
        check_values(case, target)
        check_bits(case, target)


@pytest.mark.parametrize("num_experts", [128, 256, 512])
def test_every_expert_can_win_every_slot(target: Target, num_experts: int) -> None:
    """Row r descends from expert r on: each register of each lane is a winner, in each place."""
    topk = 8
    logits = torch.zeros(num_experts, num_experts)
    for slot in range(topk):
        logits += torch.roll(torch.eye(num_experts), slot, 1) * (topk - slot)
    logits = logits.bfloat16().to(target.device)
    weights = torch.empty(num_experts, topk, device=target.device)
    ids, source = (torch.empty_like(weights, dtype=torch.int32) for _ in range(2))
    with target.active():
        aiter.topk_softmax(weights, ids, source, logits, True)
    target.synchronize()
    row = torch.arange(num_experts, dtype=torch.int32)
    slots = torch.arange(topk, dtype=torch.int32)
    check_equal("topk_indices", ids, (row[:, None] + slots) % num_experts)


def hard_rows(num_experts: int) -> Tensor:
    """f32 rows, neighbours of different kinds: random; equal but for the last bits, or nearly; with NaN
    and infinities, in all, some or all but a few experts; of few values; of both zeros; in order."""
    generator = torch.Generator().manual_seed(num_experts)
    rows = torch.randn(36, num_experts, generator=generator)
    rows[1::12] = 1 + rows[1::12] * 1e-6
    rows[2::12] = 11 + rows[2::12] * 1e-4
    rows[3::12] = rows[3::12].round()
    rows[4::12] = float("nan")
    rows[5::12, 2:] = -INF
    rows[6::12, ::3] = INF
    rows[7::12, ::2], rows[7::12, 1::2] = -0.0, 0.0
    rows[8::12, ::2] = float("nan")
    rows[9::12] = -torch.arange(num_experts) * torch.tensor([[1.0], [1e-7], [1e30]])
    rows[10::12] = torch.arange(num_experts) * torch.tensor([[1.0], [1e-7], [1e30]])
    return rows


def check_topk(logits: Tensor, topk: int, target: Target) -> None:
    """The separate top-k against the reference, and that of each row by itself."""
    expected_weights, expected_ids = aiter.reference.topk_softmax(logits, topk, True)
    for name, rows in layouts(logits.to(target.device)):
        weights = torch.empty(len(logits), topk, device=target.device)
        ids, source = (torch.empty_like(weights, dtype=torch.int32) for _ in range(2))
        with target.active():
            aiter.topk_softmax(weights, ids, source, rows, True)
        target.synchronize()
        check_equal(f"{name}: topk_indices", ids.cpu(), expected_ids)
        torch.testing.assert_close(weights.cpu(), expected_weights, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("num_experts", EXPERT_COUNTS)
def test_bits_that_lists_leave_out(target: Target, num_experts: int) -> None:
    """Rows that have to be selected again are beside others, in the first group and the last."""
    for shift, topk in enumerate(TOPKS[:-1]):
        check_topk(hard_rows(num_experts).roll(shift, 0), topk, target)


@pytest.mark.parametrize("shape", KEY_SHAPES, ids=str)
def test_threshold_and_candidates(target: Target, shape: tuple[int, int]) -> None:
    num_experts, topk = shape
    for dtype in (torch.float32, *DTYPES):
        rows = hard_rows(num_experts).to(dtype)
        check_topk(rows, topk, target)
        check_topk(rows.repeat(FEW_TOKENS // len(rows) + 1, 1), topk, target)


def test_numbers_of_candidates(target: Target) -> None:
    """As many equal keys above all others as a row has lanes, or room for, and one less and more.

    Rows with different numbers share a wave.
    """
    num_experts, topk, lanes = 512, 10, 32
    generator = torch.Generator().manual_seed(3)
    rows = -torch.rand(40, num_experts, generator=generator)
    numbers = [at + by for at in (lanes, 3 * lanes) for by in (-1, 0, 1)]
    for r, row in enumerate(rows):
        number = numbers[(r + r // len(numbers)) % len(numbers)]
        row[torch.randperm(num_experts, generator=generator)[:number]] = 1.0
    for dtype in (torch.float32, *DTYPES):
        check_topk(rows.to(dtype), topk, target)
