"""How fast is routing: the fused launch, the chain under each policy, and PyTorch?

    python op_tests/bench_fused_topk_moe_sorting.py [--device cpu|cuda] [--shape E,K,D ...]
        [--tokens 1,4,8,...] [--dtype bf16] [--wave 64] [--csv FILE] [--plot FILE] [--compile]

Every contestant does the same work: bf16 logits to weights, ids, the sorted buffers and a zeroed
bf16 [M, D] buffer, block size 32. Results are compared with `aiter.reference` before anything is
timed. On a GPU the figure is the slope of graph replay (see bench_timing), inputs rotating; on the
CPU it is wall time, and says how fast the execution layer is, not how fast the kernel is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import _checkout  # noqa: F401  (makes a checkout importable)
import bench_report
import bench_timing
import torch
from bench_report import Record
from torch import Tensor

import aiter
from aiter import fused_moe, reference
from aiter.cli.table import format_table

SHAPES = ("32,4,2880", "128,4,2880", "256,8,7168", "512,10,4096", "896,16,3584")
BLOCK_SIZE = 32

Routing = Callable[[Tensor], tuple[Tensor, ...]]


def pytorch_routing(
    logits: Tensor, topk: int, num_experts: int, model_dim: int
) -> tuple[Tensor, ...]:
    """The same work in PyTorch operations, without a host synchronisation."""
    num_tokens = logits.shape[0]
    device = logits.device
    values, ids = torch.topk(logits.float(), topk, dim=-1)
    weights = torch.softmax(values, dim=-1)
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    experts = flat[order]
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    blocks = (counts + BLOCK_SIZE - 1) // BLOCK_SIZE
    first_block = torch.cumsum(blocks, 0) - blocks
    first_entry = torch.cumsum(counts, 0) - counts
    rank = torch.arange(flat.numel(), device=device) - first_entry[experts]
    slot = first_block[experts] * BLOCK_SIZE + rank
    slots = num_tokens * topk + num_experts * BLOCK_SIZE - topk
    sorted_ids = torch.full((slots,), topk << 24 | num_tokens, dtype=torch.int32, device=device)
    sorted_ids[slot] = ((order % topk) << 24 | order // topk).int()
    sorted_weights = torch.zeros(slots, dtype=torch.float32, device=device)
    sorted_weights[slot] = weights.flatten()[order]
    num_blocks = -(-slots // BLOCK_SIZE)
    block_idx = torch.arange(num_blocks, device=device)
    sorted_expert_ids = torch.searchsorted(torch.cumsum(blocks, 0), block_idx, right=True).int()
    num_valid_ids = torch.stack(
        (blocks.sum() * BLOCK_SIZE, torch.full((), num_tokens, device=device))
    ).int()
    moe_buf = torch.zeros((num_tokens, model_dim), dtype=torch.bfloat16, device=device)
    return sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf


def contestants(topk: int, num_experts: int, model_dim: int, compiled: bool) -> dict[str, Routing]:
    """Name to function of the logits; each allocates its outputs, as a caller in a model does."""

    def policy(number: int) -> Routing:
        return lambda logits: fused_moe.topk_softmax_sorting(
            logits, topk, num_experts, model_dim, torch.bfloat16, dispatch_policy=number
        )

    def fused(logits: Tensor) -> tuple[Tensor, ...]:
        outputs = policy(0)(logits)
        if fused_moe.last_path() != "fused":
            raise NotTaken(f"path {fused_moe.last_path()}")
        return outputs

    def eager(logits: Tensor) -> tuple[Tensor, ...]:
        return pytorch_routing(logits, topk, num_experts, model_dim)

    found: dict[str, Routing] = {
        "fused": fused,
        "policy 0": policy(0),
        "oneshot": policy(1),
        "multiphase": policy(2),
        "PyTorch": eager,
    }
    if compiled:
        found["compiled"] = torch.compile(eager, dynamic=False)
    return found


class NotTaken(Exception):
    """The contestant does not route this shape."""


def check(name: str, outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raises RuntimeError if a contestant's result differs from the reference."""
    slots = int(expected[3][0])
    sizes = (slots, None, slots // BLOCK_SIZE, 2)
    for index, size in enumerate(sizes):
        if size is not None and not torch.equal(outputs[index][:size], expected[index][:size]):
            raise RuntimeError(f"{name}: output {index} differs from the reference")
    torch.testing.assert_close(outputs[1][:slots], expected[1][:slots], rtol=2e-6, atol=1e-30)
    if bool(outputs[4].any()):
        raise RuntimeError(f"{name}: moe_buf is not zero")


def measure(options: argparse.Namespace, shape: tuple[int, ...], tokens: int) -> Record:
    """The figures of one shape and number of tokens, in microseconds."""
    num_experts, topk, model_dim = shape
    inputs = bench_report.logits(options, tokens, num_experts)
    expected = reference.topk_softmax_sorting(
        inputs[0], topk, num_experts, model_dim, torch.bfloat16
    )
    record: Record = {}
    for name, run in contestants(topk, num_experts, model_dim, options.compile).items():
        try:
            outputs = run(inputs[0])
        except NotTaken:
            record[name] = None
            continue
        # NOTE: equal logits may come in any order out of torch.topk; only ours promise one.
        if name not in ("PyTorch", "compiled"):
            check(name, outputs, expected)
        record[name] = bench_timing.call_us([lambda x=x, run=run: run(x) for x in inputs])
    return record


def host_times(device: torch.device) -> str:
    """Host time per call of a decode step's routing, on a GPU."""
    logits = torch.randn(32, 128, dtype=torch.bfloat16, device=device)

    def allocate() -> object:
        return fused_moe.topk_softmax_sorting(logits, 4, 128, 2880, torch.bfloat16)

    buffers = allocate()

    def provided() -> object:
        return aiter.fused_topk_moe_sorting_fwd(logits, *buffers, 128, 4, BLOCK_SIZE, True)

    rows = [
        ("topk_softmax_sorting, allocating", f"{bench_timing.host_us(allocate).us:.1f} us"),
        ("fused_topk_moe_sorting_fwd", f"{bench_timing.host_us(provided).us:.1f} us"),
        ("one call, cold L2", f"{bench_timing.event_us(provided, cold=True).us:.1f} us"),
        ("one call, warm L2", f"{bench_timing.event_us(provided, cold=False).us:.1f} us"),
    ]
    return format_table(("M=32 E=128 K=4", "time"), rows)


def main() -> int:
    parser = bench_report.parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    options = parser.parse_args()
    bench_report.run(options, "routing", ("E", "K", "D"), SHAPES, measure)
    if options.device.type == "cuda":
        print(host_times(options.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
