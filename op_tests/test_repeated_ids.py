"""Does every (token, slot) get its place where the ids of a row repeat, or are no experts at all?

Judged by `runners.run_moe_sorting` with given ids: the reference, the table of ids itself, the order by
token, then slot, guards, and no slot in use that nobody wrote (outputs start as poison).
"""

from __future__ import annotations

import _checkout  # noqa: F401
import pytest
import torch
from cases import MASKS, Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe_layers import needs_grouped_mm
from runners import run_moe_sorting
from targets import Target
from torch import Tensor

import aiter
from aiter import reference
from aiter.fused_moe import fused_moe
from aiter.reference.layer import moe_layer

POLICIES = (0, 1, 2)
NO_EXPERTS = (-1, -(2**31), 2**31 - 1)
per_policy = pytest.mark.parametrize("policy", POLICIES)


def draw_ids(case: Case, choices: int, share: float, seed: int) -> Tensor:
    """Ids [M, K] of the first `choices` experts, a `share` of them none's, with many repeats."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.num_tokens, case.topk)
    ids = torch.randint(choices, shape, generator=generator, dtype=torch.int32)
    none = torch.tensor([*NO_EXPERTS, case.num_experts], dtype=torch.int32)
    strange = none[torch.randint(len(none), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < share, strange, ids)


def run(case: Case, target: Target, policy: int, ids: Tensor) -> None:
    run_moe_sorting(
        case,
        target,
        aiter.moe_sorting_opus_fwd,
        policy,
        aiter.moe_sorting_opus_get_workspace_size,
        ids,
    )


@per_policy
@pytest.mark.parametrize(
    ("shape", "choices"),
    [
        ((1, 8, 2), 1), ((2, 8, 2), 2), ((3, 1, 1), 1), ((33, 8, 8), 3), ((32, 128, 4), 5),
        ((65, 257, 9), 257), ((7, 300, 255), 4), ((2, 255, 255), 255), ((200, 16, 4), 16),
    ],
    ids=str,
)  # fmt: skip
def test_repeats(target: Target, policy: int, shape: tuple[int, int, int], choices: int) -> None:
    for block_size in (1, 4, 32, 33):
        case = Case(*shape, block_size=block_size)
        run(case, target, policy, draw_ids(case, choices, 0.0, 1))
        run(case, target, policy, draw_ids(case, choices, 0.3, 2))


@per_policy
def test_one_row_repeats(target: Target, policy: int) -> None:
    """A single repeat, in every place of it, among rows that have none."""
    case = Case(70, 16, 3, block_size=8)
    distinct = reference.topk_softmax(torch.randn(70, 16), 3, True)[1]
    for row in (0, 31, 32, 69):
        for first, second in ((0, 1), (0, 2), (1, 2)):
            ids = distinct.clone()
            ids[row, second] = ids[row, first]
            run(case, target, policy, ids)


@per_policy
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_local_tokens(target: Target, policy: int, mask: str) -> None:
    for num_tokens, num_experts, topk in ((1, 128, 4), (70, 12, 4), (9, 5, 5)):
        for num_local in (None, *sorted({0, 1, num_tokens - 1, num_tokens})):
            case = Case(num_tokens, num_experts, topk, mask=mask, num_local=num_local)
            run(case, target, policy, draw_ids(case, min(num_experts, 6), 0.2, 3))


@per_policy
def test_several_tiles(target: Target, policy: int) -> None:
    """896 experts leave a tile 480 tokens: repeats in the first, in a later one, in all."""
    case = Case(1000, 896, 3, block_size=2, model_dim=1)
    distinct = reference.topk_softmax(torch.randn(1000, 896), 3, True)[1]
    for rows in (slice(0, 1), slice(500, 501), slice(999, 1000), slice(None)):
        ids = distinct.clone()
        ids[rows, 2] = ids[rows, 0]
        run(case, target, policy, ids)
    run(case, target, policy, draw_ids(case, 2, 0.1, 4))


@per_policy
def test_no_id_is_an_expert(target: Target, policy: int) -> None:
    case = Case(5, 8, 2)
    run(case, target, policy, draw_ids(case, 8, 1.1, 5))


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_ids(target: Target, data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 300))
    topk = data.draw(st.integers(1, min(num_experts, 20)))
    num_tokens = data.draw(st.integers(0, 100))
    case = Case(
        num_tokens,
        num_experts,
        topk,
        block_size=data.draw(st.sampled_from((1, 2, 7, 16, 32, 64))),
        mask=data.draw(st.sampled_from(sorted(MASKS))),
        num_local=data.draw(st.none() | st.integers(0, num_tokens)),
    )
    choices = data.draw(st.integers(1, num_experts))
    share = data.draw(st.sampled_from((0.0, 0.0, 0.1, 0.9)))
    policy = data.draw(st.sampled_from(POLICIES))
    run(case, target, policy, draw_ids(case, choices, share, data.draw(st.integers(0, 99))))


def test_reference_by_hand() -> None:
    """Two tokens of topk 3: expert 2 twice and once, expert 0 twice; -1 and 3 are no experts."""
    ids = torch.tensor([[2, 0, 2], [3, 2, -1]], dtype=torch.int32)
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    out = reference.moe_sorting(ids, weights, 3, 1, torch.float32, block_size=4)
    padding = (3 << 24) | 2
    assert out[3].tolist() == [8, 2]
    assert out[2][:2].tolist() == [0, 2]
    assert out[0][:8].tolist() == [1 << 24, *[padding] * 3, 0, 2 << 24, 1 << 24 | 1, padding]
    assert out[1][:8].tolist() == [2.0, 0.0, 0.0, 0.0, 1.0, 3.0, 5.0, 0.0]


@pytest.mark.parametrize(
    "backend", [pytest.param("grouped_mm", marks=needs_grouped_mm), "block_bmm"]
)
def test_layer_sums_every_copy(backend: str) -> None:
    """Against the float64 loop, on memory that held other things before."""
    generator = torch.Generator().manual_seed(0)
    hidden, weights = (torch.randn(6, n, generator=generator) for n in (32, 4))
    w1 = torch.randn(8, 32, 32, generator=generator) / 6
    w2 = torch.randn(8, 32, 16, generator=generator) / 4
    ids = torch.tensor([[0] * 4, [1, 1, 7, 7], [3, 2, 3, 3]] * 2, dtype=torch.int32)
    want = moe_layer(hidden, w1, w2, weights, ids).float()
    for junk in (1, 0x7F7F7F7F, 12345678, 0x01000002):
        used = [torch.full((n,), junk, dtype=torch.int32) for n in (24, 28, 48, 144, 192)]
        del used
        got = fused_moe(hidden, w1, w2, weights, ids, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
