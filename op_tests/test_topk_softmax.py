"""Does the separate selection op choose and weigh experts as the contract says?

Judged by ``runners.run_topk_softmax``: exact indices, weights to 1e-6, token_expert_indices,
guards, untouched inputs, and the selection rule stated without the reference.
"""

from __future__ import annotations

import sys

import _checkout  # noqa: F401
import pytest
import torch
from cases import GATING_DTYPES, LAYOUTS, LOGITS, MODEL_SHAPES, PARITY_SHAPES, Case
from runners import run_topk_softmax
from targets import Target

import aiter

EXPERT_COUNTS = (1, 2, 3, 7, 16, 33, 64, 65, 161, 257, 385, 513, 896, 1024, 1025, 2047, 2048)
TOPKS = (1, 2, 5, 9, 11, 16, 33, 64)


def run(case: Case, target: Target) -> None:
    run_topk_softmax(case, target, aiter.topk_softmax)


@pytest.mark.parametrize("renorm", [True, False], ids=["renorm", "softmax"])
@pytest.mark.parametrize("dtype", GATING_DTYPES, ids=str)
def test_model_shapes(target: Target, dtype: torch.dtype, renorm: bool) -> None:
    for num_experts, topk in sorted({shape[:2] for shape in MODEL_SHAPES.values()}):
        for count, logits in ((1, "normal"), (9, "ties")):
            run(Case(count, num_experts, topk, dtype, renorm, logits=logits), target)


@pytest.mark.parametrize("num_experts", EXPERT_COUNTS)
def test_expert_counts(target: Target, num_experts: int) -> None:
    """Every expert count with every topk that it allows, up to 64."""
    for topk in sorted({*TOPKS, min(num_experts, 64)}):
        if topk > num_experts:
            continue
        for count, logits, renorm in ((1, "normal", True), (5, "ties", False)):
            run(Case(count, num_experts, topk, logits=logits, need_renorm=renorm), target)


@pytest.mark.parametrize("renorm", [True, False], ids=["renorm", "softmax"])
@pytest.mark.parametrize("logits", LOGITS)
def test_selection_rules(target: Target, logits: str, renorm: bool) -> None:
    for dtype in GATING_DTYPES:
        for shape in ((20, 8, 3), (19, 16, 16), (12, 65, 7), (11, 128, 4), (5, 1025, 9)):
            run(Case(*shape, dtype=dtype, logits=logits, need_renorm=renorm), target)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gating_layouts(target: Target, layout: str) -> None:
    for dtype in GATING_DTYPES:
        for shape in ((1, 128, 4), (9, 128, 4), (13, 256, 8), (7, 161, 9), (6, 1, 1), (5, 33, 2)):
            run(Case(*shape, dtype=dtype, layout=layout, logits="wide"), target)


@pytest.mark.parametrize("count", [0, 1, 3, 63, 64, 65, 127, 128, 129, 1000])
def test_token_tails(target: Target, count: int) -> None:
    for num_experts, topk in ((8, 2), (128, 4), (256, 8)):
        if count * num_experts <= 200_000:
            run(Case(count, num_experts, topk, torch.bfloat16, logits="ties"), target)


def test_many_tokens(target: Target) -> None:
    run(Case(4097, 32, 4, torch.bfloat16, logits="ties"), target)


def main() -> int:
    """Print the verdict of every shape."""
    from script import parse_options, run_script

    def verdicts(case: Case, target: Target) -> list[str]:
        run(case, target)
        return ["ok"]

    models = sorted({shape[:2] for shape in MODEL_SHAPES.values()})
    options = parse_options(__doc__ or "", [*PARITY_SHAPES, *((8, *model) for model in models)])
    return run_script(options, ["reference"], verdicts)


if __name__ == "__main__":
    sys.exit(main())
