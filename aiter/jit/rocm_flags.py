"""Which flags does hipcc get beyond the common ones, from which version of ROCm on?

A table: the first version that knows a flag, the flag, the architectures that it is for, the reason.
The version is the one in hipcc's own `--version` text, `HIP version: 6.2.41133-...`, which the
loader keeps as part of the compiler's identity. A text without such a line (a plain clang, a
wrapper) gets none of the flags: an unknown one ends a compile, a missing one costs little.

`-mllvm` options are given once or not at all, as LLVM refuses a second one of the same name. Up to
6.2.41132 hipcc itself passes the two about inlining.

Rejected, each measured on the fused kernels for gfx942 with clang 22 (28424 instructions in all 18
instances): `--lsr-drop-solution=1` adds 30 instructions and `-enable-post-misched=0` adds 376, and
neither removes the scalar spills of gfx90a; `-fno-offload-uniform-block` changes nothing, since the
size of a workgroup is read and not assumed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Version = tuple[int, int, int]


@dataclass(frozen=True)
class RocmFlag:
    """A flag that not every hipcc knows.

    Attributes:
        since: the first HIP version that gets it.
        words: the flag, as words of the command line.
        archs: the architectures that it is for, without features; empty for all.
        reason: what it is for.
    """

    since: Version
    words: tuple[str, ...]
    archs: tuple[str, ...]
    reason: str


ROCM_FLAGS = (
    RocmFlag(
        (6, 2, 41133),
        ("-mllvm", "-amdgpu-early-inline-all=true"),
        (),
        "hipcc stopped to pass it itself; a device function that stays out of line keeps arrays of"
        " its caller in scratch",
    ),
    RocmFlag(
        (6, 2, 41133),
        ("-mllvm", "-amdgpu-function-calls=false"),
        (),
        "hipcc stopped to pass it itself; a kernel with calls reserves the registers of the calling"
        " convention",
    ),
    RocmFlag(
        (6, 2, 41133),
        ("-mllvm", "-amdgpu-kernarg-preload-count=16"),
        ("gfx942", "gfx950"),
        "leading scalar arguments of a kernel arrive in scalar registers and need no load; structs"
        " by value, which the routing kernels take, stay in memory",
    ),
)


def hip_version(version_text: str) -> Version | None:
    """The HIP version in what `hipcc --version` prints; None where there is none."""
    match = re.search(r"^HIP version: (\d+)\.(\d+)\.(\d+)", version_text, re.M)
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))


def rocm_flags(version: Version | None, archs: tuple[str, ...]) -> tuple[str, ...]:
    """The words for a compiler of this version that compiles for `archs`, in the table's order."""
    if version is None:
        return ()
    bare = {arch.partition(":")[0] for arch in archs}
    return tuple(
        word
        for flag in ROCM_FLAGS
        if version >= flag.since and (not flag.archs or bare & set(flag.archs))
        for word in flag.words
    )


def unknown_arch(output: str, archs: tuple[str, ...]) -> str | None:
    """The first of `archs` that hipcc, by what it printed, does not know; None if it knows all.

    Its clang says so in one of three ways: as a name that it cannot read, as one that it has no
    code generator for, or as one that its device libraries are too old for.
    """
    for arch in archs:
        name = re.escape(arch.partition(":")[0])
        said = (
            rf"invalid target ID '{name}[':]",
            rf"(unknown target CPU|[Uu]nsupported HIP gpu architecture:?) '?{name}\b",
            rf"cannot find ROCm device library for {name}\b",
        )
        if any(re.search(text, output) for text in said):
            return arch
    return None
