"""Do the chain's two launches agree with top-k alone where a tile has many tokens?

Then rows come ahead into LDS, entries are put in order there before they are stored, and both launches
zero rows of `moe_buf`. Judged by `topk_softmax` alone, which takes each row from memory, and by the
reference's sort of what it gives, to the bit.
"""

from __future__ import annotations

import _checkout  # noqa: F401
import pytest
import torch
from cases import Case, make_inputs
from checks import check_same_bits
from route_calls import route
from runners import expected_of_ids, reporting, run_moe_sorting
from targets import Target

import aiter
from aiter import reference

MULTIPHASE = 2


def topk_alone(case: Case, gating: torch.Tensor, target: Target) -> tuple[torch.Tensor, ...]:
    """Weights and ids [M, K], by one launch without tiles."""
    weights = torch.empty(case.num_tokens, case.topk, device=target.device)
    ids, source = (torch.empty_like(weights, dtype=torch.int32) for _ in range(2))
    with target.active():
        aiter.topk_softmax(weights, ids, source, gating, case.need_renorm)
    target.synchronize()
    return weights, ids


@pytest.mark.parametrize(
    "case",
    [
        # A tile of 33 tokens: rows of 16-byte multiples come ahead, others and padded ones do not.
        Case(4200, 32, 4, torch.bfloat16, logits="ties"),
        Case(4200, 33, 4, torch.bfloat16, logits="ties"),
        Case(4200, 32, 4, torch.bfloat16, logits="ties", layout="padded"),
        Case(4200, 32, 4, torch.bfloat16, logits="ties", layout="broadcast"),
        Case(4200, 64, 8, logits="mixed", num_local=4111, mask="random"),
        Case(2001, 512, 10, num_local=1999),
        Case(1999, 896, 16, torch.float16, mask="random"),
        Case(2001, 300, 9, need_renorm=False),
        # Each launch zeroes some rows of a tile; n leaves tiles, and the last rows of one, out.
        Case(4200, 32, 4, model_dim=2048, num_local=4190, moe_buf_offset=2),
        Case(4200, 32, 4, model_dim=2048, num_local=33),
        Case(4200, 32, 4, model_dim=2048, num_local=0),
        Case(4200, 32, 4, torch.bfloat16, model_dim=3000, num_local=1),
    ],
    ids=lambda case: f"E{case.num_experts}-K{case.topk}-D{case.model_dim}-n{case.num_local}",
)  # fmt: skip
def test_rows_that_come_ahead(target: Target, case: Case) -> None:
    inputs = make_inputs(case, target.device)
    with reporting(case, target):
        weights, ids = topk_alone(case, inputs.gating, target)
        outputs = route(case, inputs, target, MULTIPHASE)
        assert aiter.fused_moe.last_path() == "multiphase"
        check_same_bits(outputs, expected_of_ids(case, inputs, ids, weights), case.block_size)
        assert not outputs[4][: case.local_tokens].view(torch.uint8).any()


IN_ORDER = [
    Case(16500, 64, 8, model_dim=1),  # 129 tokens: 1,032 entries, the fewest that are put in order
    Case(16300, 64, 8, model_dim=1),  # 128 tokens: as they come
    Case(
        40000, 512, 16, model_dim=1, mask="random", num_local=39985
    ),  # in parts where LDS is 64 KiB
    Case(33000, 32, 4, model_dim=512, moe_buf_offset=6, num_local=32900),
]


@pytest.mark.parametrize("repeats", [False, True], ids=["distinct", "repeats"])
@pytest.mark.parametrize("case", IN_ORDER, ids=lambda case: f"M{case.num_tokens}-K{case.topk}")
def test_order_in_lds(target: Target, case: Case, repeats: bool) -> None:
    """Ids of no expert leave no gap; an id that repeats in the first and in a later part is kept."""
    generator = torch.Generator().manual_seed(case.num_tokens)
    logits = torch.randn(case.num_tokens, case.num_experts, generator=generator)
    ids = reference.topk_softmax(logits, case.topk, True)[1]
    ids[torch.rand(ids.shape, generator=generator) < 0.02] = -1
    if repeats:
        ids[[5, 311, case.local_tokens - 1], 1] = ids[[5, 311, case.local_tokens - 1], 0]
    run_moe_sorting(
        case, target, aiter.moe_sorting_opus_fwd, MULTIPHASE,
        aiter.moe_sorting_opus_get_workspace_size, ids,
    )  # fmt: skip
