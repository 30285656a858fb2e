"""Is the reference right? Examples worked out by hand, and softmax itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from cases import INF, NAN
from torch import Tensor

from aiter import reference


@pytest.mark.parametrize(
    ("row", "topk", "renorm", "ids", "weights"),
    [
        ([0.0, math.log(3.0), 0.0], 2, True, [1, 0], [0.75, 0.25]),
        ([0.0, math.log(3.0), 0.0], 2, False, [1, 0], [0.6, 0.2]),
        ([1.0, 1.0, 1.0, 1.0], 3, True, [0, 1, 2], [1 / 3] * 3),
        ([-0.0, 0.0, -0.0, 0.0], 3, False, [0, 1, 2], [0.25] * 3),
        ([NAN, 5.0, NAN, -INF], 3, True, [1, 0, 2], [1.0, 0.0, 0.0]),
        ([NAN, 5.0, NAN, -INF], 4, False, [1, 0, 2, 3], [1.0, 0.0, 0.0, 0.0]),
        (
            [-INF, 2.0, NAN, 2.0, 1.0],
            4,
            True,
            [1, 3, 4, 0],
            [0.42231882, 0.42231882, 0.15536241, 0],
        ),
        ([NAN, -INF, NAN, -INF], 2, True, [0, 1], [0.5, 0.5]),
        ([NAN, -INF, NAN, -INF], 2, False, [0, 1], [0.25, 0.25]),
        ([1.0, INF, NAN, INF], 3, True, [1, 3, 0], [0.5, 0.5, 0.0]),
        ([INF, INF, 7.0, INF], 2, True, [0, 1], [0.5, 0.5]),
        ([INF, INF, 7.0, INF], 2, False, [0, 1], [1 / 3, 1 / 3]),
        ([3e38, -3e38, 3.1e38], 3, True, [2, 0, 1], [1.0, 0.0, 0.0]),
        ([1e-40, 2e-40, -1e-40], 2, True, [1, 0], [0.5, 0.5]),
        ([7.0], 1, False, [0], [1.0]),
    ],
)
def test_selection_by_hand(
    row: list[float], topk: int, renorm: bool, ids: list[int], weights: list[float]
) -> None:
    got_weights, got_ids = reference.topk_softmax(torch.tensor([row, row]), topk, renorm)
    assert got_ids.dtype == torch.int32 and got_weights.dtype == torch.float32
    assert got_ids.tolist() == [ids, ids]
    torch.testing.assert_close(got_weights[1], torch.tensor(weights), rtol=1e-6, atol=0)


@pytest.mark.parametrize("renorm", [True, False])
def test_weights_match_softmax(renorm: bool) -> None:
    logits = torch.randn(200, 161, generator=torch.Generator().manual_seed(1)) * 5
    weights, ids = reference.topk_softmax(logits, 9, renorm)
    want = torch.softmax(logits.double(), 1).gather(1, ids.long())
    if renorm:
        want = want / want.sum(1, keepdim=True)
    torch.testing.assert_close(weights.double(), want, rtol=1e-6, atol=0)


def test_sorting_by_hand() -> None:
    ids = torch.tensor([[2, 0], [2, 3], [0, 2]], dtype=torch.int32)
    weights = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    sorted_ids, sorted_weights, experts, counts, moe_buf = reference.moe_sorting(
        ids, weights, 4, 5, torch.bfloat16, block_size=2
    )
    pad, slot_1 = (2 << 24) | 3, 1 << 24
    assert counts.tolist() == [8, 3]
    assert sorted_ids.tolist() == [
        slot_1,
        2,
        0,
        1,
        slot_1 | 2,
        pad,
        slot_1 | 1,
        pad,
        -1,
        -1,
        -1,
        -1,
    ]
    want = torch.tensor([0.1, 0.7, 0.9, 0.8, 0.3, 0.0, 0.2, 0.0])
    assert torch.equal(sorted_weights[:8], want) and bool(sorted_weights[8:].isnan().all())
    assert experts.tolist() == [0, 2, 2, 3, -1, -1]
    assert moe_buf.shape == (3, 5) and moe_buf.dtype == torch.bfloat16 and not moe_buf.any()


def test_mask_and_local_tokens_by_hand() -> None:
    ids = torch.tensor([[2, 0], [2, 3], [-5, 99]], dtype=torch.int32)
    weights = torch.tensor([[0.9, 0.1], [0.8, 0.2], [NAN, NAN]])
    sorted_ids, sorted_weights, experts, counts, moe_buf = reference.moe_sorting(
        ids,
        weights,
        4,
        5,
        torch.float32,
        block_size=4,
        expert_mask=torch.tensor([0, 1, 1, 1], dtype=torch.int32),
        num_local_tokens=torch.tensor([2], dtype=torch.int32),
    )
    pad = (2 << 24) | 2
    assert counts.tolist() == [8, 2]
    assert sorted_ids[:8].tolist() == [0, 1, pad, pad, (1 << 24) | 1, pad, pad, pad]
    assert sorted_weights[:8].tolist() == torch.tensor([0.9, 0.8, 0, 0, 0.2, 0, 0, 0]).tolist()
    assert experts[:2].tolist() == [1, 2]
    assert len(sorted_ids) == 3 * 2 + 4 * 4 - 2 and len(experts) == 5
    assert not moe_buf[:2].any()


def test_slots_from_128_on_are_negative() -> None:
    ids = torch.arange(255, dtype=torch.int32)[None]
    sorted_ids, _, experts, counts, _ = reference.moe_sorting(
        ids, torch.full((1, 255), 1 / 255), 255, 1, torch.float32, block_size=2
    )
    assert sorted_ids[0] == 0 and sorted_ids[2 * 254] == (254 << 24) - (1 << 32)
    assert sorted_ids[1] == ((255 << 24) | 1) - (1 << 32)
    assert counts.tolist() == [510, 1] and experts.tolist() == list(range(255))


@pytest.mark.parametrize("num_experts", [1, 4])
def test_no_tokens(num_experts: int) -> None:
    outputs = reference.topk_softmax_sorting(
        torch.empty(0, num_experts), 1, num_experts, 3, torch.float16, block_size=2
    )
    assert [list(tensor.shape) for tensor in outputs] == [
        [2 * num_experts - 1],
        [2 * num_experts - 1],
        [num_experts],
        [2],
        [0, 3],
    ]
    assert outputs[3].tolist() == [0, 0]


IDS = torch.tensor([[0, 1]], dtype=torch.int32)
WEIGHTS = torch.ones(1, 2)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: select([[1.0]], 1, True), TypeError, "gating_output.*list"),
        (lambda: select(WEIGHTS, 1.0, True), TypeError, "topk.*float"),
        (lambda: select(WEIGHTS, 1, 1), TypeError, "need_renorm.*int"),
        (lambda: reference.topk_softmax(WEIGHTS, 3, True), ValueError, "topk.*1 to 2.*got 3"),
        (lambda: reference.topk_softmax(WEIGHTS.double(), 1, True), ValueError, "gating.*float64"),
        (lambda: reference.topk_softmax(WEIGHTS[0], 1, True), ValueError, r"gating_output.*\[2\]"),
        (
            lambda: reference.topk_softmax_sorting(WEIGHTS, 1, 3, 1, torch.float32),
            ValueError,
            "gating_output.*num_experts = 3.*got 2",
        ),
        (lambda: sort(IDS.long()), ValueError, "topk_ids.*int32.*int64"),
        (lambda: sort(IDS, block_size=0), ValueError, "block_size.*got 0"),
        (lambda: sort(IDS, expert_mask=IDS[0] + 1), ValueError, "expert_mask.*0 and 1.*got 2"),
        (lambda: sort(IDS, expert_mask=IDS), ValueError, r"expert_mask.*\[2\].*got \[1, 2\]"),
        (lambda: sort(IDS, num_local_tokens=1), TypeError, "num_local_tokens.*int"),
        (lambda: sort(IDS, num_local_tokens=IDS), ValueError, r"num_local_tokens.*\[1, 2\]"),
        (
            lambda: sort(IDS, num_local_tokens=torch.tensor([2], dtype=torch.int32)),
            ValueError,
            "num_local_tokens.*0 to 1.*got 2",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], object], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


def sort(ids: Tensor, **kwargs: Any) -> object:
    """``moe_sorting`` of one token and two experts."""
    return reference.moe_sorting(ids, WEIGHTS, 2, 1, torch.float32, **kwargs)


def select(*args: Any) -> object:
    """``topk_softmax`` of arguments that a type checker would refuse."""
    return reference.topk_softmax(*args)
