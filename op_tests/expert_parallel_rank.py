"""One rank of `layer/test_parallel.py`: python expert_parallel_rank.py RANK WORLD STORE DEVICE

Every rank holds its slice of a layer's experts; all of them know the whole layer, too, and compare.
STORE is a file that the ranks meet at. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta

import _checkout  # noqa: F401
import torch
import torch.distributed as dist
from moe_layers import BASE, GPT_OSS, LayerCase, LayerInputs, check_close, make_layer, options_of
from torch import Tensor

from aiter.fused_moe import fused_moe_from_logits
from aiter.parallel import ExpertShard, expert_shard, fused_moe_expert_parallel

PATIENCE = timedelta(seconds=300)  # a first call builds the module

CASES = {
    "silu": replace(BASE, num_tokens=16),
    "gpt-oss": GPT_OSS,
    "experts that do not divide": replace(BASE, num_experts=7, bias=True),
    "some local tokens": replace(BASE, num_local=4, bias=True),
    "no token": replace(BASE, num_tokens=0),
    "one token, so that ranks may get none": replace(BASE, num_tokens=1, topk=1),
}


def sharded(inputs: LayerInputs, shard: ExpertShard, case: LayerCase) -> Tensor:
    """The layer from this rank's slice of the weights."""
    options = options_of(case, inputs)
    del options["expert_mask"]
    for name in ("bias1", "bias2"):
        if options[name] is not None:
            options[name] = shard.of(options[name])
    return fused_moe_expert_parallel(
        inputs.hidden,
        shard.of(inputs.w1),
        shard.of(inputs.w2),
        inputs.logits,
        case.topk,
        shard,
        **options,
    )


def whole_layer(inputs: LayerInputs, case: LayerCase) -> Tensor:
    return fused_moe_from_logits(
        inputs.hidden, inputs.w1, inputs.w2, inputs.logits, case.topk, **options_of(case, inputs)
    )


def check_case(name: str, case: LayerCase, rank: int, world: int, device: str) -> None:
    """Every rank's output is the whole layer's, and the same bits as rank 0's."""
    inputs = make_layer(case, device)
    output = sharded(inputs, expert_shard(case.num_experts, rank, world, device), case)
    expected = whole_layer(inputs, case)
    try:
        check_close(output, expected.cpu().double())
    except AssertionError as error:
        raise AssertionError(f"{name}, rank {rank}: {error}") from None
    of_rank_0 = output.clone()
    if of_rank_0.numel():
        dist.broadcast(of_rank_0, src=0)
    if not torch.equal(of_rank_0, output):
        raise AssertionError(f"{name}: rank {rank} has other bits than rank 0")


def check_comparison_can_fail(world: int, device: str) -> None:
    """Ranks that all take the first shard miss experts, and count others twice."""
    inputs = make_layer(BASE, device)
    output = sharded(inputs, expert_shard(BASE.num_experts, 0, world, device), BASE)
    if torch.allclose(output, whole_layer(inputs, BASE), rtol=1e-2, atol=1e-2):
        raise AssertionError("the wrong shard: expected another output, got the layer's")


def check_graph(rank: int, world: int, device: str) -> None:
    """Routing, experts and all-reduce in one CUDA graph, replayed with new logits."""
    case = replace(BASE, num_tokens=16, dtype=torch.bfloat16)
    inputs = make_layer(case, device)
    shard = expert_shard(case.num_experts, rank, world, device)
    sharded(inputs, shard, case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = sharded(inputs, shard, case)
    for shift in range(3):
        inputs.logits.copy_(inputs.logits.roll(shift, 1))
        graph.replay()
        replayed = output.clone()
        torch.testing.assert_close(replayed, sharded(inputs, shard, case), rtol=0, atol=0)


def main() -> int:
    rank, world, store, device = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    backend = "gloo"
    if device == "cuda":
        backend, device = "nccl", f"cuda:{rank}"
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=PATIENCE
    )
    for name, case in CASES.items():
        check_case(name, case, rank, world, device)
    check_comparison_can_fail(world, device)
    if device != "cpu":
        check_graph(rank, world, device)
    dist.destroy_process_group()
    print(f"rank {rank}: {len(CASES)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
