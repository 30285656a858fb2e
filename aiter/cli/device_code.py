"""What does the device code of a module cost on AMD GPUs? (build --target rocm --device-only)"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..jit.device_code import compile_module, over_budget
from ..jit.device_kernels import ARCHS, MIX_CLASSES, KernelCode
from ..jit.load import Loader
from .table import format_table

HEADERS = (
    "arch", "kernel", "VGPR", "SGPR", "spills V+S", "LDS", "scratch", "code", "waves/SIMD",
    "threads", "workgroups", "instr",
)  # fmt: skip


def run(
    modules: Sequence[str],
    archs: Sequence[str] = (),
    mix: bool = False,
    loader: Loader | None = None,
) -> int:
    """Compiles the device code of `modules` for `archs` and prints a row per kernel.

    Writes nothing outside the cache folder. A kernel over budget is reported on stderr.

    Args:
        modules: names in the compiler config.
        archs: architectures; none for all that are known.
        mix: whether to print the instruction mix as well.
        loader: whose modules; None for the package's own.

    Returns:
        0 if every kernel is within its budgets, else 1.

    Raises:
        JitError: a module cannot be compiled.
    """
    chosen = tuple(archs) or tuple(ARCHS)
    kernels = [
        kernel
        for module in modules
        for assembly in compile_module(module, chosen, loader)
        for kernel in assembly.kernels()
    ]
    print(cost_table(kernels))
    if mix:
        print()
        print(mix_table(kernels))
    problems = [problem for kernel in kernels for problem in over_budget(kernel)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def cost_table(kernels: Sequence[KernelCode]) -> str:
    """One row per kernel: registers, spills, LDS and scratch in bytes, code size, occupancy."""
    rows = [
        (
            kernel.arch,
            kernel.name,
            kernel.vgprs,
            kernel.sgprs,
            f"{kernel.vgpr_spills}+{kernel.sgpr_spills}",
            f"{kernel.lds_bytes} B",
            f"{kernel.scratch_bytes} B",
            f"{kernel.code_bytes} B",
            kernel.waves_per_simd,
            kernel.max_threads,
            kernel.workgroups,
            kernel.instructions,
        )
        for kernel in kernels
    ]
    return format_table(HEADERS, rows)


def mix_table(kernels: Sequence[KernelCode]) -> str:
    """One row per kernel: static instructions by class."""
    rows = [
        (kernel.arch, kernel.name, *(kernel.mix[name] for name in MIX_CLASSES))
        for kernel in kernels
    ]
    return format_table(("arch", "kernel", *MIX_CLASSES), rows)
