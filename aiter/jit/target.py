"""Which kind of device, and which architectures, is code built for?

A `Target` is a kind (`cpu`, `cuda`, `rocm`), architecture names and, for the cpu, the x86-64 level
and a checker; its label names the cache folder. It is found from a `torch.device`:

- `cpu`: the architecture is the wave width that the execution layer emulates, `wave64` unless
  `AITER_CPU_WAVE` or `cpu_wave` says `wave32`. The level (`x86-64-v3`, `x86-64-v2`) is the highest
  that this machine has of the two, so that machines that share a cache never share a file that one
  of them cannot run. `-march=native` was rejected: it has no name to file a build under. A third
  part, the checker (`race`, `address`), comes from `AITER_CPU_CHECK`; it is a variant of the target
  and not a flag of the modules, so that checked and ordinary builds never meet under one name.
- `cuda`: `rocm` if this PyTorch is built for HIP, else `cuda`. `GPU_ARCHS` overrides the device's
  own architecture for cross-builds; a device that the list does not cover is an error.

A detected AMD architecture drops feature suffixes (`gfx942:sramecc+:xnack-` becomes `gfx942`): code
for the bare name runs in every mode of the device, whereas a suffixed build would have to be
redone when the mode changes. Suffixes given in `GPU_ARCHS` are kept and must match the device.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from . import envs
from .errors import TargetError

if TYPE_CHECKING:
    import torch

KINDS = ("cpu", "cuda", "rocm")
CPU_CHECKS = ("race", "address")

_ARCH_PATTERNS = {
    "cpu": (r"wave(32|64)", "wave64 or wave32"),
    "cuda": (r"sm_\d+[af]?", "a name such as sm_90"),
    "rocm": (r"gfx[0-9a-f]+(:[a-z]+[+-])*", "a name such as gfx942"),
}

# NOTE: the flags that x86-64-v3 and v2 add, as /proc/cpuinfo spells them (abm holds lzcnt).
_LEVEL_FLAGS = {
    "x86-64-v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
    "x86-64-v2": {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"},
}

cpu_wave_override: ContextVar[int | None] = ContextVar("cpu_wave_override", default=None)


@dataclass(frozen=True)
class Target:
    """What code is built for.

    Attributes:
        kind: `cpu`, `cuda` or `rocm`.
        archs: architecture names, in the order given: `wave64`, `sm_90`, `gfx942`...
        cpu_level: the `-march` level of a cpu target; empty elsewhere and on other machines.
        cpu_check: the checker of a cpu target, `race` or `address`; empty for none.
    """

    kind: str
    archs: tuple[str, ...]
    cpu_level: str = ""
    cpu_check: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TargetError(f"target: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        pattern, expected = _ARCH_PATTERNS[self.kind]
        for arch in self.archs:
            if not re.fullmatch(pattern, arch):
                raise TargetError(f"architecture of {self.kind}: expected {expected}, got {arch!r}")
        if not self.archs or (self.kind == "cpu" and len(self.archs) > 1):
            number = "exactly one" if self.kind == "cpu" else "at least one"
            raise TargetError(
                f"architectures of {self.kind}: expected {number}, got {list(self.archs)}"
            )
        if self.cpu_check and (self.kind != "cpu" or self.cpu_check not in CPU_CHECKS):
            raise TargetError(
                f"checker of {self.kind}: expected"
                f" {' or '.join(CPU_CHECKS) if self.kind == 'cpu' else 'none'},"
                f" got {self.cpu_check!r}"
            )

    @property
    def label(self) -> str:
        """The name for people and for folders, such as `rocm-gfx942,gfx90a`."""
        archs = ",".join(arch.replace(":", "_") for arch in self.archs)
        parts = (self.kind, archs, self.cpu_level, self.cpu_check)
        return "-".join(part for part in parts if part)

    @property
    def wave_size(self) -> int | None:
        """The wave width of a cpu target, None on a GPU."""
        return int(self.archs[0].removeprefix("wave")) if self.kind == "cpu" else None


@contextmanager
def cpu_wave(width: int) -> Iterator[None]:
    """Runs the cpu calls of the block with wave width `width` (64 or 32).

    Overrides AITER_CPU_WAVE for the current thread or task; raises TargetError on another width.
    """
    if width not in (32, 64):
        raise TargetError(f"cpu_wave width: expected 32 or 64, got {width!r}")
    token = cpu_wave_override.set(width)
    try:
        yield
    finally:
        cpu_wave_override.reset(token)


@cache
def cpu_level(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The x86-64 level to compile for; empty on another machine or where it cannot be told."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    flags: set[str] = set()
    try:
        with cpuinfo.open() as lines:
            for line in lines:
                if line.startswith("flags"):
                    flags = set(line.split(":", 1)[1].split())
                    break
    except OSError:
        return ""
    if not flags >= _LEVEL_FLAGS["x86-64-v2"]:
        return ""
    return "x86-64-v3" if flags >= _LEVEL_FLAGS["x86-64-v3"] else "x86-64-v2"


def cpu_target(wave: int | None = None) -> Target:
    """The cpu target with wave width `wave`, else the one `cpu_wave` or AITER_CPU_WAVE asks for."""
    width = wave or cpu_wave_override.get() or envs.AITER_CPU_WAVE.get()
    return Target("cpu", (f"wave{width}",), cpu_level(), envs.AITER_CPU_CHECK.get())


def named_target(kind: str, archs: tuple[str, ...] = ()) -> Target:
    """The target called `kind`, for `archs`, else for GPU_ARCHS, else for the first device."""
    if kind == "cpu":
        checker = envs.AITER_CPU_CHECK.get()
        return Target("cpu", archs, cpu_level(), checker) if archs else cpu_target()
    chosen = archs or envs.GPU_ARCHS.get()
    if chosen or kind not in KINDS:
        return Target(kind, chosen)
    import torch

    if (torch.version.hip is not None) != (kind == "rocm") or not torch.cuda.is_available():
        raise TargetError(
            f"target {kind}: expected architectures, since this PyTorch ({torch.__version__}) shows"
            f" no {kind} device to take them from; name them, or set GPU_ARCHS"
        )
    own = device_arch(torch.device("cuda", torch.cuda.current_device()))
    return Target(kind, (own.partition(":")[0],))


def target_for(device: torch.device) -> Target:
    """The target that runs tensors of `device`; raises TargetError where there is none."""
    if device.type == "cpu":
        return cpu_target()
    if device.type != "cuda":
        raise TargetError(f"device: expected a cpu or cuda device, got {str(device)!r}")
    import torch

    kind = "cuda" if torch.version.hip is None else "rocm"
    own = device_arch(device)
    target = Target(kind, envs.GPU_ARCHS.get() or (own.partition(":")[0],))
    if not any(covers(arch, own) for arch in target.archs):
        raise TargetError(
            f"device {device}: expected one of the architectures in GPU_ARCHS"
            f" ({', '.join(target.archs)}), got {own}"
        )
    return target


def device_arch(device: torch.device) -> str:
    """The architecture of a GPU as its driver names it, such as sm_90 or gfx942:sramecc+:xnack-."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        return f"sm_{properties.major}{properties.minor}"
    return str(properties.gcnArchName)


def covers(built: str, device: str) -> bool:
    """Whether code built for the architecture `built` runs on one that calls itself `device`."""
    if built.startswith("sm_"):
        if not built[3:].isdecimal() or not device[3:].isdecimal():
            return built.rstrip("af") == device
        same_major = int(built[3:]) // 10 == int(device[3:]) // 10
        return same_major and int(built[3:]) <= int(device[3:])
    base, *features = built.split(":")
    device_base, *device_features = device.split(":")
    return base == device_base and set(features) <= set(device_features)
