"""Does expert_load count? Against torch.bincount, with tails, out-of-range ids and bad input."""

from __future__ import annotations

import sys

import _checkout  # noqa: F401  (makes a checkout importable)
import pytest
import torch
from targets import Target, select_targets

from aiter.cli.table import format_table
from aiter.ops.expert_load import expert_load

SHAPES = (
    (1, 1, 1),
    (7, 2, 8),
    (64, 4, 128),
    (129, 8, 257),
    (1000, 1, 1),
    (0, 4, 16),
    (33, 3, 4000),
)


def check(target: Target, num_tokens: int, topk: int, num_experts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-2, num_experts + 2, (num_tokens, topk), generator=generator).int()
    valid = ids[(ids >= 0) & (ids < num_experts)]
    expected = torch.bincount(valid, minlength=num_experts).int()
    load = torch.full((num_experts,), -1, dtype=torch.int32, device=target.device)
    with target.active():
        expert_load(ids.to(target.device), load)
    assert torch.equal(load.cpu(), expected), f"{num_tokens, topk, num_experts} on {target}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counts(target: Target, shape: tuple[int, int, int]) -> None:
    check(target, *shape)


def test_bad_input(target: Target) -> None:
    ids = torch.zeros(2, 2, dtype=torch.int32, device=target.device)
    load = torch.zeros(4, dtype=torch.int32, device=target.device)
    with target.active():
        with pytest.raises(ValueError, match="load: expected dtype int32, got float32"):
            expert_load(ids, load.float())
        with pytest.raises(ValueError, match="topk_ids: expected a tensor of rank 2, got rank 1"):
            expert_load(ids[0], load)
        with pytest.raises(ValueError, match="load: expected memory of its own, got memory"):
            expert_load(ids, ids.view(-1))
        with pytest.raises(TypeError, match="topk_ids: expected a tensor, got int"):
            expert_load(3, load)  # type: ignore[arg-type]


def main() -> int:
    rows = []
    for target in select_targets(None):
        for shape in SHAPES:
            check(target, *shape)
            rows.append([str(target), *shape, "equal"])
    print(format_table(["target", "M", "K", "E", "result"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
