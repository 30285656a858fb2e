"""What do the kernels from hidden states cost on AMD GPUs, and what would they take?

    python op_tests/rocm/write_router.py

Writes the part of docs/rocm.md between its marker lines, and `aiter/routing/modelled_router.py`, by
which dispatch goes where nothing is measured. To be run after a change of these kernels or of the model.

How a launch is timed whose workgroups share a product and hand over to the one that routes: they all
start at once, have a compute unit each and a share of the same size, so that the last one ends its
share when any of them does. One workgroup with a full share is replayed, in the place of the one that
arrives last: its product, its stores to the device's memory, the trip to the ticket, the loads of the
logits that others have left there, and the routing: the arrival of the last share + the hand-over + the
routing. Our own product has a workgroup for every tile: where that is more than there are compute
units, those that a unit gets are replayed on it together, in step from barrier to barrier. The fused
launch behind it is as `write_model.py` has modelled and kept it, which is to be run before this where
that launch has changed.

What that leaves out, beside what `model` does: that all workgroups arrive at one address, and the
memory's bandwidth. Every segment comes after the latency of memory, however many workgroups ask at
once. So a column has the least that the bytes of hidden states and weight, read once, take at the peak
of a data sheet. Neither way takes less.

Rejected: to interpret all workgroups and take the slowest, which is a hundred times the work for the
same time, as no share is larger than the first.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "op_tests")]

import torch  # noqa: E402
from amdgcn.timing import LAUNCH_GAP_US, Program, Timing, replay  # noqa: E402
from crossovers import Table  # noqa: E402
from launches import Device  # noqa: E402
from model import BLOCK_SIZE, Routed, _outputs  # noqa: E402
from router_launches import (  # noqa: E402
    BF16,
    TILES_ALONE,
    choose_tile,
    fused_router_sorting_fwd,
    router_product,
)
from torch import Tensor  # noqa: E402

from aiter import reference  # noqa: E402
from aiter.cli.device_code import cost_table  # noqa: E402
from aiter.cli.table import format_table  # noqa: E402
from aiter.jit.device_code import clang, compile_module  # noqa: E402
from aiter.jit.device_kernels import ARCHS, KernelCode  # noqa: E402
from aiter.routing.dispatch import threshold  # noqa: E402

PAGE = ROOT / "docs" / "rocm.md"
ROWS = ROOT / "aiter" / "routing" / "modelled_router.py"
MARKERS = ("<!-- tables: op_tests/rocm/write_router.py -->", "<!-- end of the router's tables -->")
COMMAND = "python op_tests/rocm/write_router.py"
MODULE = "module_fused_router_sorting"
SHAPES = ((2880, 128, 4), (7168, 256, 8), (4096, 512, 10))  # D', E, K
TOKENS = (1, 4, 16, 64)
SHOWN_ARCH = "gfx942"


@dataclass(frozen=True)
class Gpu:
    """A product that has an architecture.

    Attributes:
        name: for people.
        compute_units: as HIP counts them, which is what the launcher goes by; from gfx10 on workgroup
            processors, of two compute units each.
        terabytes: per second, the peak of its memory by AMD's data sheet.
    """

    name: str
    compute_units: int
    terabytes: float


GPUS = {"gfx942": Gpu("MI300X", 304, 5.3), "gfx1201": Gpu("RX 9070 XT", 32, 0.64)}


@dataclass(frozen=True)
class Times:
    """Of one shape and M, in us; `product` and `routing` are the two launches of the other way."""

    one: float
    product: float
    routing: float
    floor: float

    @property
    def two(self) -> float:
        """Both launches and the gap between them."""
        return self.product + self.routing + LAUNCH_GAP_US


def times(arch: str, width: int, routed: Routed, kept: Table) -> Times:
    """Modelled: the launch from hidden states, and our own product with the fused launch behind it."""
    gpu = GPUS[arch]
    cells = kept.cells(arch, routed.num_experts, routed.topk)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(routed.tokens, width, generator=generator).bfloat16()
    weight = (torch.randn(routed.num_experts, width, generator=generator) / width**0.5).bfloat16()
    logits = reference.router_logits(hidden, weight)
    product = Device(arch, traced=True, workgroups=_Only(_of_one_unit(hidden, weight, gpu)))
    router_product(product, hidden, weight, logits.clone(), compute_units=gpu.compute_units)
    num_bytes = (hidden.numel() + weight.numel()) * hidden.element_size()
    return Times(
        _one_launch(arch, routed, hidden, weight, logits).us,
        _timing(product).us,
        cells.time(f"fused {routed.dtype}", routed.tokens),
        num_bytes / gpu.terabytes / 1e6,
    )


def _one_launch(
    arch: str, routed: Routed, hidden: Tensor, weight: Tensor, logits: Tensor
) -> Timing:
    """The workgroup that arrives last and routes, checked by what it leaves behind."""
    outputs = _outputs(routed)
    found = logits.clone()
    units = GPUS[arch].compute_units
    device = Device(arch, traced=True, workgroups=_Only((0,)))
    fused_router_sorting_fwd(
        device, hidden, weight, found, *outputs, routed.num_experts, routed.topk, BLOCK_SIZE,
        num_workgroups=units, arrived=units - 1,
    )  # fmt: skip
    if not torch.equal(found, logits):
        raise ValueError(f"{arch}, {routed}: expected the reference's logits, got others")
    chosen = logits.topk(routed.topk).indices.flatten()
    entries = torch.bincount(chosen, minlength=routed.num_experts)
    slots = int(((entries + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE).sum())
    if int(outputs[3][0]) != slots:
        raise ValueError(f"{arch}, {routed}: expected {slots} slots, got {int(outputs[3][0])}")
    return _timing(device)


def _of_one_unit(hidden: Tensor, weight: Tensor, gpu: Gpu) -> tuple[int, ...]:
    """The workgroups of our own product that the first compute unit gets."""
    rows, experts = choose_tile(len(hidden), len(weight), gpu.compute_units, BF16, TILES_ALONE)
    num_tiles = -(-len(hidden) // rows) * -(-len(weight) // experts)
    return tuple(range(0, num_tiles, gpu.compute_units))


class _Only(dict[str, tuple[int, ...]]):
    """The same workgroups of any kernel."""

    def __init__(self, workgroups: tuple[int, ...]) -> None:
        self.workgroups = workgroups

    def get(self, key: str, default: object = None) -> tuple[int, ...]:  # type: ignore[override]
        return self.workgroups


def _timing(device: Device) -> Timing:
    ((_, statistics),) = device.statistics.items()
    program = Program.of(statistics.instructions, device.arch)
    return replay(program, [trace for traces in statistics.traces.values() for trace in traces])


def worst_table(kernels: list[KernelCode]) -> str:
    """Worst figures over the module's kernels, by architecture."""
    rows = []
    for arch, facts in ARCHS.items():
        own = [kernel for kernel in kernels if kernel.arch == arch]
        most = (
            max(getattr(kernel, figure) for kernel in own)
            for figure in (
                "vgprs",
                "sgprs",
                "vgpr_spills",
                "sgpr_spills",
                "scratch_bytes",
                "lds_bytes",
            )
        )
        fewest = min(kernel.waves_per_simd for kernel in own), min(k.workgroups for k in own)
        rows.append((arch, facts.wave_size, len(own), *most, *fewest))
    headers = ("arch", "wave", "kernels", "VGPR", "SGPR", "VGPR spills", "SGPR spills", "scratch",
               "static LDS", "waves/SIMD", "workgroups")  # fmt: skip
    return format_table(headers, rows)


Found = dict[tuple[str, int, int, int], dict[int, Times]]


def model_all() -> Found:
    """Every architecture, shape and M."""
    found: Found = {}
    kept = Table.read()
    for arch in GPUS:
        for width, experts, topk in SHAPES:
            own = found[arch, width, experts, topk] = {}
            for tokens in TOKENS:
                own[tokens] = times(arch, width, Routed(tokens, experts, topk, "f32"), kept)
                print(arch, width, experts, topk, tokens, own[tokens], flush=True)
    return found


def times_table(found: Found) -> str:
    """One row per architecture, shape and M."""
    rows = []
    for (arch, width, experts, topk), by_tokens in found.items():
        for tokens, each in by_tokens.items():
            us = (each.one, each.product, each.routing, each.two, each.floor)
            fastest = "fused" if each.one <= each.two else "product"
            rows.append((arch, f"{width} x {experts}, K={topk}", tokens,
                         *(f"{time:.2f}" for time in us), fastest))  # fmt: skip
    headers = ("arch", "D' x E", "M", "one launch", "product", "routing", "product, gap, routing",
               "memory, at least", "fastest")  # fmt: skip
    return format_table(headers, rows)


HEAD = '''"""Up to how many tokens is one launch from hidden states the fastest in the timing model?

Written by `{command}`, which see: do not edit.
"""

from __future__ import annotations

DATE = "{date}"
COMMAND = "{command}"

# By architecture: D', E, K and the largest M of the launch that makes the product as well; 0 for never.
# fmt: off
ROWS: dict[str, tuple[tuple[int, int, int, int], ...]] = {{
'''


def write_rows(found: Found, date: str) -> None:
    """Writes the module of rows."""
    text = HEAD.format(command=COMMAND, date=date)
    for arch in GPUS:
        rows = (
            str((*shape, threshold({m: (each.one, each.two) for m, each in by_tokens.items()})))
            for (of_arch, *shape), by_tokens in found.items()
            if of_arch == arch
        )
        text += f'    "{arch}": ({", ".join(rows)}),\n'
    ROWS.write_text(text + "}\n# fmt: on\n", encoding="utf-8")


def main() -> int:
    """Compiles, models and writes."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end:
        raise ValueError(f"{PAGE}: expected the lines {MARKERS}, got a page without them")
    kernels = [
        kernel
        for assembly in compile_module(MODULE, tuple(ARCHS))
        for kernel in assembly.kernels()
        if kernel.mix["VALU"] > 0
    ]
    found = model_all()
    date = datetime.date.today().isoformat()
    write_rows(found, date)
    parts = (
        ("Kernels of the launch from hidden states: worst figures", worst_table(kernels)),
        ("Cost per kernel", cost_table([k for k in kernels if k.arch == SHOWN_ARCH])),
        ("Modelled times in us; bf16 hidden states and weight", times_table(found)),
    )
    head = f"As of {date}, with the clang of ziglang {clang()[1]}."
    text = "\n\n".join([head, *(f"**{title}**\n\n```\n{table}\n```" for title, table in parts)])
    PAGE.write_text(f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help, and no other
    raise SystemExit(main())
