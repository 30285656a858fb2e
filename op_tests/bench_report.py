"""How do the benches run and report? Options, inputs, the table, CSV and the plot.

A bench measures one shape at one number of tokens and returns a record: contestant -> Timing, None
where it does not take part. The first contestant is the one that the others are held against.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from bench_timing import Timing
from torch import Tensor

from aiter.cli.table import format_table
from aiter.jit import cpu_wave
from aiter.ops.device import current_device

Record = dict[str, Timing | None]
Shape = tuple[int, ...]
Measure = Callable[[argparse.Namespace, Shape, int], Record]

GPU_TOKENS = "1,4,8,16,32,64,122,256,512,1024,4096,16384,65536"
CPU_TOKENS = "1,8,64,256"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NUM_INPUTS = 4  # rotated, so that no call finds its own input in L1
SEED = 0


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every bench has."""
    options = argparse.ArgumentParser(description=(description or "").split("\n", maxsplit=1)[0])
    options.add_argument(
        "--device", type=current_device, default=None, help="cpu or cuda[:N]; default: the GPU"
    )
    options.add_argument("--wave", type=int, choices=(64, 32), default=64, help="cpu wave width")
    options.add_argument("--shape", action="append", metavar="E,K,D", help="may be repeated")
    options.add_argument("--tokens", help="numbers of tokens, comma-separated")
    options.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the logits")
    options.add_argument("--csv", type=Path, help="write the figures there")
    options.add_argument("--plot", type=Path, help="draw the figures there (needs matplotlib)")
    return options


def logits(options: argparse.Namespace, tokens: int, num_experts: int) -> list[Tensor]:
    """Random router logits, the same for every bench and device."""
    generator = torch.Generator().manual_seed(SEED)
    return [
        torch.randn(tokens, num_experts, generator=generator)
        .to(DTYPES[options.dtype])
        .to(options.device)
        for _ in range(NUM_INPUTS)
    ]


def run(
    options: argparse.Namespace,
    what: str,
    names: Sequence[str],
    shapes: Sequence[str],
    measure: Measure,
) -> None:
    """Measures every shape and number of tokens, then prints and writes what the options ask for.

    Args:
        what: is measured, for the title.
        names: of the numbers in a shape.
        shapes: measured unless the options name others.
    """
    options.device = options.device or current_device()
    on_cpu = options.device.type == "cpu"
    if not on_cpu:
        torch.cuda.init()
    counts = [int(m) for m in (options.tokens or (CPU_TOKENS if on_cpu else GPU_TOKENS)).split(",")]
    title = f"{what}, {options.dtype} logits, us per call, {_where(options)}, seed {SEED}"
    print(title)
    records: list[tuple[Shape, int, Record]] = []
    with cpu_wave(options.wave) if on_cpu else nullcontext():
        for text in options.shape or shapes:
            shape = tuple(int(part) for part in text.split(","))
            for tokens in counts:
                records.append((shape, tokens, measure(options, shape, tokens)))
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(_table(names, records))
    if options.csv:
        _write_csv(options.csv, names, records)
    if options.plot:
        _plot(options.plot, names, records, title)


def _where(options: argparse.Namespace) -> str:
    if options.device.type == "cpu":
        return f"cpu target, wave {options.wave}, {torch.get_num_threads()} threads (not a GPU)"
    return str(torch.cuda.get_device_name(options.device))


def _table(names: Sequence[str], records: list[tuple[Shape, int, Record]]) -> str:
    """The medians, the widest spread of a row, and the first contestant against the best other."""
    contestants = list(records[0][2])
    rows = []
    for shape, tokens, record in records:
        times = [record[name].us if record[name] else None for name in contestants]
        others = [time for time in times[1:] if time]
        ratio = f"{times[0] / min(others):.2f} x" if times[0] and others else "-"
        spread = max(timing.spread for timing in record.values() if timing)
        cells = ["-" if time is None else f"{time:.2f}" for time in times]
        rows.append([*shape, tokens, *cells, f"{spread:.0%}", ratio])
    return format_table(
        [*names, "M", *contestants, "spread", f"{contestants[0]} / best other"], rows
    )


def _write_csv(path: Path, names: Sequence[str], records: list[tuple[Shape, int, Record]]) -> None:
    contestants = list(records[0][2])
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [*names, "M", *(f"{c} {part}" for c in contestants for part in ("us", "spread"))]
        )
        for shape, tokens, record in records:
            cells = [(t.us, t.spread) if t else ("", "") for t in record.values()]
            writer.writerow([*shape, tokens, *(value for cell in cells for value in cell)])


def _plot(
    path: Path, names: Sequence[str], records: list[tuple[Shape, int, Record]], title: str
) -> None:
    """One panel per shape: log M against microseconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(shape for shape, _, _ in records))
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(4.2 * len(shapes), 4), squeeze=False, sharey=True
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        for name in records[0][2]:
            points = [(m, r[name].us) for s, m, r in records if s == shape and r[name]]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        panel = " ".join(f"{name}={size}" for name, size in zip(names, shape, strict=True))
        axis.set(xscale="log", yscale="log", xlabel="tokens M", title=panel)
        axis.grid(True, which="both", alpha=0.3)
    axes[0][0].set_ylabel("microseconds per call")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
