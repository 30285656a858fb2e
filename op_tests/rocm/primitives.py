"""Runs a kernel of `primitives.cu` or `planted.cu` on the interpreter."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from amdgcn.assembly import Kernels
from amdgcn.machine import Launch, run
from amdgcn.memory import GlobalMemory
from amdgcn.statistics import Statistics
from numpy.typing import NDArray

from aiter.jit.device_code import compile_source
from aiter.jit.device_kernels import ARCHS
from aiter.jit.load import default_loader

SOURCES = tuple(Path(__file__).with_name(name) for name in ("primitives.cu", "planted.cu"))

Words = NDArray[np.uint32]


class Arguments(ctypes.Structure):
    """The arguments of every kernel in the two files."""

    _fields_ = [
        ("input", ctypes.c_uint64),
        ("output", ctypes.c_uint64),
        ("argument", ctypes.c_uint32),
    ]


@cache
def primitives(arch: str) -> Kernels:
    """The kernels by name, compiled if need be."""
    loader = default_loader()
    includes = (loader.csrc_dir / "include",)
    texts = (compile_source(source, arch, loader, includes).text for source in SOURCES)
    return Kernels(texts, arch)


def execute(
    arch: str,
    name: str,
    words: Words,
    argument: int = 0,
    threads: int | None = None,
    lds_bytes: int = 0,
    seed: int = 0,
    rcp_rounding: int = 0,
) -> tuple[Statistics, Words]:
    """What one workgroup executes and writes for the input `words`; as many words out as in.

    Args:
        threads: of the workgroup, whole waves; one wave if None.
        lds_bytes: dynamic LDS.

    Raises:
        Fault: the kernel did something wrong.
    """
    words = np.ascontiguousarray(words, np.uint32)
    output = np.full(len(words), 0xA5A5A5A5, np.uint32)
    memory = GlobalMemory()
    arguments = Arguments(
        memory.add("input", words, writable=False), memory.add("output", output), argument
    )
    # NOTE: the struct ends in padding, which is no part of the arguments.
    content = bytes(arguments)[: Arguments.argument.offset + 4]
    launch = Launch(1, threads or ARCHS[arch].wave_size, lds_bytes, content, seed, rcp_rounding)
    return run(primitives(arch)[name], memory, launch), output


def run_primitive(arch: str, name: str, words: Words, *arguments: Any, **options: Any) -> Words:
    """The output of `execute`."""
    return execute(arch, name, words, *arguments, **options)[1]
