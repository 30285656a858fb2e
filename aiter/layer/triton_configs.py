"""Which tiles do the Triton kernels of a layer take, and why?

A pure function of the shapes and of the architecture, so that it can be printed and tested without a
GPU. What decides is how many entries an expert has on average, M * K / E: a tile has no more rows than
that is worth, and the sort is asked for blocks of as many slots. So a server needs as many variants as
there are rows here, not one for each M.

`Row.entries` is the largest average that a row is for; the rows of an architecture ascend. The two
layouts of the weights, dense along the inner dimension ("inner") and dense along the columns ("columns", as
gpt-oss' are stored), have rows of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Layout = Literal["inner", "columns"]


@dataclass(frozen=True)
class Tile:
    """The tile of a product: rows, columns (pairs of gate and up in the first one), inner step.

    Attributes:
        group: row tiles that go through all columns together.
        desc: weights by tensor descriptors, where the device and the strides allow it.
        prefetch: lines of 128 bytes per column that the second product asks for before it waits.
        persistent: programs per multiprocessor that share the tiles; 0 for a program per tile.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    group: int = 1
    desc: bool = False
    prefetch: int = 0
    persistent: int = 0


@dataclass(frozen=True)
class Row:
    """The tiles of both products for up to `entries` entries per expert on average."""

    entries: float
    first: Tile
    second: Tile

    @property
    def block(self) -> int:
        """Slots per block that the sort is asked for."""
        return max(self.first.rows, self.second.rows)


@dataclass(frozen=True)
class Family:
    """What an architecture takes. `one_*`: the products of a single token, `split` slots apart."""

    one_first: Tile
    one_second: Tile
    split: bool
    rows: tuple[Row, ...]


def _tile(rows: int, columns: int, inner: int, warps: int, stages: int, **more: int) -> Tile:
    return Tile(rows, columns, inner, warps, stages, **more)  # type: ignore[arg-type]


FAMILIES: dict[str, dict[Layout, Family]] = {
    "sm_9": {
        "inner": Family(
            Tile(1, 16, 128, 4, 3),
            Tile(1, 16, 128, 4, 3),
            True,
            (
                Row(8, Tile(16, 32, 128, 4, 4), Tile(16, 32, 256, 4, 5)),
                Row(48, Tile(64, 64, 64, 4, 4, 8), Tile(64, 128, 64, 4, 4, 8)),
                Row(1e9, Tile(128, 128, 64, 8, 4, 8, True), Tile(128, 256, 64, 8, 4, 8, True)),
            ),
        ),
        "columns": Family(
            Tile(1, 32, 64, 4, 3),
            Tile(1, 32, 64, 4, 3),
            True,
            (
                Row(8, Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 5)),
                Row(48, Tile(64, 64, 64, 4, 4, 8), Tile(64, 128, 64, 4, 4, 8)),
                Row(1e9, Tile(128, 128, 64, 8, 4, 8, True), Tile(128, 256, 64, 8, 4, 8, True)),
            ),
        ),
    },
}


def family_of(arch: str, layout: Layout) -> Family:
    """The tiles of an architecture, by the longest prefix of its name; sm_9's for one that has none."""
    known = max((name for name in FAMILIES if arch.startswith(name)), key=len, default="sm_9")
    return FAMILIES[known][layout]


def row_for(family: Family, entries: float, block: int | None, itemsize: int) -> Row:
    """The row for `entries` entries per expert, cut to blocks of `block` slots if they are given.

    float32 has no matrix unit that keeps its precision, and twice the bytes: its tiles are small.
    """
    row = next((row for row in family.rows if entries <= row.entries), family.rows[-1])
    if itemsize == 4:
        row = family.rows[0]
        small = Tile(row.block, 32, 32, 4, 2)
        row = Row(row.entries, small, small)
    if block is None:
        return row
    most = max(16, 1 << (block - 1).bit_length())
    return replace(
        row,
        first=replace(row.first, rows=min(row.first.rows, most)),
        second=replace(row.second, rows=min(row.second.rows, most)),
    )
