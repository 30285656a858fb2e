"""Which compiler is there for a target, and which version is it?

One compiler per target does everything: device code, host code and the link. An explicit setting
(ROCM_HOME, ROCM_PATH, CUDA_HOME, CXX) that holds no compiler is an error instead of a reason to
look on: code from another compiler than the one asked for is a surprise that costs hours.

A program is looked for once, in the absolute folders of PATH, and goes by its absolute path from
then on, so that the one that is asked for its version is the one that compiles. An entry of PATH
that is empty or relative means another folder wherever a process happens to be: where one would
give the compiler, that is an error and not a choice. So is a relative path in CXX or NVCC_CCBIN.

A compiler's identity is its real path and what `--version` prints. The text needs a process, which
a cache hit must not start, so it is kept in the cache folder under (real path, size, mtime) and the
variables that compilers read, as hipcc's text is that of the ROCm that they name. A wrapper script
that stays the same while what it calls changes is told apart only by the headers that come with the
new compiler.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import envs
from .errors import ToolchainError
from .folders import make_private_folder, write_atomically


@dataclass(frozen=True)
class Compiler:
    """A compiler that was found.

    Attributes:
        command: the words that start it, such as ("/usr/bin/g++",).
        executable: the file whose identity stands for it, links resolved.
        found_by: what led to it, for people.
        family: `gcc`-like, `nvcc`, `hipcc` or `zig`: which spelling of flags it takes.
    """

    command: tuple[str, ...]
    executable: Path
    found_by: str
    family: str


def find_compiler(kind: str) -> Compiler:
    """The compiler for targets of `kind`; raises ToolchainError with what was looked for."""
    if kind == "cpu":
        return _find_cpu()
    if kind == "cuda":
        return _find_cuda()
    return _find_rocm()


def _which(program: str) -> str | None:
    """The absolute path of a program; None if there is none.

    Raises ToolchainError if it would come from the current folder.
    """
    if "/" in program:
        if not os.path.isabs(program):
            raise ToolchainError(
                f"compiler {program}: expected an absolute path or a name to look for on PATH, got a"
                " path from the current folder, which may lead elsewhere"
            )
        return program if _is_program(program) else None
    for folder in envs.search_path():
        path = os.path.join(folder, program)
        if not _is_program(path):
            continue
        if not os.path.isabs(folder):
            raise ToolchainError(
                f"compiler {program}: expected it in an absolute folder of PATH, got one from the"
                f" current folder, by the entry {folder!r} of PATH; remove that entry, or put the"
                " folder of the compiler that you want before it"
            )
        return path
    return None


def _is_program(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)


def host_compiler_of_nvcc() -> Compiler | None:
    """The compiler that nvcc hands host code to: NVCC_CCBIN, or gcc in that folder, else on PATH."""
    text = envs.compiler_variables().get("NVCC_CCBIN", "gcc")
    path = _which(os.path.join(text, "gcc") if os.path.isdir(text) else text)
    return None if path is None else _compiler((path,), "nvcc's host compiler", "gcc")


def _compiler(command: tuple[str, ...], found_by: str, family: str) -> Compiler:
    return Compiler(command, Path(os.path.realpath(command[0])), found_by, family)


def _find_cpu() -> Compiler:
    setting = envs.CXX.get()
    if setting is not None:
        try:
            words = shlex.split(setting)
        except ValueError as error:
            raise ToolchainError(
                f"C++ compiler for cpu: expected CXX to be words as in a shell, got CXX={setting!r}"
                f" ({error})"
            ) from None
        path = _which(words[0]) if words else None
        if path is None:
            raise ToolchainError(
                f"C++ compiler for cpu: expected CXX to name a program, got CXX={setting!r}"
            )
        family = "zig" if os.path.basename(path) == "zig" else "gcc"
        return _compiler((path, *words[1:]), "CXX", family)
    for name in ("g++", "clang++"):
        path = _which(name)
        if path is not None:
            return _compiler((path,), f"{name} on PATH", "gcc")
    zig = zig_of_package()
    if zig is not None:
        return _compiler((str(zig), "c++"), "the ziglang package", "zig")
    raise ToolchainError(
        "C++ compiler for cpu: expected CXX, g++ or clang++ on PATH, or the ziglang package, got"
        " none of them; install g++ (Debian: apt-get install g++) or `pip install ziglang`"
    )


def zig_of_package() -> Path | None:
    """The program of the Python package ziglang; None where it is not there."""
    zig = _package_dir("ziglang") / "zig" if _has_package("ziglang") else None
    return zig if zig is not None and zig.is_file() else None


def _find_cuda() -> Compiler:
    home = envs.CUDA_HOME.get()
    if home is not None:
        return _compiler((_setting("nvcc", "CUDA_HOME", home),), "CUDA_HOME", "nvcc")
    path = _which("nvcc")
    if path is not None:
        return _compiler((path,), "nvcc on PATH", "nvcc")
    default = Path("/usr/local/cuda/bin/nvcc")
    if default.is_file():
        return _compiler((str(default),), "/usr/local/cuda", "nvcc")
    raise ToolchainError(
        "CUDA compiler: expected nvcc under CUDA_HOME, on PATH or in /usr/local/cuda/bin, got none"
        " of them; install the CUDA toolkit and set CUDA_HOME to it"
    )


def _find_rocm() -> Compiler:
    for name, home in (("ROCM_HOME", envs.ROCM_HOME.get()), ("ROCM_PATH", envs.ROCM_PATH.get())):
        if home is not None:
            return _compiler((_setting("hipcc", name, home),), name, "hipcc")
    path = _which("hipcc")
    if path is not None:
        return _compiler((path,), "hipcc on PATH", "hipcc")
    default = Path("/opt/rocm/bin/hipcc")
    if default.is_file():
        return _compiler((str(default),), "/opt/rocm", "hipcc")
    for package in ("_rocm_sdk_core", "_rocm_sdk_devel"):
        if _has_package(package):
            bundled = _package_dir(package) / "bin" / "hipcc"
            if bundled.is_file():
                return _compiler((str(bundled),), f"the {package} package", "hipcc")
    raise ToolchainError(
        "HIP compiler: expected hipcc under ROCM_HOME or ROCM_PATH, on PATH, in /opt/rocm/bin, or"
        " in the packages _rocm_sdk_core or _rocm_sdk_devel, got none of them; install ROCm's HIP"
        " SDK and set ROCM_HOME to it"
    )


def _setting(program: str, variable: str, home: Path) -> str:
    path = home / "bin" / program
    if not path.is_file():
        raise ToolchainError(f"{variable}: expected a folder with bin/{program}, got {str(home)!r}")
    return str(path)


def _has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    locations = spec.submodule_search_locations if spec is not None else None
    if not locations:
        raise ToolchainError(f"Python package {name}: expected a package folder, got {spec!r}")
    return Path(next(iter(locations)))


def pybind11_include() -> Path:
    """The folder of pybind11's headers, found without importing it where that is possible."""
    if not _has_package("pybind11"):
        raise ToolchainError(
            "pybind11: expected the Python package, got none; install it: pip install pybind11"
        )
    include = _package_dir("pybind11") / "include"
    if (include / "pybind11" / "pybind11.h").is_file():
        return include
    # NOTE: distributions move the headers elsewhere; only the package itself knows where.
    import pybind11

    return Path(pybind11.get_include())


def compiler_version(compiler: Compiler, memo_dir: Path, extra_env: dict[str, str]) -> str:
    """The text that `--version` prints, from the memo in `memo_dir` if the file is unchanged."""
    stat = compiler.executable.stat()
    identity = [list(compiler.command), str(compiler.executable), stat.st_size, stat.st_mtime_ns]
    variables = {**envs.compiler_variables(), **extra_env}
    digest = hashlib.sha256(json.dumps([identity, variables]).encode()).hexdigest()[:16]
    memo = memo_dir / f"{compiler.executable.name}-{digest}.json"
    known = _read_memo(memo, identity)
    if known is not None:
        return known
    text = _ask_version(compiler, extra_env)
    _write_memo(memo, {"identity": identity, "version": text})
    return text


def _read_memo(memo: Path, identity: list[Any]) -> str | None:
    try:
        content = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("identity") != identity:
        return None
    version = content.get("version")
    return version if isinstance(version, str) else None


def _write_memo(memo: Path, content: dict[str, Any]) -> None:
    """Keeps the text; a folder that cannot be written only costs a process next time."""
    try:
        make_private_folder(memo.parent.parent, memo.parent.name)
        write_atomically(memo, json.dumps(content))
    except OSError:
        return


def _ask_version(compiler: Compiler, extra_env: dict[str, str]) -> str:
    import subprocess

    command = [*compiler.command, "--version"]
    try:
        done = subprocess.run(
            command,
            env=envs.child_environment(extra_env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or getattr(error, "returncode", None)
        if detail is None:
            detail = error
        elif isinstance(detail, int):
            detail = f"exit status {detail}" if detail >= 0 else f"its end by signal {-detail}"
        raise ToolchainError(
            f"compiler {shlex.join(command)}: expected it to print its version, got {detail}"
        ) from None
    return done.stdout.strip()
