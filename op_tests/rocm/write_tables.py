"""Writes the tables of docs/rocm.md anew, from the kernels as they are.

    python op_tests/rocm/write_tables.py

Between the two marker lines: the worst figures of every architecture, the cost of every kernel, the
instruction mix of the fused kernel, and, counted by the interpreter, what launches execute: by
architecture, by phase, and over the banks of LDS.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "op_tests")]

import torch  # noqa: E402
from cases import Case  # noqa: E402
from launches import Device  # noqa: E402
from phases import PROBLEMS, collisions, launch, phases  # noqa: E402
from runners import run_fused  # noqa: E402
from targets import Target  # noqa: E402

from aiter.cli.device_code import cost_table, mix_table  # noqa: E402
from aiter.cli.table import format_table  # noqa: E402
from aiter.jit.device_code import clang, compile_module  # noqa: E402
from aiter.jit.device_kernels import ARCHS, MIX_CLASSES, KernelCode  # noqa: E402

PAGE = ROOT / "docs" / "rocm.md"
MARKERS = ("<!-- tables: op_tests/rocm/write_tables.py -->", "<!-- end of tables -->")
MODULES = ("module_fused_topk_moe_sorting", "module_topk_softmax", "module_moe_sorting_opus")
SHOWN = ("gfx942", "gfx950")
LAUNCH = Case(8, 128, 4, torch.bfloat16, model_dim=2880)
BY_PHASE = ("gpt-oss-120b, M=64", "gpt-oss-120b, M=8", "gpt-oss-120b, M=1",
            "DeepSeek-V3, M=64")  # fmt: skip


def used(kernel: KernelCode) -> bool:
    """Whether launchers choose the instance: others are compiled empty."""
    return kernel.mix["DPP"] > 0 or kernel.name.startswith("moe_sorting")


def worst_table(kernels: list[KernelCode]) -> str:
    """One row per architecture: the largest and smallest figures over all kernels."""
    rows = []
    for arch in ARCHS:
        own = [kernel for kernel in kernels if kernel.arch == arch and used(kernel)]
        rows.append(
            (
                arch,
                ARCHS[arch].wave_size,
                len(own),
                max(kernel.vgprs for kernel in own),
                max(kernel.sgprs for kernel in own),
                max(kernel.vgpr_spills for kernel in own),
                max(kernel.sgpr_spills for kernel in own),
                max(kernel.scratch_bytes for kernel in own),
                min(kernel.waves_per_simd for kernel in own),
                min(kernel.workgroups for kernel in own),
            )
        )
    return format_table(
        ("arch", "wave", "kernels", "VGPR", "SGPR", "VGPR spills", "SGPR spills", "scratch",
         "waves/SIMD", "workgroups"),
        rows,
    )  # fmt: skip


def executed_table() -> str:
    """What LAUNCH executes: instructions of all waves, by class."""
    rows = []
    for arch in ARCHS:
        device = Device(arch)
        run_fused(LAUNCH, Target("cpu", device.wave_size), device.fused_topk_moe_sorting_fwd)
        ((name, statistics),) = device.statistics.items()
        mix = statistics.mix()
        rows.append((arch, name, statistics.waves, *(mix[c] for c in MIX_CLASSES)))
    return format_table(("arch", "kernel", "waves", *MIX_CLASSES), rows)


def phase_table(problem: str) -> str:
    """What every phase of a launch executes, all waves together."""
    rows = []
    for arch in SHOWN:
        found = phases(arch, problem)
        for name, phase in found.items():
            mix = (phase.mix[c] for c in MIX_CLASSES)
            rows.append((arch, name, phase.static, phase.round_trips, *mix, phase.idle))
        whole = launch(arch, problem)
        static = sum(count > 0 for count in whole.executed())
        mix = (whole.mix()[c] for c in MIX_CLASSES)
        rows.append((arch, "all", static, whole.most_round_trips(), *mix, whole.idle_slots()))
    return format_table(("arch", "phase", "static", "trips", *MIX_CLASSES, "idle"), rows)


def bank_table() -> str:
    """LDS passes of every problem's launch."""
    rows = []
    for arch in ("gfx942", "gfx1201"):
        for problem in PROBLEMS:
            total, worst = collisions(launch(arch, problem))
            ratio = f"{total.passes / total.least:.2f}"
            numbers = (total.accesses, total.least, total.passes, ratio, total.worst)
            rows.append((arch, problem, *numbers, worst if total.worst > 1 else "-"))
    return format_table(
        ("arch", "problem", "accesses", "least", "passes", "ratio", "worst", "instruction"), rows
    )


def tables() -> str:
    """The generated part of the page."""
    kernels = [
        kernel
        for module in MODULES
        for assembly in compile_module(module, tuple(ARCHS))
        for kernel in assembly.kernels()
    ]
    shown = [kernel for kernel in kernels if kernel.arch in SHOWN and used(kernel)]
    fused = [kernel for kernel in shown if kernel.name.startswith("fused")]
    shown = fused + [kernel for kernel in shown if kernel not in fused and kernel.arch == SHOWN[0]]
    parts = (
        ("Worst figures per architecture", worst_table(kernels)),
        ("Cost per kernel", cost_table(shown)),
        ("Static instruction mix of the fused kernel", mix_table(fused)),
        (f"Executed by one fused launch of M={LAUNCH.num_tokens}, E={LAUNCH.num_experts},"
         f" K={LAUNCH.topk}, bf16, all waves", executed_table()),
        *((f"Phases of one fused launch: {problem}, bf16, all waves", phase_table(problem))
          for problem in BY_PHASE),
        ("Passes over the banks of LDS, one fused launch each", bank_table()),
    )  # fmt: skip
    date = datetime.date.today().isoformat()
    head = f"As of {date}, with the clang of ziglang {clang()[1]}."
    return "\n\n".join([head, *(f"**{title}**\n\n```\n{table}\n```" for title, table in parts)])


def main() -> int:
    """Rewrites the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end:
        raise ValueError(f"{PAGE}: expected the lines {MARKERS}, got a page without them")
    PAGE.write_text(f"{before}{MARKERS[0]}\n\n{tables()}\n\n{MARKERS[1]}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help, and no other
    raise SystemExit(main())
