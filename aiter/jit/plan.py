"""What exactly will the compiler see?

A `Plan` is everything that decides a build, by content: sources and rendered templates, ordered
flags, the compiler's identity, the variables it reads, target and architectures, and Python's ABI.
Only the headers are missing, which nobody knows before the first compile; `cache` adds them.

The hash of a plan is the cache's primary key. Paths under the package's sources, pybind11 and
Python's headers enter it as `<csrc>/...`, `<pybind11>/...` and `<python>/...`, so the same content
in another place has the same key.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import compilers, envs, toolchain
from .compilers import Compiler
from .errors import ConfigError, TargetError
from .spec import load_spec, render, template_variables
from .target import Target

FORMAT = 3  # NOTE: raise it when the layout of the cache or the meaning of the key changes.


class Roots:
    """Short names for folders whose place must not matter."""

    def __init__(self, csrc_dir: Path, pybind11_dir: Path, python_dir: Path) -> None:
        named = {"<csrc>": csrc_dir, "<pybind11>": pybind11_dir, "<python>": python_dir}
        pairs = [(name, str(path)) for name, path in named.items()]
        self._pairs = sorted(pairs, key=lambda pair: -len(pair[1]))

    def shorten(self, path: str) -> str:
        """`path` with the name of the folder it lies in, unchanged if in none."""
        for name, folder in self._pairs:
            if path.startswith(folder + "/"):
                return name + path[len(folder) :]
        return path

    def expand(self, path: str) -> str:
        """The inverse of `shorten`."""
        if path[:1] != "<":  # NOTE: most of hundreds of headers are the system's.
            return path
        for name, folder in self._pairs:
            if path.startswith(name + "/"):
                return folder + path[len(name) :]
        return path

    def shorten_flag(self, flag: str) -> str:
        """`flag` with every occurrence of a folder replaced by its name."""
        for name, folder in self._pairs:
            flag = flag.replace(folder, name)
        return flag


@dataclass(frozen=True)
class Source:
    """One file to compile.

    Attributes:
        path: the file in the package; of a template, the template.
        sha256: of the text that the compiler gets.
        flags: the compile flags.
        rendered: the text that a template gave; None for a plain source.
    """

    path: Path
    sha256: str
    flags: tuple[str, ...]
    rendered: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that decides a build but the headers.

    Attributes:
        inputs: the key's parts by name, as JSON; kept with each build to explain a later miss.
        key: the hash of `inputs`.
    """

    module: str
    target: Target
    abi: str
    compiler: Compiler
    sources: tuple[Source, ...]
    link: tuple[str, ...]
    link_tail: tuple[str, ...]
    environment: dict[str, str]
    verbose: bool
    roots: Roots
    inputs: dict[str, Any]
    key: str

    @property
    def place(self) -> Path:
        """The folder of this plan's builds, relative to the cache folder."""
        return Path(self.module, f"{self.target.label}-{self.abi}", self.key[:16])

    @property
    def library_name(self) -> str:
        """The file name of the shared object."""
        return self.module + extension_suffix()


def extension_suffix() -> str:
    """Python's suffix for extension modules, such as .cpython-311-x86_64-linux-gnu.so."""
    return importlib.machinery.EXTENSION_SUFFIXES[0]


def abi_tag() -> str:
    """The part of the suffix that names Python's ABI, such as cpython-311-x86_64-linux-gnu."""
    return extension_suffix().removesuffix(".so").lstrip(".")


def sha256_text(text: str) -> str:
    """The SHA-256 of `text` in UTF-8, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class _Found:
    """The compiler's part of a plan: found on this machine, or recorded with an earlier build."""

    compiler: Compiler
    pybind11_dir: Path
    inputs: dict[str, Any]

    @property
    def version(self) -> str:
        """The compiler's version text, the last part of its identity."""
        return str(self.inputs["compiler"][1][-1])


def make_plan(
    config_path: Path,
    csrc_dir: Path,
    memo_dir: Path,
    module: str,
    target: Target,
    recorded: dict[str, Any] | None = None,
) -> Plan:
    """Reads the config, the sources and the compiler's identity; starts no process on a warm memo.

    Args:
        memo_dir: where the compilers' identities are kept.
        recorded: the inputs of an earlier build, to take the compiler's part from; then no compiler
            is needed, and none can be run with the plan.

    Raises ConfigError, TargetError or ToolchainError.
    """
    spec = load_spec(config_path, module, csrc_dir, target)
    if target.kind not in spec.targets:
        raise TargetError(
            f"module {module}: expected one of its targets ({', '.join(spec.targets)}),"
            f" got {target.kind}"
        )
    found = _find(target, memo_dir) if recorded is None else _from_record(recorded)
    roots = Roots(csrc_dir, found.pybind11_dir, toolchain.python_include())
    profile = toolchain.make_profile(
        spec, target, found.compiler, csrc_dir, found.pybind11_dir, found.version
    )
    variables = {**template_variables(module, csrc_dir, target), **spec.template_args}
    sources = (
        *(_read_source(module, path, _flags_of(path, profile), variables) for path in spec.srcs),
        *(_read_source(module, path, profile.extra, variables) for path in profile.extra_sources),
    )
    inputs = {
        "format": FORMAT,
        "module": module,
        "target": target.label,
        "abi": [extension_suffix(), sys.abiflags],
        **found.inputs,
        "sources": {roots.shorten(str(source.path)): source.sha256 for source in sources},
        "flags": [
            *([roots.shorten_flag(flag) for flag in source.flags] for source in sources),
            [roots.shorten_flag(flag) for flag in (*profile.link, "", *profile.link_tail)],
        ],
    }
    return Plan(
        module=module,
        target=target,
        abi=abi_tag(),
        compiler=found.compiler,
        sources=sources,
        link=profile.link,
        link_tail=profile.link_tail,
        environment=profile.environment,
        verbose=spec.verbose,
        roots=roots,
        inputs=inputs,
        key=sha256_text(json.dumps(inputs, sort_keys=True)),
    )


def _find(target: Target, memo_dir: Path) -> _Found:
    compiler = compilers.find_compiler(target.kind)
    environment = toolchain.target_environment(target.kind)
    identities = [_identity(compiler, memo_dir, environment)]
    if compiler.family == "nvcc":
        behind = compilers.host_compiler_of_nvcc()
        identities += [_identity(behind, memo_dir, {})] if behind is not None else []
    inputs = {
        "compiler": [compiler.family, *identities],
        "variables": {**envs.compiler_variables(), **environment},
    }
    return _Found(compiler, compilers.pybind11_include(), inputs)


def _from_record(recorded: dict[str, Any]) -> _Found:
    # NOTE: family and version decide flags; folders enter the key by their short names alone.
    compiler = Compiler((), Path(), "an earlier build", str(recorded["compiler"][0]))
    inputs = {part: recorded[part] for part in ("compiler", "variables")}
    return _Found(compiler, Path("/pybind11"), inputs)


def _identity(compiler: Compiler, memo_dir: Path, environment: dict[str, str]) -> list[str]:
    version = compilers.compiler_version(compiler, memo_dir, environment)
    return [*compiler.command[1:], str(compiler.executable), version]


def _flags_of(path: Path, profile: toolchain.Profile) -> tuple[str, ...]:
    is_device = path.name.removesuffix(".jinja").endswith(".cu")
    return profile.device if is_device else profile.host


def _read_source(
    module: str, path: Path, flags: tuple[str, ...], variables: dict[str, Any]
) -> Source:
    name = path.name.removesuffix(".jinja")
    try:
        content = path.read_bytes()
        if name == path.name:
            return Source(path, hashlib.sha256(content).hexdigest(), flags)
        text = render(content.decode(), variables, f"module {module}, template {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"module {module}, key srcs: expected a readable file, got {error}"
        ) from None
    # NOTE: a rendered file lies elsewhere, so its quoted includes need the template's folder.
    return Source(path, sha256_text(text), (f"-I{path.parent}", *flags), text)
