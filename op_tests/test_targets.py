"""Does every target run its own code? Both wave widths in one process, told apart by what they do."""

from __future__ import annotations

import _checkout  # noqa: F401  (makes a checkout importable)
import pytest
import torch

import aiter
from aiter.jit import cpu_wave, module_for

pytestmark = pytest.mark.slow  # builds for both


def test_two_targets_in_one_process_are_two_modules() -> None:
    modules = []
    for width in (64, 32, 64):
        with cpu_wave(width):
            modules.append(module_for("module_fused_topk_moe_sorting", "cpu"))
    assert modules[0] is not modules[1]
    assert modules[0] is modules[2]
    assert modules[0].fused_topk_moe_sorting_fwd is not modules[1].fused_topk_moe_sorting_fwd


def test_both_wave_widths_run() -> None:
    """Each from a build of its own, with the same bits: the width is no part of the result."""
    logits = torch.randn(64, 1100, generator=torch.Generator().manual_seed(0))
    results, builds = [], []
    for width in (64, 32):
        weights = torch.empty(64, 8)
        ids, token_expert_ids = (torch.empty(64, 8, dtype=torch.int32) for _ in range(2))
        with cpu_wave(width):
            aiter.topk_softmax(weights, ids, token_expert_ids, logits, False)
            builds.append(str(module_for("module_topk_softmax", "cpu").__file__))
        results.append(weights)
    assert "cpu-wave64" in builds[0] and "cpu-wave32" in builds[1]
    assert torch.equal(*results)
