"""Does the separate sort build the sorted buffers as the contract says, under every policy?

Judged by ``runners.run_moe_sorting``: the ids come from the reference's selection, the outputs and
the workspace lie between guards, the workspace has exactly the size asked for and starts as
garbage.
"""

from __future__ import annotations

import sys

import _checkout  # noqa: F401
import pytest
import torch
from cases import MASKS, MODEL_SHAPES, PARITY_SHAPES, Case
from runners import Op, SortedOutputs, reporting, run_moe_sorting
from targets import Target

import aiter
from aiter.routing.dispatch import MOST_ONESHOT_ENTRIES

POLICIES = {0: "auto", 1: "oneshot", 2: "multiphase"}
BLOCK_SIZES = (1, 16, 32, 33, 64, 128)
EXPERT_COUNTS = (1, 2, 3, 7, 64, 65, 161, 257, 513, 896, 1024, 1025, 2048, 3001)

SORT: Op = aiter.moe_sorting_opus_fwd

per_policy = pytest.mark.parametrize("policy", POLICIES, ids=POLICIES.get)


def run(case: Case, target: Target, policy: int) -> None:
    run_moe_sorting(
        case,
        target,
        SORT,
        policy,
        aiter.moe_sorting_opus_get_workspace_size,
    )


@per_policy
def test_model_shapes(target: Target, policy: int) -> None:
    for num_experts, topk, model_dim in MODEL_SHAPES.values():
        run(Case(1, num_experts, topk, model_dim=model_dim), target, policy)
        run(Case(33, num_experts, topk), target, policy)


@per_policy
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1025])
def test_token_tails(target: Target, count: int, policy: int) -> None:
    for num_experts, topk in ((8, 2), (128, 4), (257, 9)):
        if count * topk <= 4200:
            run(Case(count, num_experts, topk, logits="ties"), target, policy)


@per_policy
def test_strides_of_single_rows_do_not_matter(target: Target, policy: int) -> None:
    """What PyTorch calls contiguous is accepted: a single or no row at any row stride."""
    for count in (0, 1):
        case = Case(count, 8, 2)
        outputs = SortedOutputs.allocate(case, target.device)
        wide = torch.arange(8, dtype=torch.int32, device=target.device)[None]
        ids = wide[:count, :2]
        with reporting(f"policy {policy}, {case}", target), target.active():
            size = aiter.moe_sorting_opus_get_workspace_size(count, 8, 2, policy)
            workspace = torch.empty(size, dtype=torch.uint8, device=target.device)
            SORT(ids, ids + 0.5, *outputs.tensors, 8, 32, None, None, workspace, policy)
        target.synchronize()
        assert outputs.tensors[3].tolist() == [64 * count, count]
        if count:
            assert outputs.tensors[0][[0, 32]].tolist() == [0, 1 << 24]
            assert outputs.tensors[1][[0, 32]].tolist() == [0.5, 1.5]


@per_policy
@pytest.mark.parametrize("num_experts", EXPERT_COUNTS)
def test_expert_counts(target: Target, num_experts: int, policy: int) -> None:
    for topk in sorted({1, 2, 5, 16, 65, min(num_experts, 255)}):
        if topk <= num_experts:
            run(Case(3, num_experts, topk, logits="ties", block_size=16), target, policy)
    run(Case(70, num_experts, 1, logits="equal"), target, policy)


@per_policy
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(target: Target, block_size: int, policy: int) -> None:
    for shape in ((1, 128, 4), (33, 128, 4), (200, 8, 2), (40, 3, 3), (29, 256, 8)):
        run(Case(*shape, block_size=block_size, logits="ties"), target, policy)


@per_policy
@pytest.mark.parametrize("mask", MASKS)
def test_expert_mask_and_local_tokens(target: Target, mask: str, policy: int) -> None:
    """Rows from n on hold ids far out of range and NaN weights."""
    for num_tokens, num_experts, topk in ((1, 128, 4), (150, 128, 4), (14, 257, 9), (9, 5, 5)):
        for num_local in (None, *sorted({0, 1, num_tokens - 1, num_tokens})):
            case = Case(num_tokens, num_experts, topk, mask=mask, num_local=num_local)
            run(case, target, policy)


@per_policy
def test_moe_buf(target: Target, policy: int) -> None:
    for dtype in (torch.uint8, torch.bfloat16, torch.float32):
        for model_dim in (1, 37, 257):
            for step, num_local in ((0, None), (1, 10), (3, 0)):
                case = Case(
                    11,
                    16,
                    2,
                    model_dim=model_dim,
                    moebuf_dtype=dtype,
                    moe_buf_offset=step * dtype.itemsize,
                    num_local=num_local,
                )
                run(case, target, policy)


@per_policy
@pytest.mark.parametrize(
    "case",
    [
        Case(4097, 32, 4, logits="ties"),
        Case(10007, 128, 4, num_local=9999, mask="random"),
        Case(65536, 8, 1, logits="ties", model_dim=1),
        Case(65536, 128, 4, model_dim=1),
        Case(5000, 1024, 8, mask="random", num_local=4999, model_dim=1),
        # LDS has one word per expert, so that a tile of 40 or 79 tokens is done in parts.
        Case(5000, 4096, 2, mask="random", num_local=4990, model_dim=1),
    ],
    ids=lambda case: f"M{case.num_tokens}-E{case.num_experts}-K{case.topk}",
)
def test_many_tokens(target: Target, case: Case, policy: int) -> None:
    run(case, target, policy)


def test_workspace_size(target: Target) -> None:
    """The size is a count of bytes that covers what the multi-phase sort needs."""
    with target.active():
        for policy in POLICIES:
            for shape in ((0, 8, 2), (1, 8, 2), (64, 128, 4), (65536, 1024, 16)):
                size = aiter.moe_sorting_opus_get_workspace_size(*shape, policy)
                assert isinstance(size, int)
                assert 0 <= size < 1 << 40, (shape, policy)
        assert aiter.moe_sorting_opus_get_workspace_size(
            4096, 128, 4
        ) == aiter.moe_sorting_opus_get_workspace_size(4096, 128, 4, 0)


@pytest.mark.parametrize("topk", [1, 4])
def test_the_oneshot_limit_is_that_of_the_dispatch(target: Target, topk: int) -> None:
    """What `routing.dispatch` and the launcher's own rule say is the same: oneshot has no workspace."""
    tokens = MOST_ONESHOT_ENTRIES // topk
    with target.active():
        assert aiter.moe_sorting_opus_get_workspace_size(tokens, 8, topk) == 0
        assert aiter.moe_sorting_opus_get_workspace_size(tokens + 1, 8, topk) > 0


def main() -> int:
    """Print the verdict of every shape under every policy."""
    from script import parse_options, run_script

    def verdicts(case: Case, target: Target) -> list[str]:
        for policy in POLICIES:
            run(case, target, policy)
        return ["ok"] * len(POLICIES)

    models = sorted({shape[:2] for shape in MODEL_SHAPES.values()})
    options = parse_options(__doc__ or "", [*PARITY_SHAPES, *((200, *model) for model in models)])
    return run_script(options, list(POLICIES.values()), verdicts)


if __name__ == "__main__":
    sys.exit(main())
