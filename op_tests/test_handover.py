"""Do workgroups that hand over through memory write what a single one writes?

The option `handover_size` has it done on the CPU and on GPUs without clusters, which choose it for
batches that take long; others refuse it. Who comes last, the scheduler decides: the race check (`fire/`)
and the interpreter (`rocm/`) say that it does not matter.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import _checkout  # noqa: F401
import pytest
import torch
from buffers import Mismatch
from cases import LOGITS, MASKS, Case, make_inputs
from checks import check_same_bits
from runners import SortedOutputs, can_hand_over, fused_arguments, run_fused
from targets import Target

import aiter

FUSED = aiter.fused_topk_moe_sorting_fwd
SIZES = (2, 3, 7, 16, 64)

BASE = Case(70, 128, 4, torch.bfloat16)
CASES = (
    BASE,
    replace(BASE, num_local=33),
    replace(BASE, num_local=0),
    replace(BASE, num_tokens=1),
    replace(BASE, num_tokens=2, block_size=1),
    replace(BASE, num_tokens=20, mask="random"),
    replace(BASE, dtype=torch.float32, mask="random", num_local=61),
    replace(BASE, num_experts=256, topk=8, need_renorm=False, block_size=33),
    replace(BASE, num_experts=896, topk=16, dtype=torch.float32),
    replace(BASE, num_experts=1030, topk=70, dtype=torch.float16, num_tokens=9),
    replace(BASE, num_experts=4, topk=4, block_size=1, num_tokens=200),
    replace(BASE, num_tokens=33, num_experts=5, topk=3, block_size=3, slots_offset=4),
    replace(BASE, layout="padded", logits="ties", model_dim=7, moe_buf_offset=2),
)


def skip_where_refused(target: Target) -> None:
    if not can_hand_over(target):
        pytest.skip("GPUs with clusters hand nothing over")


def check_handover(case: Case, target: Target, size: int) -> None:
    """``case`` with `size` workgroups, against the checks of every case and one workgroup's bits."""
    skip_where_refused(target)
    got = run_fused(case, target, partial(FUSED, handover_size=size), hands_over=True)
    check_same_bits(got, run_fused(case, target, partial(FUSED, cluster_size=1)), case.block_size)


@pytest.mark.parametrize("size", SIZES)
def test_sizes(target: Target, size: int) -> None:
    for case in CASES:
        check_handover(case, target, size)


@pytest.mark.parametrize("logits", LOGITS)
def test_logits_and_masks(target: Target, logits: str) -> None:
    for index, mask in enumerate(MASKS):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[index % 3]
        check_handover(replace(BASE, logits=logits, mask=mask, dtype=dtype), target, 5)


def test_calls_in_a_row_find_the_ticket_as_it_was(target: Target) -> None:
    """Calls of different sizes one after the other on one stream share a ticket."""
    for size in (2, 5, 1, 64, 3, 2):
        check_handover(BASE, target, size)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (65, "a value from 1 to {most}, got 65"),
        (-1, "a value from 1 to {most}, got -1"),
        ("2", "int"),
    ],
)
def test_bad_sizes(target: Target, size: object, words: str) -> None:
    words = words.format(most=64 if can_hand_over(target) else 1)
    with pytest.raises((ValueError, TypeError), match=f"handover_size: expected .*{words}"):
        call(target, handover_size=size)


def test_a_cluster_beside_a_handover_is_refused(target: Target) -> None:
    skip_where_refused(target)
    with pytest.raises(ValueError, match="cluster_size: expected 1 or None beside handover_size"):
        call(target, handover_size=2, cluster_size=2)


def test_rows_that_do_not_fit_are_refused(target: Target) -> None:
    """The last workgroup has all rows in LDS."""
    skip_where_refused(target)
    with pytest.raises(Mismatch, match=r"gating_output: expected at most \d+ rows"):
        run_fused(Case(100_000, 16, 8), target, partial(FUSED, handover_size=64))


def call(target: Target, **options: object) -> None:
    """The op on a small problem with `options`."""
    case = Case(8, 16, 2)
    outputs = SortedOutputs.allocate(case, target.device)
    arguments = fused_arguments(case, make_inputs(case, target.device), outputs)
    with target.active():
        FUSED(**arguments, **options)
