"""How is code run under a checker? The environment of a child process, and its builds beforehand.

A checker wants variables that must be set before Python starts (`LD_PRELOAD` for the address
sanitizer), and what it finds may end the process. So checked code runs in child processes; modules
are built before, by the parent, as a preloaded sanitizer would slow the compilers down.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from aiter.jit.compilers import find_compiler
from aiter.jit.load import Loader
from aiter.jit.target import Target, cpu_level

CHECKS = ("race", "address")
WAVES = (64, 32)
REPOSITORY = Path(__file__).resolve().parents[2]

_SANITIZER_OPTIONS = {
    # NOTE: Python itself never frees what it keeps until its end, and lanes' stacks are our own.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def checked_target(check: str, wave: int) -> Target:
    """The cpu target of this machine with a checker."""
    return Target("cpu", (f"wave{wave}",), cpu_level(), check)


def build_checked(loader: Loader, modules: Iterable[str], check: str, wave: int) -> None:
    """Builds `modules` of `loader`'s config for a checker; raises as `Loader.ensure` does."""
    for module in modules:
        loader.ensure(module, checked_target(check, wave))


def checked_environment(check: str, wave: int) -> dict[str, str]:
    """The environment of a Python process that runs the package under a checker."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "AITER_CPU_CHECK": check,
        "AITER_CPU_WAVE": str(wave),
        "AITER_NO_BUILD": "1",
    }
    if check == "address":
        environment.update(_SANITIZER_OPTIONS, LD_PRELOAD=sanitizer_runtime())
    return environment


def sanitizer_runtime() -> str:
    """The shared libraries to preload: the address sanitizer's, and the C++ library.

    The sanitizer looks for the function behind `throw` when it starts, and ends the process at the
    first throw if the C++ library came later.
    """
    sanitizer = ("libasan.so", "libclang_rt.asan-x86_64.so", "libclang_rt.asan.so")
    return f"{_compiler_file(*sanitizer)} {_compiler_file('libstdc++.so.6')}"


def _compiler_file(*names: str) -> str:
    """The path of the first of these files that comes with the cpu target's compiler."""
    command = find_compiler("cpu").command
    for name in names:
        done = subprocess.run(
            [*command, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        if os.path.isabs(done.stdout.strip()):
            return done.stdout.strip()
    raise FileNotFoundError(f"{' '.join(command)}: expected it to come with {names[0]}, got none")


def python(*arguments: str) -> list[str]:
    """The command of a Python process."""
    return [sys.executable, *arguments]
