"""Which tiles do the Triton kernels of a layer take, and why?

A pure function of the shapes and of the architecture, so that it can be printed and tested without a
GPU. What decides is how many entries an expert has on average, M * K / E: a tile has no more rows than
that is worth, and the sort is asked for blocks of as many slots. So a server needs as many variants as
there are rows here, not one for each M.

`Row.entries` is the largest average that a row is for; the rows of an architecture ascend. The two
layouts of the weights, dense along the inner dimension ("inner") and dense along the columns
("columns", as gpt-oss' are stored), have rows of their own.

What 3,200 measurements of single products on an H100 say (2026-11-26; us of a product):
- Decode: for gpt-oss' first product 64 pairs of columns, 256 bytes of a row, by 64, with 8 warps and 5
  stages (M=8: 224; 32 pairs by 128: 234); for Qwen3's, dense along the inner dimension, 32 pairs by 128
  (M=8: 107). Descriptors gain nothing there (Qwen3: 109).
- Programs that share the tiles (persistent, the loop over tiles flattened with the inner one) gain 0.2 %
  at best (Qwen3's first product at M=16: 169.7 against 170.1) and lose in prefill (gpt-oss' at M=2048:
  863 against 702). No table takes them. What gains there are loads in warps of their own, below.
- 32 entries per expert: blocks of 64 slots beat 32 and 16 for gpt-oss (a layer of 256 tokens: 551, 605
  and 728), although half of the tile is padding: the weights are read once.
- Prefill: 128 x 256 x 64 with 8 warps. Tiles of 128 x 128 are a third slower (gpt-oss at M=8192: 2,514
  against 1,854), 256 x 128 half as slow again (2,745). Without descriptors the first product's
  128 x 256 does not fit in the registers and is 13 times slower: where strides do not allow them, its
  tiles are half as wide (`triton_plan`). In the second product they gain nothing.
- Fetching the second product's first weights into the L2 while it waits gains 1 us of 32 for a single
  token of Qwen3, and nothing elsewhere.

And for prefill (2026-11-27, same GPU; us of a product; the clock moves figures at M=8192 by 4 %):
- Half a tile where its second half is padding, by a branch: gpt-oss' first product 520 -> 447 (M=1024)
  and 666 -> 599 (2048), Qwen3's 312 -> 302 and 358 -> 330; the second one 224 -> 217 and 318 -> 288,
  165 -> 160 and 185 -> 182; 2 % at M=8192. It takes two registers at most, and the bits stay. Tiles of
  64 rows are slower from 128 entries on (gpt-oss' first: 511 at M=1024, 753 at 2048), and no faster for
  Qwen3's 64 entries.
- A narrow last column tile in the second product (2,880 columns are 11 tiles and a quarter): 288 -> 285
  (M=2048), 858 -> 844 (8192), nothing at 1,024 (219).
- Three stages instead of four: 680 against 612 (gpt-oss' first, M=2048); Qwen3's 299 against 303 at
  M=1024, but 347 against 334 at 2048. Groups of 4 to 32 row tiles differ by 3 %; in the second product 2
  is the best until M=2048 (8: 3 to 7 % slower for gpt-oss).
- Loading warps (`triton_hopper`): gpt-oss' first product 573 against 595 with halves (M=2048) and 1,943
  against 2,008 (8192), Qwen3's 724 against 827 (8192), but 351 against 334 at M=2048; at 1,024 neither
  gains. The second product: Qwen3's 390 against 421 (8192), but 200 against 185 (2048); gpt-oss' gains
  nothing (926 against 923).
- At M=8192 the sum reads and writes at 3.0 TB/s (gpt-oss: 236 MB in 77 us); only fewer bytes would help.
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
        specialised: warps of their own load (`triton_hopper`), where the device and the layer allow it.
        halves: a row tile whose second half is padding is multiplied as half a tile.
        tails: a last column tile of the second product that needs at most half of the columns is
            multiplied as a narrower one.
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
    specialised: bool = False
    halves: bool = False
    tails: bool = False


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
    """What an architecture takes for weights of one layout.

    Attributes:
        one_first, one_second: the two products of a single token; `rows` counts nothing there.
        split: whether programs of the second one share columns, each with slots of its own.
        rows: by ascending `entries`.
        source: what measured them, or that nothing did.
    """

    one_first: Tile
    one_second: Tile
    split: bool
    rows: tuple[Row, ...]
    source: str


_H100 = (
    "NVIDIA H100 80GB HBM3, 2026-11-26, each product of a gpt-oss (columns) or a Qwen3 (inner) layer"
    " alone, in a graph"
)
NOT_MEASURED = "not measured: by the sizes of registers and LDS, and by what the machine code shows"

_SM_90: dict[Layout, Family] = {
    "inner": Family(
        Tile(1, 4, 512, 4, 3),
        Tile(1, 32, 128, 2, 3, prefetch=2),
        True,
        (
            Row(10, Tile(16, 32, 128, 4, 5), Tile(16, 32, 256, 2, 4)),
            Row(24, Tile(32, 64, 128, 4, 4), Tile(32, 128, 128, 4, 3)),
            Row(
                48,
                Tile(64, 128, 64, 4, 4, desc=True),
                Tile(64, 128, 64, 4, 4, desc=True),
            ),
            Row(
                180,
                Tile(128, 128, 64, 8, 4, group=4, desc=True, halves=True),
                Tile(128, 256, 64, 8, 4, group=2, halves=True),
            ),
            Row(
                1e9,
                Tile(128, 128, 64, 8, 4, group=8, desc=True, specialised=True, halves=True),
                Tile(128, 256, 64, 8, 3, group=4, specialised=True, halves=True),
            ),
        ),
        _H100,
    ),
    "columns": Family(
        Tile(1, 32, 64, 1, 3),
        Tile(1, 32, 64, 1, 4),
        True,
        (
            Row(0.75, Tile(16, 64, 64, 8, 5), Tile(16, 256, 32, 4, 4)),
            Row(10, Tile(16, 64, 64, 8, 5), Tile(16, 64, 128, 4, 5)),
            Row(
                80,
                Tile(64, 128, 64, 4, 4, desc=True),
                Tile(64, 256, 64, 4, 3, group=4),
            ),
            Row(
                180,
                Tile(128, 128, 64, 8, 4, group=8, desc=True, halves=True),
                Tile(128, 256, 64, 8, 4, group=2, halves=True),
            ),
            Row(
                400,
                Tile(128, 128, 64, 8, 4, group=8, desc=True, specialised=True, halves=True),
                Tile(128, 256, 64, 8, 4, group=2, halves=True, tails=True),
            ),
            Row(
                1e9,
                Tile(128, 128, 64, 8, 4, group=8, desc=True, specialised=True, halves=True),
                Tile(128, 256, 64, 8, 3, group=4, halves=True, tails=True),
            ),
        ),
        _H100,
    ),
}


_SM_100: dict[Layout, Family] = {
    layout: replace(family, source=NOT_MEASURED) for layout, family in _SM_90.items()
}


def _small(one_warps: int, stages: int, split: bool) -> dict[Layout, Family]:
    """Tiles for less than 64 KiB of LDS; a wave of 64 lanes has half as many waves per program.

    Deeper or wider second tiles of decode than 32 columns by 64, dense along the inner dimension, spill
    140 to 345 registers on gfx1201 with Triton 3.6, though not with 3.9.
    """
    prefill = Row(
        1e9,
        Tile(128, 64, 32, 4, stages, group=8),
        Tile(128, 128, 32, 4, stages, group=8),
    )
    middle = Row(64, Tile(32, 32, 64, 4, stages, group=4), Tile(32, 64, 64, 4, stages, group=4))
    return {
        "inner": Family(
            Tile(1, 8, 256, one_warps, stages),
            Tile(1, 8, 256, one_warps, stages),
            split,
            (Row(10, Tile(16, 16, 128, 4, stages), Tile(16, 32, 64, 4, stages)), middle, prefill),
            NOT_MEASURED,
        ),
        "columns": Family(
            Tile(1, 32, 64, one_warps, stages),
            Tile(1, 32, 64, one_warps, stages),
            split,
            (Row(10, Tile(16, 32, 64, 4, stages), Tile(16, 64, 64, 4, stages)), middle, prefill),
            NOT_MEASURED,
        ),
    }


# By the beginning of the architecture's name. In the second product of one token, sharing columns
# takes an order between the stores of several waves and one wave's atomic that nobody has checked on
# an AMD GPU; there a program has its columns to itself.
FAMILIES: dict[str, dict[Layout, Family]] = {
    "sm_8": _small(2, 3, True),
    "sm_9": _SM_90,
    "sm_10": _SM_100,
    "sm_12": _small(2, 3, True),
    "gfx": _small(4, 2, False),
    "interpreter": _small(1, 2, True),
}


def family_of(arch: str, layout: Layout) -> Family:
    """The tiles of an architecture, by the longest prefix of its name, else the small ones."""
    known = max((name for name in FAMILIES if arch.startswith(name)), key=len, default="sm_8")
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
