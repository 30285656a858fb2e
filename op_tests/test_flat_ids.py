"""Is one launch in flat format what an engine's own top-k and alignment would have handed its experts?

vLLM's and SGLang's Triton experts read what `moe_align_block_size` writes. Here that is once more, as a
loop over Python lists that shares nothing with the reference or the kernels, behind an equally plain
top-k. Shapes, masks and rows that do not count are random; on a GPU the same cases run there.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import _checkout  # noqa: F401
import pytest
import torch
from targets import Target
from torch import Tensor

from aiter.fused_moe import last_path, topk_routing_sorting

CASES = 16
WEIGHTS = 1e-6  # relative: exp and a sum of K in float32, against float64
SHAPES = ((8, 2), (60, 4), (128, 4), (128, 8), (257, 9), (384, 8))  # E, K


@dataclass
class Aligned:
    """What `moe_align_block_size` returns, as lists; `order` is as long as the slots in use."""

    order: list[int]
    experts: list[int]


def plain_align(
    ids: list[list[int]], num_experts: int, block_size: int, padding: int, expert_map: list[int]
) -> Aligned:
    """Every (token, slot) by its expert, in blocks; experts of other ranks keep theirs, as -1.

    Args:
        ids: K expert ids of every row that counts.
        padding: what fills a block, the number of all slots of the batch.
        expert_map: the local number of every expert, -1 for those of other ranks.
    """
    aligned = Aligned([], [])
    flat = [expert for row in ids for expert in row]
    for expert in range(num_experts):
        entries = [position for position, each in enumerate(flat) if each == expert]
        blocks = -(-len(entries) // block_size)
        aligned.order += entries + [padding] * (blocks * block_size - len(entries))
        aligned.experts += [expert_map[expert]] * blocks
    return aligned


def plain_topk(logits: Tensor, topk: int) -> tuple[list[list[float]], list[list[int]]]:
    """Renormalised softmax of the K largest, ties to the lower expert, in Python's floats."""
    weights, ids = [], []
    for row in logits.double().tolist():
        chosen = sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:topk]
        terms = [math.exp(row[expert] - row[chosen[0]]) for expert in chosen]
        weights.append([term / sum(terms) for term in terms])
        ids.append(chosen)
    return weights, ids


def expert_map_of(kind: str, num_experts: int, draw: random.Random) -> list[int]:
    """Local numbers: of all experts, of one rank of two, of a random half, or of none."""
    half = num_experts // 2
    here = {
        "all": [True] * num_experts,
        "rank": [expert >= half for expert in range(num_experts)],
        "random": [draw.random() < 0.5 for _ in range(num_experts)],
        "none": [False] * num_experts,
    }[kind]
    return [sum(here[:expert]) if here[expert] else -1 for expert in range(num_experts)]


@pytest.mark.parametrize("seed", range(CASES))
def test_as_a_plain_topk_and_alignment(target: Target, seed: int) -> None:
    draw = random.Random(seed)
    num_experts, topk = draw.choice(SHAPES)
    tokens, block_size = draw.choice((1, 2, 7, 33, 64)), draw.choice((16, 32, 64, 128))
    kind = ("all", "rank", "random", "none")[seed % 4]
    rows = tokens if seed % 3 else draw.randrange(tokens + 1)
    expert_map = expert_map_of(kind, num_experts, draw)
    generator = torch.Generator().manual_seed(seed)
    # NOTE: few values, so that ties decide.
    logits = torch.randint(-40, 40, (tokens, num_experts), generator=generator) / 8
    logits = logits.to(draw.choice((torch.float32, torch.bfloat16, torch.float16)))
    weights, ids = plain_topk(logits[:rows], topk)
    expected = plain_align(ids, num_experts, block_size, tokens * topk, expert_map)

    mask = None
    if kind != "all":
        mask = torch.tensor([int(local >= 0) for local in expert_map]).int().to(target.device)
    num_local = None
    if rows != tokens:
        num_local = torch.tensor(rows, dtype=torch.int32, device=target.device)
    for policy, path in ((0, "fused"), (1, "oneshot"), (2, "multiphase")):
        got_weights = torch.full((tokens, topk), -1.0, device=target.device)
        got_ids = torch.full((tokens, topk), -1, dtype=torch.int32, device=target.device)
        with target.active():
            order, _, experts, counts, output = topk_routing_sorting(
                logits.to(target.device), topk, num_experts, 0, torch.bfloat16,
                block_size=block_size, expert_mask=mask, num_local_tokens=num_local,
                dispatch_policy=policy, topk_out=(got_weights, got_ids), id_format="flat",
            )  # fmt: skip
        target.synchronize()
        assert policy == 0 or last_path() == path
        assert counts.tolist() == [len(expected.order), rows]
        assert order[: len(expected.order)].tolist() == expected.order
        assert experts[: len(expected.experts)].tolist() == expected.experts
        assert got_ids[:rows].tolist() == ids
        wanted = torch.tensor(weights, dtype=torch.float64).view(rows, topk)
        torch.testing.assert_close(got_weights[:rows].cpu().double(), wanted, rtol=WEIGHTS, atol=0)
        assert output.numel() == 0


def test_the_plain_alignment() -> None:
    """By hand: two rows of two slots, four experts, of which this rank has the last two."""
    aligned = plain_align([[3, 0], [3, 2]], 4, 2, padding=6, expert_map=[-1, -1, 0, 1])
    assert aligned.order == [1, 6, 3, 6, 0, 2]
    assert aligned.experts == [-1, 0, 1]
    assert plain_topk(torch.tensor([[0.0, 1.0, 1.0]]), 2) == ([[0.5, 0.5]], [[1, 2]])
