r"""A MoE layer whose experts are shared by several GPUs, or by several processes on the CPU.

    python -m torch.distributed.run --standalone --local-addr 127.0.0.1 \
        --nproc-per-node 2 examples/expert_parallel.py

Every rank makes the weights of its own experts only, decodes the same tokens, routes them with the
mask of its experts, and combines the partial outputs with one all-reduce. Rank 0 compares the first
step with a layer that holds all experts. One GPU per rank (NCCL) where there are enough, else the
CPU (gloo).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, too

from aiter.fused_moe import fused_moe_from_logits, last_path  # noqa: E402
from aiter.parallel import ExpertShard, expert_shard, fused_moe_expert_parallel  # noqa: E402

TOLERANCE = 2e-2  # relative to the largest value; bfloat16 rounds the output once on either side


def make_experts(
    first: int, count: int, model_dim: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """w1 [count, 2*width, D] and w2 [count, D, width] of the experts from `first` on, bfloat16."""
    w1, w2 = [], []
    for expert in range(first, first + count):
        generator = torch.Generator().manual_seed(expert)  # the same on whichever rank it lives
        w1.append(torch.randn(2 * width, model_dim, generator=generator) * model_dim**-0.5)
        w2.append(torch.randn(model_dim, width, generator=generator) * width**-0.5)
    return tuple(torch.stack(w).to(device, torch.bfloat16) for w in (w1, w2))  # type: ignore[return-value]


def decode(options: argparse.Namespace, shard: ExpertShard, device: torch.device) -> float:
    """Decodes `options.steps` steps; returns the first step's error, as rank 0 measures it."""
    generator = torch.Generator().manual_seed(options.seed)
    router = torch.randn(options.experts, options.model_dim, generator=generator)
    hidden = torch.randn(options.tokens, options.model_dim, generator=generator)
    router, hidden = (t.to(device, torch.bfloat16) for t in (router, hidden))
    w1, w2 = make_experts(shard.first, shard.count, options.model_dim, options.width, device)
    error = 0.0
    for step in range(options.steps):
        normed = torch.nn.functional.rms_norm(hidden, (options.model_dim,))
        logits = normed @ router.T * options.model_dim**-0.5
        output = fused_moe_expert_parallel(normed, w1, w2, logits, options.topk, shard)
        if step == 0 and dist.get_rank() == 0:
            every = make_experts(0, options.experts, options.model_dim, options.width, device)
            whole = fused_moe_from_logits(normed, *every, logits, options.topk)
            error = float((output - whole).abs().max() / whole.abs().max())
        hidden = hidden + output
    return error


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: see above")
    parser.add_argument("--tokens", type=int, default=8, help="sequences decoded at once (M)")
    parser.add_argument("--steps", type=int, default=4, help="tokens generated per sequence")
    parser.add_argument("--experts", type=int, default=32, help="experts of the layer (E)")
    parser.add_argument("--topk", type=int, default=4, help="experts per token (K)")
    parser.add_argument("--model-dim", type=int, default=512, help="hidden size (D)")
    parser.add_argument("--width", type=int, default=256, help="width of an expert")
    parser.add_argument("--seed", type=int, default=0, help="of router and tokens")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("run it under torchrun: python -m torch.distributed.run --help")
    local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpus = options.device != "cpu" and torch.cuda.device_count() >= local_world
    if options.device == "cuda" and not on_gpus:
        parser.error(f"--device cuda: expected {local_world} GPUs, got {torch.cuda.device_count()}")
    device = torch.device("cuda", local_rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        shard = expert_shard(options.experts, rank, world_size, device)
        error = decode(options, shard, device)
        print(
            f"rank {rank} of {world_size} on {device}: experts {shard.first} to"
            f" {shard.first + shard.count - 1} of {shard.num_experts}, routed by the path"
            f" {last_path()}",
            flush=True,
        )
        dist.barrier()
        if rank == 0:
            print(f"error against one rank with all experts: {error:.1e} (at most {TOLERANCE})")
        return 0 if error <= TOLERANCE else 1
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
