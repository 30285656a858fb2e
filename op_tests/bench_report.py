"""How do the benches run and report? Options, inputs, the tables, CSV and the plot.

A bench measures one shape at one number of tokens and returns a record: contestant -> Timing, None
where it does not take part. The first contestant is the one that the others are held against. CSV
rows are written as they are measured, so that a bench that is stopped leaves what it has; with
--from-csv a bench measures nothing, but prints and draws what such a file holds.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import bench_timing
import torch
from bench_timing import Timing
from torch import Tensor

from aiter.cli.table import format_table
from aiter.jit import cpu_wave
from aiter.ops.device import current_device

Record = dict[str, Timing | None]
Shape = tuple[int, ...]
Entry = tuple[Shape, int, Record]
Measure = Callable[[argparse.Namespace, Shape, int], Record]

GPU_TOKENS = "1,4,8,16,32,64,122,256,1024,4096,16384,65536"
CPU_TOKENS = "1,8,64,256"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NUM_INPUTS = 4  # rotated, so that no call finds its own input in L1
SEED = 0
CSV_FLOOR = "empty kernel"
CSV_PARTS = ("us", "spread", "strict_us", "cold_us", "host_us")


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
    options.add_argument("--from-csv", type=Path, help="measure nothing: show these figures")
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
    if options.from_csv:
        records, floor = read_csv(names, options.from_csv)
        title = f"{what}, {options.from_csv.name}"
        print(f"{title}\n{tables(names, records)}")
        if options.plot:
            plot(options.plot, names, records, title, floor)
        return
    options.device = options.device or current_device()
    on_cpu = options.device.type == "cpu"
    counts = [int(m) for m in (options.tokens or (CPU_TOKENS if on_cpu else GPU_TOKENS)).split(",")]
    records = []
    with ExitStack() as stack:
        if on_cpu:
            stack.enter_context(cpu_wave(options.wave))
        else:
            torch.cuda.init()
            stack.enter_context(torch.cuda.device(options.device))
        floor = None if on_cpu else bench_timing.floor_us().us
        title = f"{what}, {options.dtype} logits, us per call, {_where(options)}, seed {SEED}"
        print(title)
        if floor is not None:
            print(f"an empty kernel, by the same clock: {floor:.2f} us")
        writer = csv.writer(stack.enter_context(_opened(options.csv)), lineterminator="\n")
        for text in options.shape or shapes:
            shape = tuple(int(part) for part in text.split(","))
            for tokens in counts:
                entry = (shape, tokens, measure(options, shape, tokens))
                if not records:
                    writer.writerow(csv_header(names, entry[2]))
                writer.writerow(csv_row(entry, floor))
                records.append(entry)
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(tables(names, records))
    if options.plot:
        plot(options.plot, names, records, title, floor)


def _opened(path: Path | None) -> TextIO:
    """A file to write rows to, line by line; one that keeps nothing without a path."""
    return open(path or os.devnull, "w", newline="", buffering=1)


def _where(options: argparse.Namespace) -> str:
    if options.device.type == "cpu":
        return f"cpu target, wave {options.wave}, {torch.get_num_threads()} threads (not a GPU)"
    return str(torch.cuda.get_device_name(options.device))


def tables(names: Sequence[str], records: list[Entry]) -> str:
    """Tables of the medians by each clock that was used, the strict one first, each with its title."""
    parts = []
    for title, value in (
        ("strict clock: device time of a call, nothing overlaps", lambda timing: timing.strict_us),
        ("overlapping clock: calls may start while the one before runs", lambda timing: timing.us),
        ("device time with a cold L2", lambda timing: timing.cold_us),
        ("host time", lambda timing: timing.host_us),
    ):
        if any(value(timing) for _, _, record in records for timing in record.values() if timing):
            parts.append(f"{title}\n{table(names, records, value)}")
    if len(parts) == 1:
        return table(names, records, lambda timing: timing.us)
    return "\n\n".join(parts)


def table(
    names: Sequence[str], records: list[Entry], value: Callable[[Timing], float | None]
) -> str:
    """One row per shape and M: a value of each contestant, the widest spread of the row's medians,
    and the first contestant's value over the best other one's."""
    contestants = list(records[0][2])
    rows = []
    for shape, tokens, record in records:
        timings = [record[name] for name in contestants]
        times = [None if timing is None else value(timing) for timing in timings]
        others = [time for time in times[1:] if time]
        ratio = f"{times[0] / min(others):.2f} x" if times[0] and others else "-"
        spread = max(timing.spread for timing in timings if timing)
        cells = ["-" if time is None else f"{time:.2f}" for time in times]
        rows.append([*shape, tokens, *cells, f"{spread:.0%}", ratio])
    return format_table(
        [*names, "M", *contestants, "spread", f"{contestants[0]} / best other"], rows
    )


def csv_header(names: Sequence[str], record: Record) -> list[str]:
    """The columns of the CSV file."""
    parts = (f"{name} {part}" for name in record for part in CSV_PARTS)
    return [*names, "M", *parts, CSV_FLOOR]


def csv_row(entry: Entry, floor: float | None) -> list[object]:
    """The cells of one shape and number of tokens, in us; empty where nothing was measured."""
    shape, tokens, record = entry
    cells: list[object] = [*shape, tokens]
    for timing in record.values():
        values = [getattr(timing, part, None) for part in CSV_PARTS]
        cells += ["" if value is None else round(value, 4) for value in values]
    return [*cells, "" if floor is None else round(floor, 4)]


def read_csv(names: Sequence[str], path: Path) -> tuple[list[Entry], float | None]:
    """What `csv_row` wrote: the entries, and the floor."""
    records: list[Entry] = []
    floor = None
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            record: Record = {}
            for column in row:
                if not column.endswith(" us"):
                    continue
                name = column.removesuffix(" us")
                values = [row.get(f"{name} {part}") for part in CSV_PARTS]  # older files have less
                numbers = [float(value) if value else None for value in values]
                record[name] = None
                if numbers[0] is not None and numbers[1] is not None:
                    record[name] = Timing(numbers[0], numbers[1], *numbers[2:])
            records.append((tuple(int(row[name]) for name in names), int(row["M"]), record))
            floor = float(row[CSV_FLOOR]) if row[CSV_FLOOR] else None
    return records, floor


def plot(
    path: Path, names: Sequence[str], records: list[Entry], title: str, floor: float | None
) -> None:
    """One panel per shape: log M against microseconds, and the floor that no launch can beat."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(shape for shape, _, _ in records))
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(max(4.2 * len(shapes), 8), 4.4), squeeze=False, sharey=True
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        for name in records[0][2]:
            points = [(m, r[name].us) for s, m, r in records if s == shape and r[name]]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        if floor is not None:
            axis.axhline(floor, color="grey", linestyle="--", linewidth=1, label="empty kernel")
        panel = " ".join(f"{name}={size}" for name, size in zip(names, shape, strict=True))
        axis.set(xscale="log", yscale="log", xlabel="tokens M", title=panel)
        axis.grid(True, which="both", alpha=0.3)
    axes[0][0].set_ylabel("microseconds per call")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
