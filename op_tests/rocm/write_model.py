"""Models all paths anew: the rows that dispatch goes by, the kept times, and the tables of docs/rocm.md.

    python op_tests/rocm/write_model.py [--arch gfx942,gfx1201]

Writes `modelled_times.json`, `aiter/routing/modelled.py` and what is between the marker lines of the
page. Kept times whose kernels and model are as they were are not modelled again. When all kernels have
changed, gfx1201 takes 313 s of one core of an AMD EPYC and gfx942 then 135 (2026-11-26); after a change
of the fused kernel alone about half of that; compiling comes on top.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "op_tests")]

from crossovers import (  # noqa: E402
    ARCHS,
    MODELLED_SHAPES,
    MOST_TOKENS,
    PATHS,
    SELECTS,
    Crossing,
    Table,
)
from model import DTYPES, HEADERS, Routed, table_rows  # noqa: E402

from aiter.cli.table import format_table  # noqa: E402
from aiter.jit.device_code import clang  # noqa: E402

PAGE = ROOT / "docs" / "rocm.md"
ROWS = ROOT / "aiter" / "routing" / "modelled.py"
MARKERS = ("<!-- tables: op_tests/rocm/write_model.py -->", "<!-- end of the model's tables -->")
COMMAND = "python op_tests/rocm/write_model.py"
SHOWN_ARCH = "gfx942"
SHOWN_SHAPES = ((128, 4), (256, 8), (512, 10), (896, 16))
SHOWN_TOKENS = (1, 4, 16, 64)
SHOWN_DTYPES = ("bf16", "f32")
PROFILED = (Routed(1, 128, 4), Routed(16, 128, 4), Routed(64, 128, 4))
ROWS_PER_LINE = 4

Found = dict[str, dict[tuple[int, int], dict[str, Crossing]]]

HEAD = '''"""Up to how many tokens is which path the fastest in the timing model of AMD's GPUs?

Written by `{command}`, which see: do not edit.
"""

from __future__ import annotations

from typing import Literal

DATE = "{date}"
COMMAND = "{command}"

# By architecture and dtype of the logits: E, K, the largest M of the fused launch and, of the chain,
# that of the oneshot sort; 0 for never.
# fmt: off
ROWS: dict[str, dict[Literal["f32", "f16", "bf16"], tuple[tuple[int, int, int, int], ...]]] = {{
'''


def crossings(table: Table, archs: list[str]) -> Found:
    """The crossovers of every architecture, shape and dtype; keeps the table after each shape."""
    found: Found = {}
    hints: dict[tuple[tuple[int, int], str], Crossing] = {}
    for arch in archs:
        stale = table.drop_stale(arch)
        print(f"{arch}: modelled anew: {', '.join(stale) or 'nothing'}", flush=True)
        for shape in MODELLED_SHAPES:
            start = time.process_time()
            cells = table.cells(arch, *shape)
            own: dict[str, Crossing] = {}
            for dtype in DTYPES:
                hint = hints.get((shape, dtype), next(reversed(own.values()), Crossing()))
                own[dtype] = hints[shape, dtype] = cells.crossing(dtype, hint)
            found.setdefault(arch, {})[shape] = own
            table.write()
            seconds = time.process_time() - start
            print(f"{arch} {shape}: {list(own.values())}, {seconds:.1f} s", flush=True)
    return found


def write_rows(found: Found, date: str) -> None:
    """Writes the module of rows."""
    text = HEAD.format(command=COMMAND, date=date)
    for arch in ARCHS:
        text += f'    "{arch}": {{\n'
        for dtype in DTYPES:
            rows = [
                str((*shape, own[dtype].fused_tokens, own[dtype].oneshot_tokens))
                for shape, own in found[arch].items()
            ]
            lines = (rows[i : i + ROWS_PER_LINE] for i in range(0, len(rows), ROWS_PER_LINE))
            body = "".join(f"            {', '.join(line)},\n" for line in lines)
            text += f'        "{dtype}": (\n{body}        ),\n'
        text += "    },\n"
    ROWS.write_text(text + "}\n# fmt: on\n", encoding="utf-8")


def times_table(table: Table) -> str:
    """Times of the paths for some shapes, gaps included."""
    rows = []
    for dtype in SHOWN_DTYPES:
        for shape in SHOWN_SHAPES:
            cells = table.cells(SHOWN_ARCH, *shape)
            for tokens in SHOWN_TOKENS:
                for path in PATHS:
                    cells.model(path, dtype, tokens)
                us = [cells.known(path, dtype, tokens).low for path in PATHS]
                selects = (cells.time(f"{name} {dtype}", tokens) for name in SELECTS.values())
                sorts = (cells.time(path, tokens) for path in SELECTS)
                times = (f"{time:.2f}" for time in (*selects, *sorts, *us))
                fastest = PATHS[us.index(min(us))]
                rows.append((dtype, f"{shape[0]}/{shape[1]}", tokens, *times, fastest))
    headers = ("dtype", "E/K", "M", "top-k", "that counts", "oneshot sort", "multi-phase sort",
               *(f"path {path}" for path in PATHS), "fastest")  # fmt: skip
    return format_table(headers, rows)


def crossover_table(found: Found) -> str:
    """By shape and architecture."""
    rows = []
    for shape in MODELLED_SHAPES:
        cells = (
            f"{' '.join(str(own[dtype].fused_tokens) for dtype in DTYPES)},"
            f" {own['bf16'].oneshot_tokens}"
            for own in (found[arch][shape] for arch in ARCHS)
        )
        rows.append((f"{shape[0]}/{shape[1]}", *cells))
    return format_table(("E/K", *ARCHS), rows)


def tables(table: Table, found: Found, date: str) -> str:
    """The generated part of the page."""
    profile = [
        row
        for routed in PROFILED
        for way in PATHS[:2]
        for row in table_rows(SHOWN_ARCH, routed, way)
    ]
    parts = (
        (f"Modelled times on {SHOWN_ARCH} in us; those of paths have 1.5 us for every further launch",
         times_table(table)),
        (f"Largest M of the fused launch for {', '.join(DTYPES)} logits and, of the chain, of the"
         f" oneshot sort ({MOST_TOKENS} is the largest that was asked for)", crossover_table(found)),
        ("What these times are made of", format_table(HEADERS, profile)),
    )  # fmt: skip
    head = f"As of {date}, with the clang of ziglang {clang()[1]}."
    return "\n\n".join([head, *(f"**{title}**\n\n```\n{text}\n```" for title, text in parts)])


def write_page(text: str) -> None:
    """Puts the tables between the markers."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end:
        raise ValueError(f"{PAGE}: expected the lines {MARKERS}, got a page without them")
    PAGE.write_text(f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{after}", encoding="utf-8")


def main() -> int:
    """Models what is stale, and writes what all of it says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--arch", help="keeps their times alone, and writes no rows and no page")
    options = parser.parse_args()
    table = Table.read()
    if options.arch:
        crossings(table, options.arch.split(","))
        return 0
    found = crossings(table, list(ARCHS))
    date = datetime.date.today().isoformat()
    write_rows(found, date)
    write_page(tables(table, found, date))
    table.write()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
