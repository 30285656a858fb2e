"""`python -m aiter env`: what is here, what was found for each target, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys

from .. import _installed
from .._version import __version__
from ..jit import envs, paths, plan
from ..jit.cache import COMPILER_DIR
from ..jit.compilers import compiler_version, find_compiler
from ..jit.errors import JitError
from ..jit.manifest import subfolders
from ..jit.target import KINDS, named_target
from ..jit.toolchain import target_environment
from .table import format_table

_TARGET_HEADERS = ("target", "archs", "found by", "compiler", "version")
_VARIABLE_HEADERS = ("variable", "value", "default", "meaning")
_ROCM = "amd-aiter"  # the distribution of ROCm's aiter
_PACKAGES = ("torch", "pybind11", "jinja2", "filelock", "ziglang")


def run(options: argparse.Namespace) -> int:
    """Prints versions, targets, folders and variables, as tables or with `--json` as one object."""
    if getattr(options, "json", False):
        print(json.dumps(_as_json(), indent=1))
        return 0
    print(format_table(("what", "value"), [*_versions(), *_names(), *_folders()]))
    print()
    rows, notes = _targets()
    print(format_table(_TARGET_HEADERS, rows))
    print("\n".join(notes))
    print()
    print(format_table(_VARIABLE_HEADERS, _variables()))
    return 0


def _as_json() -> dict[str, object]:
    """Everything that the tables say, by the titles of their columns."""
    targets, notes = _targets()
    return {
        "versions": dict(_versions()),
        "names": dict(_names()),
        "folders": dict(_folders()),
        "targets": [dict(zip(_TARGET_HEADERS, row, strict=True)) for row in targets],
        "notes": [note.removeprefix("note: ") for note in notes],
        "variables": [dict(zip(_VARIABLE_HEADERS, row, strict=True)) for row in _variables()],
    }


def _versions() -> list[tuple[str, str]]:
    rows = [
        (paths.PACKAGE, __version__),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("ABI", plan.abi_tag()),
        ("machine", f"{platform.system()} {platform.machine()}"),
    ]
    for name in _PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _names() -> list[tuple[str, str]]:
    """The import name, which distributions have it, and what else is found under it."""
    installed, rocm = [], "not installed"
    for found in importlib.metadata.distributions():
        name = found.metadata["Name"]
        if paths.PACKAGE in (found.read_text("top_level.txt") or "").split():
            installed.append(f"{name} {found.version}")
        if name == _ROCM:
            rocm = f"{_ROCM} {found.version}"
    here = str(paths.PACKAGE_DIR)
    elsewhere = [
        folder
        for folder in (os.path.join(entry, paths.PACKAGE) for entry in sys.path)
        if os.path.isfile(os.path.join(folder, "__init__.py")) and os.path.realpath(folder) != here
    ]
    return [
        ("import name", f"{paths.PACKAGE}, from {here}"),
        ("installed under it", ", ".join(sorted(set(installed))) or "nothing; a checkout"),
        ("also found under it", ", ".join(elsewhere) or "nothing"),
        ("its folder", _installed.state() or "this package's alone"),
        ("ROCm's aiter", rocm),
    ]


def _folders() -> list[tuple[str, str]]:
    try:
        cache = str(envs.cache_dir())
    except JitError as error:
        cache = str(error)
    ahead = [path.name for path in subfolders(paths.PREBUILT_DIR)]
    return [
        ("cache folder", cache),
        ("sources", str(paths.source_root())),
        ("prebuilt modules", ", ".join(ahead) or "none"),
    ]


def _targets() -> tuple[list[tuple[str, str, str, str, str]], list[str]]:
    """One row per target, and what keeps those with a `-` from being used."""
    rows, notes = [], []
    for kind in KINDS:
        archs, found_by, command, version = "-", "-", "-", "-"
        try:
            target = named_target(kind)
            parts = (*target.archs, target.cpu_level, target.cpu_check)
            archs = ", ".join(filter(None, parts))
        except JitError as error:
            notes.append(f"note: {error}")
        try:
            compiler = find_compiler(kind)
            found_by, command = compiler.found_by, " ".join(compiler.command)
            memo_dir = envs.cache_dir() / COMPILER_DIR
            lines = compiler_version(compiler, memo_dir, target_environment(kind)).splitlines()
            # NOTE: nvcc begins with its name and copyright; the release comes later.
            version = next((line for line in lines if "release" in line), (*lines, "-")[0])
        except JitError as error:
            notes.append(f"note: {error}")
        rows.append((kind, archs, found_by, command, version))
    return rows, notes


def _variables() -> list[tuple[str, str, str, str]]:
    rows = []
    for variable in envs.VARIABLES:
        text = variable.text()
        shown = "unset" if text is None else text
        try:
            variable.get()
        except JitError as error:
            shown = f"wrong: {error}"
        rows.append((variable.name, shown, variable.default_text, variable.meaning))
    return rows
