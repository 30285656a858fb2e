"""Which flags does a target need?

A `Profile` is plain data: the flags for device code (`.cu`), for host code, for the link, and the
sources that the target adds to every module. One function per kind of target builds it. Rejected:
one command template in the config file, since quoting and the spelling per compiler would then be
text processing.

Measured on two cores with g++ 12: a pybind11 binding file takes 8.0 s at -O3 and 4.7 s at -O1, and
it only unpacks arguments, hence the lower level for host code that is not a kernel. Kernels for the
CPU would compile in half the time at -O1 (`fused_topk_moe_sorting.cu`: 8.1 of 16.3 s) and run 8 to 28 %
longer there (-O2: 13.1 s, 2 to 18 %), so they stay at -O3. (User time, cores shared, 2026-11-26.)

A checked build (AITER_CPU_CHECK) is the cpu target with other flags and one more source: `race`
compiles the kernels with the accesses instrumented and links `cpu/race_check.cpp` in place of the
compiler's own runtime, which knows threads but neither lanes nor workgroups; `address` compiles the
kernels and the execution layer with the compiler's address and undefined-behaviour sanitizers. The
bindings stay as they are: sanitized, they take 20 s of a build's 23 s. Kernels are at -Og there, at
which that file takes 19 s with the sanitizers and 5 s with the race check; at -O1 it takes 42 and 10.

Flags that only some versions of hipcc know are a table of their own, `rocm_flags`.

Paths of the sources are mapped to short names (`csrc/...`), so the result does not depend on where
the package lies. nvcc has no such mapping for its device line tables: those name the real files,
which is also what profilers want.
"""

from __future__ import annotations

import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from .compilers import Compiler
from .errors import ToolchainError
from .rocm_flags import hip_version, rocm_flags
from .spec import ModuleSpec
from .target import Target

_EXACT_MATH = ("-ffp-contract=off",)
_HOST_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden")
_DEVICE_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden")
_CHECKED = ("-Og", "-g1")
_ADDRESS_FLAGS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",  # NOTE: it wants RTTI of pybind11's hidden types.
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
)


@dataclass(frozen=True)
class Profile:
    """The flags of one module for one target, in order.

    Attributes:
        device: for `.cu` sources.
        host: for every other source of the module.
        extra: for the sources that the target adds.
        link: for the link.
        link_tail: after the objects, where libraries belong.
        extra_sources: sources that the target adds to the module.
        environment: variables that the compiler needs.
    """

    device: tuple[str, ...]
    host: tuple[str, ...]
    extra: tuple[str, ...]
    link: tuple[str, ...]
    link_tail: tuple[str, ...] = ()
    extra_sources: tuple[Path, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def target_environment(kind: str) -> dict[str, str]:
    """The variables that the compiler of a kind of target needs."""
    # NOTE: without it hipcc turns itself into nvcc on a machine that has both.
    return {"HIP_PLATFORM": "amd"} if kind == "rocm" else {}


def make_profile(
    spec: ModuleSpec,
    target: Target,
    compiler: Compiler,
    csrc_dir: Path,
    pybind11_dir: Path,
    version_text: str = "",
) -> Profile:
    """The profile of `spec` for `target` with `compiler`, which calls itself `version_text`."""
    includes = [*map(str, spec.extra_include), str(csrc_dir / "include")]
    system = [str(pybind11_dir), str(python_include())]
    common = (
        f"-DAITER_MODULE_NAME={spec.name}",
        f"-DAITER_TARGET_{target.kind.upper()}=1",
        *(f"-I{path}" for path in dict.fromkeys(includes)),
        *(word for path in system for word in ("-isystem", path)),
    )
    prefix_map = (
        f"-ffile-prefix-map={csrc_dir}=csrc",
        f"-ffile-prefix-map={pybind11_dir}=pybind11",
        f"-ffile-prefix-map={python_include()}=python",
    )
    if target.kind == "rocm":
        versioned = rocm_flags(hip_version(version_text), target.archs)
        return _rocm(spec, target, versioned, common, prefix_map)
    if target.kind == "cuda":
        return _cuda(spec, target, common, prefix_map)
    return _cpu(spec, target, compiler, csrc_dir, common, prefix_map)


def python_include() -> Path:
    """The folder of Python's own headers."""
    return Path(sysconfig.get_path("include"))


def check_python_headers() -> None:
    """Raises ToolchainError if Python.h is missing, as it is where only Python itself is there."""
    header = python_include() / "Python.h"
    if not header.is_file():
        raise ToolchainError(
            f"Python headers: expected {header}, got no such file; install the development package"
            f" of Python {sys.version_info.major}.{sys.version_info.minor} (Debian: python3-dev)"
        )


def _cpu(
    spec: ModuleSpec,
    target: Target,
    compiler: Compiler,
    csrc_dir: Path,
    common: tuple[str, ...],
    prefix_map: tuple[str, ...],
) -> Profile:
    level = target.cpu_level
    if compiler.family == "zig":
        # NOTE: zig spells levels with underscores, and adds run-time checks below -O2 unasked.
        machine: tuple[str, ...] = ("-fno-sanitize=undefined",)
        level = level.replace("-", "_")
    else:
        machine = ()
    machine += (f"-march={level}",) if level else ()
    shared = (
        *_EXACT_MATH,
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        *machine,
        "-pthread",
        f"-DAITER_WAVE_SIZE={target.wave_size}",
        *common,
        *prefix_map,
        *spec.flags_extra_cc,
        *spec.flags_extra_cpu,
        "-x",
        "c++",
    )
    layer = [csrc_dir / "cpu" / "hip_cpu.cpp"]
    device: tuple[str, ...] = _DEVICE_FLAGS
    extra: tuple[str, ...] = _HOST_FLAGS
    link: tuple[str, ...] = ("-shared", "-pthread")
    link_tail = spec.extra_ldflags
    if target.cpu_check == "race":
        device = (*_HOST_FLAGS, *_CHECKED, "-fsanitize=thread")
        extra = (*_HOST_FLAGS, "-O2")
        layer.append(csrc_dir / "cpu" / "race_check.cpp")
        link_tail = (*link_tail, "-ldl")
    elif target.cpu_check == "address":
        if compiler.family == "zig":
            raise ToolchainError(
                "AITER_CPU_CHECK=address: expected g++ or clang++, which come with the sanitizers'"
                f" runtime, got {' '.join(compiler.command)} ({compiler.found_by})"
            )
        device = extra = (*_HOST_FLAGS, *_CHECKED, *_ADDRESS_FLAGS)
        link = (*link, *_ADDRESS_FLAGS)
    return Profile(
        device=(*device, *shared),
        host=(*_HOST_FLAGS, *shared),
        extra=(*extra, *shared),
        link=link,
        link_tail=link_tail,
        extra_sources=tuple(path for path in layer if path.is_file()),
    )


def _cuda(
    spec: ModuleSpec, target: Target, common: tuple[str, ...], prefix_map: tuple[str, ...]
) -> Profile:
    host = ("-Xcompiler", "-fPIC,-fvisibility=hidden", *_through_nvcc(prefix_map))
    archs = tuple(f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in target.archs)
    device = ("-std=c++17", "-O3", "-lineinfo", "--fmad=false", *archs, *host, *common)
    return Profile(
        device=(*device, *spec.flags_extra_cuda, "-x", "cu"),
        host=(
            "-std=c++17",
            "-O1",
            *host,
            *common,
            *_through_nvcc(spec.flags_extra_cc),
            "-x",
            "c++",
        ),
        extra=(),
        link=("-shared", *archs),
        link_tail=spec.extra_ldflags,
    )


def _rocm(
    spec: ModuleSpec,
    target: Target,
    versioned: tuple[str, ...],
    common: tuple[str, ...],
    prefix_map: tuple[str, ...],
) -> Profile:
    # NOTE: host code and the link name them too; hipcc otherwise asks the driver for a device.
    archs = tuple(f"--offload-arch={arch}" for arch in target.archs)
    shared = (*_EXACT_MATH, *common, *prefix_map)
    return Profile(
        device=(
            *_DEVICE_FLAGS,
            "-fno-gpu-rdc",
            *archs,
            *versioned,
            *shared,
            *spec.flags_extra_hip,
            "-x",
            "hip",
        ),
        host=(
            *_HOST_FLAGS,
            *archs,
            "-Wno-unused-command-line-argument",
            *shared,
            "-D__HIP_PLATFORM_AMD__=1",
            *spec.flags_extra_cc,
            "-x",
            "c++",
        ),
        extra=(),
        link=("-shared", *archs),
        link_tail=spec.extra_ldflags,
        environment=target_environment("rocm"),
    )


def _through_nvcc(flags: tuple[str, ...]) -> tuple[str, ...]:
    """`flags` for the host compiler behind nvcc, which itself knows only a few of them."""
    own = ("-D", "-U", "-I", "-O", "-std=", "-g")
    words: list[str] = []
    for flag in flags:
        if flag.startswith(own):
            words.append(flag)
        else:
            words += ["-Xcompiler", flag.replace(",", "\\,")]
    return tuple(words)
