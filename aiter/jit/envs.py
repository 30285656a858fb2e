"""Which environment variables exist, and what do they say?

This is the only module of the package that reads `os.environ`. Each variable is one typed entry of
`VARIABLES` (name, default, meaning); the README's table is checked against it. Values are read when
asked for, not at import, so that a program can set them first. A value that does not parse is an
`EnvError` that names the variable. Empty means unset, as usual in shells.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import EnvError
from .paths import PACKAGE

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable: what it is called, means and holds.

    `parse` turns the text into the value and raises ValueError with what it expected.
    """

    name: str
    default: T
    meaning: str
    parse: Callable[[str], T]
    default_text: str = "unset"

    def text(self) -> str | None:
        """The raw text, None when unset or empty."""
        return os.environ.get(self.name) or None

    def get(self) -> T:
        """The parsed value, the default when unset; raises EnvError on a bad value."""
        text = self.text()
        if text is None:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise EnvError(
                f"environment variable {self.name}: expected {error}, got {text!r}"
            ) from None


def _flag(text: str) -> bool:
    values = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
    if text.lower() not in values:
        raise ValueError("1 or 0")
    return values[text.lower()]


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("a whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise ValueError("a number of seconds above 0")
    return value


def _wave(text: str) -> int:
    if text not in ("32", "64"):
        raise ValueError("32 or 64")
    return int(text)


def _check(text: str) -> str:
    if text not in ("race", "address"):
        raise ValueError("race or address")
    return text


def _dispatch(text: str) -> int | None:
    if text == "measured":
        return None
    if text == "capacity":
        return -1  # NOTE: what aiter.routing.dispatch calls CAPACITY.
    if not text.isdecimal():
        raise ValueError("measured, capacity or the largest M of the fused launch")
    return int(text)


def _level(text: str) -> str:
    names = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    if text.upper() not in names:
        raise ValueError(f"one of {', '.join(names)}")
    return text.upper()


def _in_home(text: str) -> Path:
    """The path with its ~ replaced; RuntimeError where that leads nowhere."""
    if text.partition("/")[0] == "~" and os.environ.get("HOME") == "":
        import pwd

        # NOTE: Python takes an empty HOME for the root folder.
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            raise RuntimeError("no home folder") from None
        return Path(home, *Path(text).parts[1:])
    return Path(text).expanduser()


def _folder(text: str) -> Path:
    try:
        path = _in_home(text)
    except RuntimeError:
        raise ValueError(
            "an absolute path, or one in the home folder of a user who has one"
        ) from None
    if not path.is_absolute():
        raise ValueError("an absolute path")
    return path


def _archs(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in re.split("[;,]", text) if part.strip())
    if not names or not all(re.fullmatch(r"[a-z0-9_]+(:[a-z]+[+-])*", name) for name in names):
        raise ValueError("architecture names such as 'gfx942;gfx90a', 'sm_90' or 'native'")
    return () if names == ("native",) else names


AITER_IMPORT_NAME = Variable(
    "AITER_IMPORT_NAME",
    "aiter",
    "the import name that `pip install .` installs under: aiter or fused_moe_routing",
    str,
    "aiter",
)
AITER_REBUILD = Variable(
    "AITER_REBUILD", False, "1 rebuilds every module once per process, even on a hit", _flag, "0"
)
AITER_NO_BUILD = Variable(
    "AITER_NO_BUILD", False, "1 forbids building: what is not cached is an error", _flag, "0"
)
AITER_JIT_DIR: Variable[Path | None] = Variable(
    "AITER_JIT_DIR",
    None,
    "the parent of the cache folder, which has the package's import name",
    _folder,
    "$XDG_CACHE_HOME",
)
AITER_SHARED_CACHE = Variable(
    "AITER_SHARED_CACHE", False, "1 shares the cache folder with its group", _flag, "0"
)
AITER_BUILD_TIMEOUT: Variable[float | None] = Variable(
    "AITER_BUILD_TIMEOUT", None, "seconds after which a build is stopped", _seconds, "no limit"
)
AITER_LOG_LEVEL: Variable[str | None] = Variable(
    "AITER_LOG_LEVEL", None, "DEBUG, INFO, WARNING, ERROR or CRITICAL", _level, "INFO"
)
AITER_LOG_MORE = Variable("AITER_LOG_MORE", False, "1 prints every compiler command", _flag, "0")
AITER_CPU_WAVE = Variable(
    "AITER_CPU_WAVE", 64, "the wave width of the cpu target, 64 or 32", _wave, "64"
)
AITER_CPU_CHECK = Variable(
    "AITER_CPU_CHECK",
    "",
    "builds the cpu target with a checker: race (data races) or address (bounds, undefined results)",
    _check,
)
AITER_DISPATCH: Variable[int | None] = Variable(
    "AITER_DISPATCH",
    None,
    "what dispatch_policy 0 goes by: measured, capacity (fused wherever it fits) or the largest M of"
    " the fused launch",
    _dispatch,
    "measured",
)
AITER_VLLM = Variable(
    "AITER_VLLM",
    True,
    "0 leaves every layer of vLLM as it is, though the plugin is installed",
    _flag,
    "1",
)
AITER_SGLANG: Variable[bool | None] = Variable(
    "AITER_SGLANG",
    None,
    "0 leaves SGLang alone; 1 ends it where its MoE layers cannot be taken",
    _flag,
    "taken where possible",
)
GPU_ARCHS: Variable[tuple[str, ...]] = Variable(
    "GPU_ARCHS",
    (),
    "architectures to build for, such as 'gfx942;gfx90a' or 'sm_90'",
    _archs,
    "the device's own",
)
PREBUILD_KERNELS = Variable(
    "PREBUILD_KERNELS",
    False,
    "1 builds the modules into the package when it is installed, for the cpu and GPU_ARCHS",
    _flag,
    "0",
)
MAX_JOBS: Variable[int | None] = Variable(
    "MAX_JOBS", None, "how many compilers run at once", _positive_int, "the number of CPUs"
)
XDG_CACHE_HOME: Variable[Path | None] = Variable(
    "XDG_CACHE_HOME",
    None,
    "the parent of the cache folder where AITER_JIT_DIR is unset",
    _folder,
    "~/.cache",
)
ROCM_HOME: Variable[Path | None] = Variable(
    "ROCM_HOME", None, "the ROCm installation (looked at first)", _folder
)
ROCM_PATH: Variable[Path | None] = Variable(
    "ROCM_PATH", None, "the ROCm installation (looked at second)", _folder
)
CUDA_HOME: Variable[Path | None] = Variable("CUDA_HOME", None, "the CUDA toolkit", _folder)
CXX: Variable[str | None] = Variable(
    "CXX", None, "the C++ compiler of the cpu target", str, "g++, clang++ or ziglang"
)
NO_COLOR = Variable("NO_COLOR", False, "set to anything: no colours on a terminal", bool)

VARIABLES: tuple[Variable[Any], ...] = (
    AITER_IMPORT_NAME,
    AITER_REBUILD,
    AITER_NO_BUILD,
    AITER_JIT_DIR,
    AITER_SHARED_CACHE,
    AITER_BUILD_TIMEOUT,
    AITER_LOG_LEVEL,
    AITER_LOG_MORE,
    AITER_CPU_WAVE,
    AITER_CPU_CHECK,
    AITER_DISPATCH,
    AITER_VLLM,
    AITER_SGLANG,
    GPU_ARCHS,
    PREBUILD_KERNELS,
    MAX_JOBS,
    XDG_CACHE_HOME,
    ROCM_HOME,
    ROCM_PATH,
    CUDA_HOME,
    CXX,
    NO_COLOR,
)

# NOTE: compilers read these themselves, so a set one is part of what the compiler sees. They are
# passed on and enter the cache key; stripping them would break toolchains that depend on them.
_COMPILER_VARIABLES = (
    "CCC_OVERRIDE_OPTIONS",
    "COMPILER_PATH",
    "CPATH",
    "CPLUS_INCLUDE_PATH",
    "C_INCLUDE_PATH",
    "DEVICE_LIB_PATH",
    "GCC_EXEC_PREFIX",
    "HIPCC_COMPILE_FLAGS_APPEND",
    "HIPCC_LINK_FLAGS_APPEND",
    "HIP_CLANG_HCC_COMPAT_MODE",
    "HIP_CLANG_PATH",
    "HIP_COMPILE_CXX_AS_HIP",
    "HIP_DEVICE_LIB_PATH",
    "HIP_LIB_PATH",
    "HIP_PATH",
    "HIP_ROCCLR_HOME",
    "HSA_PATH",
    "LIBRARY_PATH",
    "NVCC_APPEND_FLAGS",
    "NVCC_CCBIN",
    "NVCC_PREPEND_FLAGS",
    "ROCM_PATH",
)


def cache_dir() -> Path:
    """The cache folder: a folder of the package's name in $AITER_JIT_DIR, $XDG_CACHE_HOME or ~/.cache.

    ROCm's aiter builds into AITER_JIT_DIR itself, and the same tree may be here under two names: each
    has a folder of its own. Raises EnvError where none of them leads to an absolute path.
    """
    parent = AITER_JIT_DIR.get() or XDG_CACHE_HOME.get()
    return (parent or _default_cache_home()) / PACKAGE


def _default_cache_home() -> Path:
    try:
        path = _in_home("~/.cache")
        got = str(path)
    except RuntimeError:
        path, got = Path(), "no home folder: neither HOME nor an entry for this user"
    if not path.is_absolute():
        raise EnvError(
            f"cache folder: expected an absolute path in the home folder, got {got}; set"
            " AITER_JIT_DIR to a folder of your own, or HOME"
        )
    return path


def search_path() -> tuple[str, ...]:
    """The folders in which programs are looked for, as PATH has them; "" is the current one."""
    return tuple(os.environ.get("PATH", os.defpath).split(os.pathsep))


def compiler_variables() -> dict[str, str]:
    """The variables that compilers read themselves and that are set, by name."""
    return {name: os.environ[name] for name in _COMPILER_VARIABLES if os.environ.get(name)}


def child_environment(extra: dict[str, str]) -> dict[str, str]:
    """The environment for a compiler process: ours, English messages, and `extra` on top.

    PATH has its absolute folders alone: a compiler that runs elsewhere must not find another linker
    there than here.
    """
    folders = [folder for folder in search_path() if os.path.isabs(folder)]
    return {**os.environ, "PATH": os.pathsep.join(folders), "LC_ALL": "C", **extra}
