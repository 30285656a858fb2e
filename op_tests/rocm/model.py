"""What would a launch take on an AMD GPU, by one timing model for all kernels?

    python op_tests/rocm/model.py --arch gfx942 --shape 128,4 --tokens 1,16,64 --dtype bf16,f32

One line per launch of each way to route random logits (renormalised, B = 32): the time of its longest
workgroup in us, when that workgroup's first load from global memory was issued, its round trips to
memory along the waves that everybody waits for, what all of its waves execute, by class, and the cycles
at which its last wave came to each barrier, so where the time goes between them. Of several
launches a line has the sum, without and with 1.5 us for every further launch. A first line for an
architecture compiles its kernels (2 to 13 s each); a launch is interpreted in 0.02 to 2 s.

The rules are in `amdgcn.timing`. A workgroup is replayed alone, from cycle 0: what several have in
common (the memory's bandwidth, a compute unit that two share) is not modelled. So nobody zeroes here, D
= 0, and of the top-k launch the first workgroup stands for all. The model is good for ratios between
kernels; its uncertainty in us is 40 % and more, and it errs against fewer launches, since a launch
costs about a microsecond more than 1.5 by the profiles of others' kernels.

Held against another implementation of the same rules, for this project's kernels on gfx942 (22 fused
launches, 18 chains; 128/4 to 896/16, M = 1 to 256; 2026-11-26): the fused launches agree within 1.4 %,
the chains come out 0.6 to 4.7 % lower, the more the larger E, and every ordering is the same.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "op_tests")]

import torch  # noqa: E402
from amdgcn.timing import LAUNCH_GAP_US, Program, Timing, replay  # noqa: E402
from choices import WAVES_PER_BLOCK, RowChoice, choose_rows  # noqa: E402
from launches import Counting, Device, Tiles, plan_fused_lds  # noqa: E402
from torch import Tensor  # noqa: E402

from aiter.cli.table import format_table  # noqa: E402
from aiter.jit.device_kernels import ARCHS  # noqa: E402
from aiter.routing.buffers import sorted_sizes  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
WAYS = ("fused", "oneshot", "multiphase")
BLOCK_SIZE = 32
SEED = 1
MOST_TILES = 128  # the workspace of `count` is large enough for every M
TIES = 4  # rows whose ids PyTorch's top-k, which breaks ties as it likes, may choose otherwise
CLASSES = ("VALU", "DPP", "SALU", "SMEM", "LDS", "VMEM", "branch", "barrier", "waitcnt", "nop")
TRIPS = ("global", "scalar", "lds", "store")
HEADERS = ("arch", "dtype", "E/K", "M", "way", "kernel", "us", "with gaps", "first load", *TRIPS,
           *CLASSES, "barriers")  # fmt: skip


@dataclass(frozen=True)
class Routed:
    """What is routed: M, E, K and the dtype of the logits, a key of DTYPES."""

    tokens: int
    num_experts: int
    topk: int
    dtype: str = "bf16"

    def logits(self) -> Tensor:
        """Random ones."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (self.tokens, self.num_experts)
        return torch.randn(shape, generator=generator).to(DTYPES[self.dtype])


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel's name and the timing of its longest workgroup."""

    kernel: str
    timing: Timing


Launches = tuple[Launched, ...]


def fused(arch: str, routed: Routed) -> Launches:
    """The fused launch."""
    device = Device(arch, traced=True)
    device.fused_topk_moe_sorting_fwd(
        routed.logits(), *_outputs(routed), routed.num_experts, routed.topk, BLOCK_SIZE, True
    )
    return _launched(device)


def select(arch: str, routed: Routed) -> Launches:
    """The top-k launch of the chain: its first workgroup, as no other has more rows."""
    wave_size = ARCHS[arch].wave_size

    def rows(tokens: int) -> RowChoice:
        logits = torch.empty((tokens, routed.num_experts), dtype=DTYPES[routed.dtype])
        return choose_rows(logits, routed.topk, True, wave_size)

    chosen = rows(routed.tokens)
    name = f"topk_softmax<{chosen.name}>"
    full = min(routed.tokens, WAVES_PER_BLOCK * chosen.rows_per_wave)
    return _select(arch, replace(routed, tokens=full) if rows(full) == chosen else routed, name)


@cache
def _select(arch: str, routed: Routed, name: str) -> Launches:
    device = Device(arch, traced=True, workgroups={name: (0,)})
    shape = (routed.tokens, routed.topk)
    out = (torch.empty(shape), *(torch.empty(shape, dtype=torch.int32) for _ in range(2)))
    device.topk_softmax(*out, routed.logits(), True)
    return _launched(device)


def count(arch: str, routed: Routed) -> Launches:
    """The top-k launch that counts for the multi-phase sort, by its first workgroup, whose counts are
    compared with those of the reference's ids.
    """
    logits = routed.logits()
    rows = choose_rows(logits, routed.topk, True, ARCHS[arch].wave_size)
    device = Device(arch, traced=True, workgroups={f"topk_softmax<{rows.name}>": (0,)})
    shape = (routed.tokens, routed.topk)
    ids = logits.float().topk(routed.topk).indices
    expected = _tile_counts(ids, routed.num_experts)[0]
    workspace = torch.zeros((MOST_TILES, routed.num_experts), dtype=torch.int32)
    device.topk_softmax(
        torch.empty(shape), torch.empty(shape, dtype=torch.int32), None, logits, True,
        Counting(workspace, torch.empty((routed.tokens, 0)), routed.num_experts),
    )  # fmt: skip
    if (workspace[0] - expected).abs().sum() > TIES * routed.topk:
        raise ValueError(f"{routed}: expected counts {expected}, got {workspace[0]}")
    return _launched(device)


def sort(arch: str, routed: Routed, way: str) -> Launches:
    """The sort's launch behind top-k. Logits' dtypes do not matter.

    Of the many workgroups of multiphase the first stands for all. What they count is put into the
    workspace beforehand.
    """
    num_experts, multiphase = routed.num_experts, way == "multiphase"
    device = Device(arch, traced=True, workgroups={"moe_sorting_place<0>": (0,)})
    ids = routed.logits().float().topk(routed.topk).indices.to(torch.int32)
    weights = torch.full(ids.shape, 1 / routed.topk)
    outputs = _outputs(routed)
    counts = _tile_counts(ids, num_experts) if multiphase else None
    workspace = None if counts is None else counts.to(torch.int32)
    device.moe_sorting_opus_fwd(
        ids, weights, *outputs, num_experts, BLOCK_SIZE, workspace=workspace,
        dispatch_policy=2 if multiphase else 1, counted=multiphase,
    )  # fmt: skip
    entries = torch.bincount(ids.flatten(), minlength=num_experts)
    slots = int(((entries + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE).sum())
    if int(outputs[3][0]) != slots:
        raise ValueError(f"{way}, {routed}: expected {slots} slots, got {int(outputs[3][0])}")
    return _launched(device)


def _tile_counts(ids: Tensor, num_experts: int) -> Tensor:
    """Entries of every expert in every tile of the multi-phase sort: int64 [tiles, E]."""
    tiles = Tiles.choose(ids.shape[0])
    tile_of = torch.arange(ids.shape[0])[:, None] // tiles.tokens
    places = (tile_of * num_experts + ids).flatten()
    found = torch.bincount(places, minlength=tiles.count * num_experts)
    return found.view(tiles.count, num_experts)


def launches(arch: str, routed: Routed, way: str) -> Launches:
    """All launches of a way."""
    if way == "fused":
        return fused(arch, routed)
    first = count(arch, routed) if way == "multiphase" else select(arch, routed)
    return first + sort(arch, routed, way)


@cache
def capacity(arch: str, num_experts: int, topk: int) -> int:
    """The largest M of the fused launch."""
    lds = ARCHS[arch].lds_bytes
    low, high = 0, 1 << 20
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high)
            if plan_fused_lds(middle, num_experts, topk, 0)[1] <= lds
            else (low, middle)
        )
    return low


def _outputs(routed: Routed) -> tuple[Tensor, ...]:
    """The five outputs of a sort, without a byte to zero."""
    slots, blocks = sorted_sizes(routed.tokens, routed.topk, routed.num_experts, BLOCK_SIZE)
    return (
        torch.zeros(slots, dtype=torch.int32),
        torch.zeros(slots),
        torch.zeros(blocks, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros((routed.tokens, 0), dtype=torch.bfloat16),
    )


def _launched(device: Device) -> Launches:
    found = []
    for name, statistics in device.statistics.items():
        program = Program.of(statistics.instructions, device.arch)
        timings = [replay(program, traces) for traces in statistics.traces.values()]
        found.append(Launched(name, max(timings, key=lambda timing: timing.cycles)))
    return tuple(found)


def kernels_us(found: Launches) -> float:
    """Time of the kernels."""
    return sum(each.timing.us for each in found)


def total_us(found: Launches) -> float:
    """Time of the kernels, and the gap of every further launch."""
    return kernels_us(found) + LAUNCH_GAP_US * (len(found) - 1)


def table_rows(arch: str, routed: Routed, way: str) -> list[tuple[object, ...]]:
    """The lines of one way, as HEADERS says."""
    found = launches(arch, routed, way)
    shape = f"{routed.num_experts}/{routed.topk}"
    head = (arch, routed.dtype, shape, routed.tokens, way)
    rows: list[tuple[object, ...]] = []
    total: Counter[str] = Counter()
    for each in found:
        timing = each.timing
        total.update(timing.mix)
        first = "-" if timing.first_load is None else timing.first_load
        trips = (timing.trips[kind] for kind in TRIPS)
        mix = (timing.mix[name] for name in CLASSES)
        barriers = " ".join(map(str, timing.barriers))
        rows.append((*head, each.kernel, f"{timing.us:.2f}", "", first, *trips, *mix, barriers))
    if len(found) > 1:
        us = (f"{kernels_us(found):.2f}", f"{total_us(found):.2f}")
        blank = [""] * (1 + len(TRIPS))
        rows.append((*head, "all", *us, *blank, *(total[name] for name in CLASSES), ""))
    return rows


def _listed(text: str, known: tuple[str, ...]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {name!r}")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(map(int, text.split(",")))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers above 0, got {text}")
    return numbers


def _shape(text: str) -> tuple[int, ...]:
    shape = _numbers(text)
    if len(shape) != 2 or shape[1] > shape[0]:
        raise argparse.ArgumentTypeError(f"expected E,K with K <= E, got {text}")
    return shape


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    for name, known, default in (
        ("arch", tuple(ARCHS), "gfx942"), ("dtype", tuple(DTYPES), "bf16"),
        ("ways", WAYS, "fused,oneshot"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=lambda text, known=known: _listed(text, known),
                            default=default, help=f"some of {', '.join(known)}")  # fmt: skip
    parser.add_argument("--shape", type=_shape, action="append", metavar="E,K", required=True)
    parser.add_argument("--tokens", type=_numbers, default=(1, 16, 64), metavar="M,M,...")
    options = parser.parse_args()
    rows: list[tuple[object, ...]] = []
    for arch in options.arch:
        for num_experts, topk in options.shape:
            for dtype in options.dtype:
                for tokens in options.tokens:
                    routed = Routed(tokens, num_experts, topk, dtype)
                    for way in options.ways:
                        rows += table_rows(arch, routed, way)
    print(format_table(HEADERS, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
