"""Are the checks of the op tests right? A fake op passes, one with a planted bug does not.

A bug planted in the reference too must be seen by the checks that do not use the reference.

Long because the planted bugs of all checks stand side by side, in tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from buffers import Mismatch, storage_bytes
from cases import INF, LAYOUTS, LOGITS, MASKS, MODEL_SHAPES, NAN, Case, make_inputs
from checks import check_same_bits, check_structure
from runners import run_fused, run_topk_softmax
from targets import Target
from torch import Tensor

from aiter import reference
from aiter.reference import routing

CPU = Target("cpu")
CASE = Case(num_tokens=37, num_experts=9, topk=3, block_size=8, logits="ties")
MASKED = replace(CASE, mask="all_but_first", num_local=21)

Outputs = Mapping[str, Tensor]


def fake_fused(
    gating_output: Tensor,
    sorted_ids: Tensor,
    sorted_weights: Tensor,
    sorted_expert_ids: Tensor,
    num_valid_ids: Tensor,
    moe_buf: Tensor,
    num_experts: int,
    topk: int,
    unit_size: int,
    need_renorm: bool,
    *,
    local_expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
) -> None:
    """The fused op, done by the reference."""
    want = reference.topk_softmax_sorting(
        gating_output,
        topk,
        num_experts,
        moe_buf.shape[1],
        moe_buf.dtype,
        need_renorm,
        unit_size,
        local_expert_mask,
        num_local_tokens,
    )
    num_valid_ids.copy_(want[3])
    if gating_output.shape[0] == 0:
        return
    num_valid, num_local = want[3].tolist()
    sorted_ids[:num_valid] = want[0][:num_valid]
    sorted_weights[:num_valid] = want[1][:num_valid]
    sorted_expert_ids[: num_valid // unit_size] = want[2][: num_valid // unit_size]
    moe_buf.view(torch.uint8)[:num_local] = 0


def fake_topk_softmax(
    topk_weights: Tensor,
    topk_indices: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    need_renorm: bool,
) -> None:
    """The separate selection op, done by the reference."""
    num_tokens, topk = topk_weights.shape
    weights, ids = reference.topk_softmax(gating_output, topk, need_renorm)
    topk_weights.copy_(weights)
    topk_indices.copy_(ids)
    grid = torch.arange(num_tokens * topk, dtype=torch.int32).view(topk, num_tokens)
    token_expert_indices.copy_(grid.t())


# --- The checks, on an op without bugs ----------------------------------------------------------


@pytest.mark.parametrize("renorm", [True, False])
def test_checks_pass_the_reference(renorm: bool) -> None:
    base = replace(CASE, need_renorm=renorm)
    varied = [replace(base, logits=logits) for logits in LOGITS]
    varied += [replace(base, layout=layout) for layout in LAYOUTS]
    varied += [replace(base, mask=mask) for mask in MASKS]
    varied += [replace(base, num_local=count) for count in (0, 1, 36, 37)]
    varied += [replace(base, num_tokens=0), replace(base, moe_buf_offset=2), MASKED]
    varied += [Case(3, 300, 255, need_renorm=renorm), Case(5, 1, 1, need_renorm=renorm)]
    for case in varied:
        run_fused(case, CPU, fake_fused)
        run_topk_softmax(case, CPU, fake_topk_softmax)


def test_cases_reach_the_special_rows() -> None:
    """The generators produce what they are named for, so the selection rules are really tested."""
    logits = {name: make_inputs(replace(CASE, logits=name), "cpu").gating for name in LOGITS}
    finite = logits["few_finite"].isfinite().sum(1)
    assert finite.min() == 0 and 0 < finite.float().mean() < 9 and (finite == 2).any()
    infinite = (logits["infinite"] == INF).sum(1)
    assert {0, 1, 2, 4, 9} <= set(infinite.tolist())
    ascending = logits["ties"].sort(1).values
    assert (ascending[:, 1:] == ascending[:, :-1]).any(1).all()
    assert (logits["denormal"].abs() < torch.finfo(torch.float32).tiny).float().mean() > 0.9
    assert 0 < logits["signed_zeros"].signbit().sum() < logits["signed_zeros"].numel()
    garbage = make_inputs(MASKED, "cpu").gating[21:]
    assert garbage.isnan().any() and (garbage == INF).any()
    padded = make_inputs(replace(CASE, layout="padded"), "cpu").gating
    assert padded.stride() == (12, 1) and padded.data_ptr() % 16 != 0
    assert make_inputs(replace(CASE, layout="broadcast"), "cpu").gating.stride() == (0, 1)
    assert make_inputs(replace(CASE, layout="sliding"), "cpu").gating.stride() == (1, 1)
    assert len(MODEL_SHAPES) >= 17


# --- The checks, on planted bugs -----------------------------------------------------------------


def _poke(name: str, distance: int) -> Callable[[Outputs], None]:
    """Write the byte at ``distance`` from the end of an output; negative: from its start."""

    def bug(out: Outputs) -> None:
        tensor = out[name]
        raw = storage_bytes(tensor)
        start = tensor.storage_offset() * tensor.itemsize
        raw[start + distance if distance < 0 else start + tensor.nbytes + distance] = 0

    return bug


def _first_padding(out: Outputs) -> int:
    return int(((out["ids"] >> 24) == 3).nonzero()[0])


def _add(name: str, index: int, amount: float) -> Callable[[Outputs], None]:
    def bug(out: Outputs) -> None:
        out[name][index] += amount

    return bug


def _drop_padding_weight(out: Outputs) -> None:
    out["weights"][_first_padding(out)] = 1e-37


def _padding_holds_all_tokens(out: Outputs) -> None:
    out["ids"][_first_padding(out)] = (3 << 24) | 37


def _swap_tokens(out: Outputs) -> None:
    for name in ("ids", "weights"):
        out[name][:2] = out[name][:2].flip(0)


def _scale_weight(factor: float) -> Callable[[Outputs], None]:
    def bug(out: Outputs) -> None:
        out["weights"][0] *= factor

    return bug


def _repeat_entry(out: Outputs) -> None:
    out["ids"][1] = out["ids"][0]


def _unwritten_tail(out: Outputs) -> None:
    out["ids"][int(out["counts"][0]) - 1] = -0x5A5A5A5B


def _behind_the_slots(name: str, block_size: int) -> Callable[[Outputs], None]:
    def bug(out: Outputs) -> None:
        out[name][int(out["counts"][0]) // block_size] = 0

    return bug


def _global_ids(out: Outputs) -> None:
    out["experts"][: int(out["counts"][0]) // 8] += 1


def _nonzero_moe_buf(out: Outputs) -> None:
    out["moe_buf"].view(torch.uint8)[20, -1] = 0x80


def _zero_unused_row(out: Outputs) -> None:
    out["moe_buf"][21] = 0


def _change_input(out: Outputs) -> None:
    out["gating"][0, 0] += 1


BUGS: dict[str, tuple[Case, Callable[[Outputs], None], str]] = {
    "count too high": (CASE, _add("counts", 0, 8), "num_valid_ids"),
    "all tokens counted": (MASKED, _add("counts", 1, 16), "num_valid_ids"),
    "padding holds M": (MASKED, _padding_holds_all_tokens, "sorted_ids"),
    "padding weight": (CASE, _drop_padding_weight, "sorted_weights"),
    "tokens out of order": (CASE, _swap_tokens, "sorted_ids"),
    "slot lost": (CASE, _add("ids", 4, 1 << 24), "sorted_ids"),
    "entry repeated": (CASE, _repeat_entry, "sorted_ids"),
    "entry not written": (CASE, _unwritten_tail, "sorted_ids"),
    "weight off by 2e-6": (CASE, _scale_weight(1 + 2e-6), "sorted_weights"),
    "weight is NaN": (CASE, _scale_weight(NAN), "sorted_weights"),
    "id behind the slots in use": (CASE, _behind_the_slots("ids", 1), "sorted_ids from item"),
    "weight behind them": (MASKED, _behind_the_slots("weights", 1), "sorted_weights from item"),
    "expert behind the blocks": (CASE, _behind_the_slots("experts", 8), "expert_ids from item"),
    "global expert ids": (MASKED, _global_ids, "sorted_expert_ids"),
    "moe_buf tail byte": (MASKED, _nonzero_moe_buf, "moe_buf"),
    "moe_buf row n zeroed": (MASKED, _zero_unused_row, "moe_buf"),
    "input changed": (CASE, _change_input, "gating_output"),
    "M == 0 writes": (replace(CASE, num_tokens=0), _add("ids", 0, 1), "sorted_ids"),
    **{
        f"{name} {where}": (CASE, _poke(name, distance), what)
        for name, what in (
            ("ids", "sorted_ids"),
            ("weights", "sorted_weights"),
            ("experts", "sorted_expert_ids"),
            ("counts", "num_valid_ids"),
            ("moe_buf", "moe_buf"),
        )
        for where, distance in (("before its start", -1), ("past its end", 0))
    },
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found(name: str) -> None:
    case, bug, words = BUGS[name]

    def broken(gating: Tensor, *args: Any, **kwargs: Any) -> None:
        fake_fused(gating, *args, **kwargs)
        names = ("ids", "weights", "experts", "counts", "moe_buf")
        bug({"gating": gating, **dict(zip(names, args, strict=False))})

    with pytest.raises(Mismatch, match=words):
        run_fused(case, CPU, broken)


# --- Bugs that the reference shares ---------------------------------------------------------------

_select = reference.topk_softmax
Selected = tuple[Tensor, Tensor]


def _ties_to_the_higher_index(gating: Tensor, topk: int, renorm: bool) -> Selected:
    weights, ids = _select(gating.flip(1), topk, renorm)
    return weights, gating.shape[1] - 1 - ids


def _nan_wins(gating: Tensor, topk: int, renorm: bool) -> Selected:
    return _select(torch.where(gating.isnan(), INF, gating), topk, renorm)


def _minus_zero_loses(gating: Tensor, topk: int, renorm: bool) -> Selected:
    return _select(torch.where((gating == 0) & gating.signbit(), -1e-3, gating), topk, renorm)


def _expert_repeated(gating: Tensor, topk: int, renorm: bool) -> Selected:
    weights, ids = _select(gating, topk, renorm)
    ids[:, 1] = ids[:, 0]
    return weights, ids


def _slots_reversed(gating: Tensor, topk: int, renorm: bool) -> Selected:
    weights, ids = _select(gating, topk, renorm)
    return weights.flip(1), ids.flip(1)


def _not_renormalised(gating: Tensor, topk: int, renorm: bool) -> Selected:
    return _select(gating, topk, False)


def _runner_up_missed(gating: Tensor, topk: int, renorm: bool) -> Selected:
    weights, ids = _select(gating, topk + 1, renorm)
    return torch.cat([weights[:, :1], weights[:, 2:]], 1), torch.cat([ids[:, :1], ids[:, 2:]], 1)


@pytest.mark.parametrize(
    ("select", "logits"),
    [
        (_ties_to_the_higher_index, "ties"),
        (_nan_wins, "few_finite"),
        (_minus_zero_loses, "signed_zeros"),
        (_expert_repeated, "normal"),
        (_slots_reversed, "normal"),
        (_not_renormalised, "normal"),
        (_runner_up_missed, "normal"),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_selection_bug_shared_with_the_reference_is_found(
    monkeypatch: pytest.MonkeyPatch,
    select: Callable[[Tensor, int, bool], Selected],
    logits: str,
    fused: bool,
) -> None:
    case = replace(CASE, logits=logits)
    for module in (reference, routing):
        monkeypatch.setattr(module, "topk_softmax", select)
    run: Callable[[], object] = (
        (lambda: run_fused(case, CPU, fake_fused))
        if fused
        else (lambda: run_topk_softmax(case, CPU, fake_topk_softmax))
    )
    with pytest.raises(Mismatch, match=r"token \d|expert ids|weights|\(token, slot\)|ascending"):
        run()


# Two tokens, three experts, topk 2, blocks of 2: token 0 chose experts 0, 2; token 1 chose 2, 0.
PAD = (2 << 24) | 2
SLOT = 1 << 24
GOOD: dict[str, list[float]] = {
    "ids": [0, SLOT | 1, SLOT, 1, -1],
    "weights": [0.5, 0.25, 0.5, 0.75, NAN],
    "experts": [0, 2],
    "counts": [4, 2],
}


def _structure(given_ids: list[list[int]] | None = None, **changes: list[float]) -> None:
    parts = {**GOOD, **changes}
    check_structure(
        [
            torch.tensor(parts["ids"], dtype=torch.int32),
            torch.tensor(parts["weights"], dtype=torch.float32),
            torch.tensor(parts["experts"], dtype=torch.int32),
            torch.tensor(parts["counts"], dtype=torch.int32),
        ],
        num_tokens=2,
        num_experts=3,
        topk=2,
        block_size=2,
        ids=None if given_ids is None else torch.tensor(given_ids, dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"counts": [3, 2]}, r"num_valid_ids\[0\]"),
        ({"counts": [8, 2]}, r"num_valid_ids\[0\]"),
        ({"counts": [4, 3]}, r"num_valid_ids\[1\]"),
        ({"experts": [2, 0]}, "ascending experts"),
        ({"experts": [0, 3]}, "local experts below 3"),
        ({"experts": [1, 1]}, "strictly ascending tokens"),
        ({"ids": [SLOT | 1, 0, SLOT, 1]}, "strictly ascending tokens"),
        ({"ids": [0, 0, SLOT, 1]}, "strictly ascending tokens"),
        ({"ids": [0, SLOT | 1, 3 << 24, 1]}, "got slot 3"),
        ({"ids": [0, SLOT | 1, SLOT, 2]}, "of token 2"),
        ({"ids": [0, SLOT | 1, 0, 1]}, "each .token, slot. once"),
        ({"ids": [0, 1, SLOT, PAD], "weights": [1, 1, 1, 0]}, "1 are missing"),
        ({"ids": [0, SLOT | 1, PAD, PAD], "weights": [1, 1, 0, 0]}, "every block"),
        ({"ids": [0, PAD, SLOT, 1], "weights": [1, 1e-45, 1, 1]}, "exactly 0.0"),
        ({"ids": [0, PAD, SLOT, 1], "weights": [1, NAN, 1, 1]}, "exactly 0.0"),
        ({"ids": [0, PAD + 1, SLOT, 1], "weights": [1, 0, 1, 1]}, "token n = 2"),
        (
            {"ids": [0, PAD, SLOT, 1], "weights": [1, 0, 1, 1], "experts": [1, 1]},
            "end of an expert",
        ),
        ({"ids": [0, PAD, SLOT, PAD], "weights": [1, 0, 1, 0]}, "2 are missing"),
    ],
)
def test_structure_is_checked_without_the_reference(
    changes: dict[str, list[float]], words: str
) -> None:
    _structure()
    with pytest.raises(Mismatch, match=words):
        _structure(**changes)


# As GOOD, but token 0 chose expert 0 twice and token 1 chose 2 and an id that is no expert's.
GIVEN_IDS = [[0, 0], [2, 7]]
GIVEN: dict[str, list[float]] = {"ids": [0, SLOT, 1, PAD, -1], "weights": [0.5, 0.5, 0.75, 0, NAN]}


@pytest.mark.parametrize(
    ("changes", "ids", "words"),
    [
        ({"ids": [SLOT, 0, 1, PAD]}, GIVEN_IDS, "strictly ascending"),
        ({"ids": [0, 0, 1, PAD]}, GIVEN_IDS, "strictly ascending"),
        ({"ids": [0, PAD, 1, PAD], "weights": [1, 0, 1, 0]}, GIVEN_IDS, r"an entry for every id"),
        ({}, [[0, 0], [2, 1]], "an entry for every id"),
        ({}, [[0, 2], [2, 7]], "an entry for every id"),
        ({"ids": [0, -0x5A5A5A5B, 1, PAD]}, GIVEN_IDS, "expected slot"),
    ],
)
def test_structure_of_given_ids(
    changes: dict[str, list[float]], ids: list[list[int]], words: str
) -> None:
    _structure(GIVEN_IDS, **GIVEN)
    with pytest.raises(Mismatch, match=words):
        _structure(ids, **{**GIVEN, **changes})


@pytest.mark.parametrize("wrong", range(4))
def test_same_bits(wrong: int) -> None:
    """One differing bit in a defined part is seen, and what lies behind is not looked at."""
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    expected = reference.topk_softmax_sorting(logits, 3, 9, 4, torch.bfloat16, block_size=8)
    got = [tensor.clone() for tensor in expected]
    slots = int(expected[3][0])
    got[0][slots:] = 7
    check_same_bits(got, expected, 8)
    got[wrong].view(torch.int32)[0] ^= 1
    with pytest.raises(Mismatch):
        check_same_bits(got, expected, 8)
