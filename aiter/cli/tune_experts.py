"""Which tiles are the fastest for a layer's products on this GPU? Measures, prints, keeps.

    python -m aiter tune --experts E,K,D,inter [--layout inner|columns] [--dtype bf16|fp16]
        [--tokens 8,64,256,1024,4096] [--plain] [--device cuda[:N]] [--dry-run]

For a layer of E experts with w1 [E, 2*inter, D] ([E, inter, D] with --plain) and w2 [E, D, inter], both
products of the Triton backend are measured alone at every M, with each candidate tile, over the
routing of random logits: the slope of graph replay. What is the fastest for blocks of 16, 32, 64 and
128 slots together is kept for M * K / E entries per expert and around, one file per device, and
counts from the next call on. The tiles of a single token stay those of the table. Each candidate is
compiled, which takes about a second; Triton keeps what it compiled.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import fused_moe
from ..layer import triton_experts, triton_plan, triton_tuned
from ..layer.parts import Experts
from ..layer.triton_configs import Family, Row, Tile
from ..layer.types import ActivationType
from ..ops.device import current_device
from ..routing import known as routing_known
from ..routing.tuned import device_name
from . import timing
from .options import MOST, MOST_TOKENS, PROGRAM, Parser, check_memory, existing_device, whole
from .table import format_table

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = ((32, 64), (32, 128), (64, 64), (64, 128), (128, 32), (128, 64), (256, 64))
BLOCKS = (16, 32, 64, 128)
REPLAYS = 5


def main(argv: Sequence[str]) -> int:
    """Measures what the options say; 0 if it was measured and kept, 1 if not."""
    parser = make_parser()
    options = parser.parse_args(argv)
    device = current_device(options.device)
    reason = triton_experts.why_not(device)
    if device.type != "cuda" or reason:
        why = f": {reason}" if reason else ""
        print(f"error: --experts: expected a GPU with Triton, got {device}{why}", file=sys.stderr)
        return 1
    num_experts, topk, model_dim, inter = options.experts
    width = inter if options.plain else 2 * inter
    activations = max(options.tokens) * (2 * model_dim + 4 * num_experts)
    check_memory(parser, 2 * num_experts * model_dim * (width + inter) + activations, device)
    experts = _experts(options, device, (num_experts, width, model_dim, inter))
    known = triton_plan.family_for(device, experts.w1.shape, experts.w1.stride())
    rows, cells = [], []
    with torch.cuda.device(device):
        for tokens in options.tokens:
            row, row_us = fastest(experts, tokens, topk, known)
            rows.append(row)
            tiles = [
                f"{t.rows}x{t.columns}x{t.inner} w{t.warps} s{t.stages} g{t.group}"
                f"{' desc' if t.desc else ''}{' specialised' if t.specialised else ''}"
                f"{' halves' if t.halves else ''}{' tails' if t.tails else ''}"
                for t in (row.first, row.second)
            ]
            cells.append([tokens, row.block, *tiles, f"{row_us:.1f}"])
            print(f"M={tokens}: {row_us:.1f} us", flush=True)
    print(format_table(("M", "block", "first product", "second product", "us, both"), cells))
    command = shlex.join([*PROGRAM.split(), "tune", *argv])
    source = f"{device_name(device)}, {time.strftime('%Y-%m-%d')}, {command}"
    family = Family(known.one_first, known.one_second, known.split, spread(rows), source)
    if options.dry_run:
        print("\nkept nothing, as --dry-run asks")
        return 0
    layer = (num_experts, width, model_dim, options.layout)
    try:
        path = triton_tuned.keep(device, layer, family)
    except OSError as error:
        print(f"error: expected to write the cache folder, got {error}", file=sys.stderr)
        return 1
    routing_known.forget()
    print(f"\nkept in {path}")
    return 0


def fastest(experts: Experts, tokens: int, topk: int, known: Family) -> tuple[Row, float]:
    """The fastest tiles of both products for M tokens, and their time in us."""
    num_experts = experts.w1.shape[0]
    entries = tokens * topk / num_experts
    found: list[tuple[float, Row]] = []
    for block in blocks_for(entries):
        best = [
            min(
                ((measure(experts, tokens, topk, tile, second), tile)
                 for tile in candidates(block, known, second)),
                key=lambda pair: pair[0],
            )
            for second in (False, True)
        ]  # fmt: skip
        found.append((best[0][0] + best[1][0], Row(entries, best[0][1], best[1][1])))
    total, row = min(found, key=lambda pair: pair[0])
    return row, total


def blocks_for(entries: float) -> list[int]:
    """The block sizes that are worth a measurement for so many entries per expert, at least one."""
    return [
        block
        for block in BLOCKS
        if block <= max(BLOCKS[0], 8 * entries) and (16 * block >= entries or block == BLOCKS[-1])
    ]


def candidates(block: int, known: Family, second: bool) -> Iterator[Tile]:
    """The tiles of the table for blocks of that size, and what SHAPES gives."""
    for row in known.rows:
        if row.block == block:
            yield row.second if second else row.first
    for columns, inner in SHAPES:
        for warps in (4, 8):
            for stages in (3, 4):
                tile = Tile(block, columns if second else columns // 2, inner, warps, stages,
                            group=1 if block == 16 else 8, halves=block >= 128)  # fmt: skip
                yield tile
                if block >= 64:
                    yield replace(tile, desc=True)


def measure(experts: Experts, tokens: int, topk: int, tile: Tile, second: bool) -> float:
    """Microseconds of one product with a tile; infinite where the device has too little for it."""
    num_experts, model_dim = experts.w1.shape[0], experts.w1.shape[2]
    generator = torch.Generator(experts.w1.device).manual_seed(tokens)
    hidden, logits = (
        torch.randn(tokens, width, device=experts.w1.device, generator=generator)
        for width in (model_dim, num_experts)
    )
    hidden = hidden.to(experts.w1.dtype)
    buffers = fused_moe.topk_softmax_sorting(
        logits, topk, num_experts, model_dim, hidden.dtype, block_size=tile.rows
    )
    family = triton_plan.family_for(hidden.device, experts.w1.shape, experts.w1.stride())
    other = Tile(tile.rows, 32, 32, 4, 2)
    row = Row(0, other, tile) if second else Row(0, tile, other)
    try:
        plan = triton_experts.plan_of(
            hidden, experts, buffers, topk, tile.rows, True, False, triton_plan.Choice(family, row)
        )
    except Exception as error:
        if "out of resource" not in str(error).lower():
            raise
        return math.inf
    alone = plan._replace(last=_nothing)
    alone = alone._replace(first=_nothing) if second else alone._replace(second=_nothing)
    fixed = triton_experts.fixed_of(plan, experts)
    call = [lambda: triton_experts.run_plan(alone, fixed, hidden, buffers)]
    return timing.graph_slope_us(call, REPLAYS).us


def _nothing(*arguments: object) -> None:
    """In place of the launches that are not measured."""


def spread(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Each row up to the geometric mean of its entries and the next one's; equal ones as one."""
    found: list[Row] = []
    for index, row in enumerate(rows):
        following = rows[index + 1].entries if index + 1 < len(rows) else None
        entries = 1e9 if following is None else math.sqrt(row.entries * following)
        if found and (found[-1].first, found[-1].second) == (row.first, row.second):
            found.pop()
        found.append(replace(row, entries=entries))
    return tuple(found)


def _experts(
    options: argparse.Namespace, device: torch.device, shape: tuple[int, int, int, int]
) -> Experts:
    num_experts, width, model_dim, inter = shape
    columns = options.layout == "columns"

    def random(rows: int, inner: int) -> Tensor:
        sizes = (num_experts, inner, rows) if columns else (num_experts, rows, inner)
        made = torch.empty(sizes, dtype=DTYPES[options.dtype], device=device)
        made.normal_(std=inner**-0.5)
        return made.transpose(1, 2) if columns else made

    return Experts(
        random(width, model_dim), random(model_dim, inter), None, None, ActivationType.Silu,
        columns and not options.plain,
    )  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        f"{PROGRAM} tune --experts",
        description=(__doc__ or "").replace("python -m aiter", PROGRAM),
    )
    parser.add_argument(
        "--experts", type=_layer, required=True, metavar="E,K,D,inter", help="the layer"
    )
    parser.add_argument(
        "--layout",
        choices=("inner", "columns"),
        default="inner",
        help="inner: contiguous weights; columns: transposed in memory",
    )
    parser.add_argument("--plain", action="store_true", help="w1 without an up projection")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the layer")
    parser.add_argument(
        "--tokens",
        type=_tokens,
        default=(8, 64, 256, 1024, 4096),
        metavar="M,...",
        help="to measure",
    )
    parser.add_argument("--device", type=existing_device, help="cuda[:index]")
    parser.add_argument("--dry-run", action="store_true", help="print, but keep nothing")
    return parser


def _layer(text: str) -> tuple[int, ...]:
    sizes = _sizes(text)
    if len(sizes) != 4 or sizes[1] > sizes[0]:
        raise argparse.ArgumentTypeError(f"expected E,K,D,inter with K up to E, got {text!r}")
    return sizes


def _tokens(text: str) -> tuple[int, ...]:
    sizes = tuple(sorted(set(_sizes(text, MOST_TOKENS))))
    if sizes[0] < 2:
        raise argparse.ArgumentTypeError(f"expected numbers from 2 on, got {text!r}")
    return sizes


def _sizes(text: str, most: int = MOST) -> tuple[int, ...]:
    return tuple(whole(1, most)(part) for part in text.split(","))
