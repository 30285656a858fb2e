"""Do ranks that share the experts compute the layer of one that has them all?

Two processes meet in a file: gloo on the CPU, NCCL where there are two GPUs. What they compare is in
`expert_parallel_rank.py`.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import _checkout  # noqa: F401
import pytest
import torch
from moe_layers import BASE, make_layer

from aiter.parallel import expert_shard, fused_moe_expert_parallel

RANK = Path(__file__).parents[1] / "expert_parallel_rank.py"
EXAMPLE = Path(__file__).parents[2] / "examples" / "expert_parallel.py"
WORLD = 2
SECONDS = 600  # only a hang takes so long
# NOTE: gloo asks for the machine's name otherwise, which a container may not resolve.
ENVIRONMENT = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def run_ranks(store: Path, device: str) -> list[str]:
    """What every rank printed; raises AssertionError if one failed."""
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(rank), str(WORLD), str(store), device],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        printed = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * WORLD, "\n".join(printed)
    return printed


@pytest.mark.slow
def test_two_processes_on_the_cpu(tmp_path: Path) -> None:
    printed = run_ranks(tmp_path / "store", "cpu")
    assert [f"rank {rank}: " in text for rank, text in enumerate(printed)] == [True] * WORLD


def test_two_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < WORLD:
        pytest.skip("needs two GPUs")
    run_ranks(tmp_path / "store", "cuda")


@pytest.mark.slow
def test_example() -> None:
    """The example finds no difference, under the launcher that its first lines name."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--local-addr", "127.0.0.1", "--nproc-per-node", str(WORLD),
            str(EXAMPLE), "--device", "cpu", "--steps", "2",
        ],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 1 of 2 on cpu: experts 16 to 31 of 32" in done.stdout
    assert "error against one rank with all experts" in done.stdout


@pytest.mark.parametrize(("num_experts", "world"), [(8, 2), (7, 2), (128, 3), (5, 5), (4, 1)])
def test_shards_cover_the_experts_once(num_experts: int, world: int) -> None:
    shards = [expert_shard(num_experts, rank, world, "cpu") for rank in range(world)]
    total = sum(shard.mask for shard in shards)
    assert isinstance(total, torch.Tensor) and torch.equal(total, torch.ones_like(total))
    counts = [shard.count for shard in shards]
    assert counts == [int(shard.mask.sum()) for shard in shards]
    assert max(counts) - min(counts) <= 1
    weight = torch.arange(num_experts)
    assert torch.equal(torch.cat([shard.of(weight) for shard in shards]), weight)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        expert_shard(8, 2, 2, "cpu")
    with pytest.raises(ValueError, match="at least one for each of 9 ranks, got 8"):
        expert_shard(8, 0, 9, "cpu")
    shard = expert_shard(8, 0, 2, "cpu")
    with pytest.raises(ValueError, match=r"weight: expected 8 experts .*\[4, 3\]"):
        shard.of(torch.empty(4, 3))
    inputs = make_layer(BASE, "cpu")
    with pytest.raises(ValueError, match="w1: expected 4 of 8 experts, as shard, got 8 of 8"):
        fused_moe_expert_parallel(inputs.hidden, inputs.w1, inputs.w2, inputs.logits, 3, shard)


def test_shards_are_values() -> None:
    """They compare, hash, print and copy by what they name, and are made under any default device."""
    shard, same = (expert_shard(8, 1, 2, "cpu") for _ in range(2))
    assert shard == same and hash(shard) == hash(same) and {shard, same} == {shard}
    assert repr(shard) == "ExpertShard(first=4, count=4, num_experts=8, device='cpu')"
    assert copy.deepcopy(shard) == shard == pickle.loads(pickle.dumps(shard))
    others = (
        expert_shard(8, 0, 2, "cpu"),
        expert_shard(9, 1, 2, "cpu"),
        expert_shard(8, 1, 2, "meta"),
    )
    assert all(shard != other for other in (*others, "a shard", None))
    with torch.device("meta"):
        made = expert_shard(8, 1, 2, "cpu")
    assert made == shard and made.mask.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
