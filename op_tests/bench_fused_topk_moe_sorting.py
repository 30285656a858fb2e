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
import csv
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import _checkout  # noqa: F401  (makes a checkout importable)
import bench_timing
import torch
from torch import Tensor

import aiter
from aiter import fused_moe, reference
from aiter.cli.table import format_table
from aiter.jit import cpu_wave
from aiter.ops.device import current_device

SHAPES = ("32,4,2880", "128,4,2880", "256,8,7168", "512,10,4096", "896,16,3584")
GPU_TOKENS = "1,4,8,16,32,64,122,256,512,1024,4096,16384,65536"
CPU_TOKENS = "1,8,64,256"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCK_SIZE = 32
NUM_INPUTS = 4  # rotated, so that no call finds its own logits in L1
SEED = 0

Routing = Callable[[Tensor], tuple[Tensor, ...]]


def pytorch_routing(logits: Tensor, topk: int, num_experts: int, model_dim: int) -> tuple[Tensor, ...]:
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


def contestants(
    topk: int, num_experts: int, model_dim: int, compiled: bool
) -> dict[str, Routing]:
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


def time_calls(run: Routing, inputs: list[Tensor]) -> bench_timing.Timing:
    """The figure of the table for one contestant and shape."""
    calls = [lambda logits=logits: run(logits) for logits in inputs]
    if inputs[0].device.type == "cpu":
        return bench_timing.cpu_us(calls[0])
    return bench_timing.graph_slope_us(calls)


def measure(options: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """One record per shape and number of tokens, in microseconds."""
    records: list[dict[str, object]] = []
    for shape in options.shape or SHAPES:
        num_experts, topk, model_dim = (int(part) for part in shape.split(","))
        runs = contestants(topk, num_experts, model_dim, options.compile)
        for tokens in options.tokens:
            generator = torch.Generator().manual_seed(SEED)
            inputs = [
                torch.randn(tokens, num_experts, generator=generator)
                .to(DTYPES[options.dtype])
                .to(device)
                for _ in range(NUM_INPUTS)
            ]
            expected = reference.topk_softmax_sorting(
                inputs[0], topk, num_experts, model_dim, torch.bfloat16
            )
            record: dict[str, object] = {"E": num_experts, "K": topk, "D": model_dim, "M": tokens}
            for name, run in runs.items():
                try:
                    outputs = run(inputs[0])
                except NotTaken:
                    record[name] = None
                    continue
                # NOTE: equal logits may come in any order out of torch.topk; only ours promise one.
                if name not in ("PyTorch", "compiled"):
                    check(name, outputs, expected)
                timing = time_calls(run, inputs)
                record[name] = timing.us
                record[f"{name} spread"] = timing.spread
            records.append(record)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return records


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


def print_table(records: list[dict[str, object]], names: list[str]) -> None:
    """The figures and, for the fused launch, the ratio to the best of the others."""
    rows = []
    for record in records:
        times = {name: record[name] for name in names}
        others = [t for name, t in times.items() if name not in ("fused", "policy 0") and t]
        fused = times["fused"]
        ratio = f"{fused / min(others):.2f} x" if fused else "-"
        cells = [f"{t:.2f}" if t else "-" for t in times.values()]
        rows.append([record["E"], record["K"], record["D"], record["M"], *cells, ratio])
    print(format_table(["E", "K", "D", "M", *names, "fused / best other"], rows))


def plot(records: list[dict[str, object]], names: list[str], path: Path, title: str) -> None:
    """One panel per shape: log M against microseconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((r["E"], r["K"], r["D"]) for r in records))
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(4.2 * len(shapes), 4), squeeze=False, sharey=True
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        of_shape = [r for r in records if (r["E"], r["K"], r["D"]) == shape]
        for name in names:
            points = [(r["M"], r[name]) for r in of_shape if r[name]]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens M", title="E={} K={} D={}".format(*shape))
        axis.grid(True, which="both", alpha=0.3)
    axes[0][0].set_ylabel("microseconds per call")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", help="cpu or cuda[:index]; the GPU if there is one, else cpu")
    parser.add_argument("--wave", type=int, choices=(64, 32), default=64, help="cpu wave width")
    parser.add_argument("--shape", action="append", metavar="E,K,D", help="may be repeated")
    parser.add_argument("--tokens", help="numbers of tokens, comma-separated")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the logits")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    parser.add_argument("--csv", type=Path, help="write the figures there")
    parser.add_argument("--plot", type=Path, help="draw the figures there (needs matplotlib)")
    options = parser.parse_args()
    device = current_device(options.device)
    on_cpu = device.type == "cpu"
    options.tokens = [
        int(m) for m in (options.tokens or (CPU_TOKENS if on_cpu else GPU_TOKENS)).split(",")
    ]
    where = (
        f"cpu target, wave {options.wave}, {torch.get_num_threads()} threads (not a GPU)"
        if on_cpu
        else torch.cuda.get_device_name(device)
    )
    title = f"routing, {options.dtype} logits, us per call, {where}, seed {SEED}"
    print(title)
    with cpu_wave(options.wave) if on_cpu else nullcontext():
        records = measure(options, device)
        names = list(contestants(1, 1, 1, options.compile))
        print_table(records, names)
        if not on_cpu:
            print(host_times(device))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, sorted({key for r in records for key in r}))
            writer.writeheader()
            writer.writerows(records)
    if options.plot:
        plot(records, names, options.plot, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
