"""Is the compiler that is asked for its version the one that compiles, and is a wrong one named?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from toy import Toy, program

from aiter.jit.compilers import find_compiler, host_compiler_of_nvcc
from aiter.jit.errors import BuildError, ToolchainError
from aiter.jit.rocm_flags import unknown_arch
from aiter.jit.target import Target


@pytest.mark.parametrize("entry", ["", ".", "bin"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("cpu", "g++"), ("cuda", "nvcc"), ("rocm", "hipcc")],
    ids=["cpu", "cuda", "rocm"],
)
def test_a_compiler_from_the_current_folder_is_refused(
    bare_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, entry: str
) -> None:
    """By an entry of PATH that is empty or relative; before one that is absolute, or without."""
    here = bare_path.parent / "here"
    program(here / entry / name)
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", f"{entry}:{bare_path}")
    expected = rf"compiler {re.escape(name)}: .* by the entry {entry!r} of PATH; remove that entry"
    with pytest.raises(ToolchainError, match=expected):
        find_compiler(kind)
    wanted = program(bare_path / name)
    with pytest.raises(ToolchainError, match=expected):
        find_compiler(kind)
    monkeypatch.setenv("PATH", f"{bare_path}:{entry}")
    assert find_compiler(kind).command == (str(wanted),)


@pytest.mark.parametrize("setting", ["./own", "bin/own", "own"])
def test_a_setting_that_leads_to_the_current_folder_is_refused(
    bare_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    here = bare_path.parent / "here"
    program(here / setting)
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", f":{bare_path}")
    for variable, find in (
        ("CXX", lambda: find_compiler("cpu")),
        ("NVCC_CCBIN", host_compiler_of_nvcc),
    ):
        monkeypatch.setenv(variable, setting)
        with pytest.raises(ToolchainError, match="got (a path|one) from the current folder"):
            find()


def test_a_setting_that_is_no_shell_text_is_refused(
    bare_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "g++ 'open")
    with pytest.raises(ToolchainError, match="expected CXX to be words as in a shell, got"):
        find_compiler("cpu")


def test_what_is_identified_is_what_compiles(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a relative entry behind: compilers run elsewhere, and look nowhere else than we did."""
    wrapper = toy.compiler_wrapper()
    folder = toy.root / "bin"
    folder.mkdir()
    wrapper.rename(folder / "g++")
    text = (
        (folder / "g++")
        .read_text()
        .replace("exec g++", f"echo $PATH >> {toy.root}/paths; exec /usr/bin/g++")
    )
    (folder / "g++").write_text(text)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin::relative:.")
    monkeypatch.chdir(toy.root)
    assert toy.load().value() == 1
    assert toy.loader().plan("module_toy", toy.target()).compiler.command == (str(folder / "g++"),)
    assert toy.compiles() == 1
    assert (toy.root / "paths").read_text().splitlines()[-1] == f"{folder}:/usr/bin:/bin"


UNKNOWN = (
    "clang: error: invalid target ID 'gfx950'; format is a processor name followed by",
    "error: unknown target CPU 'gfx950'",
    "clang: error: cannot find ROCm device library for gfx950; provide its path",
    "clang: error: unsupported HIP gpu architecture: gfx950",
)


@pytest.mark.parametrize("output", UNKNOWN)
def test_an_architecture_that_hipcc_does_not_know_is_seen(output: str) -> None:
    assert unknown_arch(output, ("gfx942", "gfx950:xnack-")) == "gfx950:xnack-"
    assert unknown_arch(output, ("gfx942", "gfx95")) is None
    assert unknown_arch("error: expected ';' gfx950", ("gfx950",)) is None


def test_a_hipcc_that_is_too_old_is_called_so(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (toy.csrc / "toy.cu").write_text("int value;\n")
    toy.configure(srcs=["{{ AITER_CSRC_DIR }}/toy.cu"])
    text = f'#!/bin/sh\ncase "$*" in *--version) echo 1;; *) echo "{UNKNOWN[0]}"; exit 1;; esac\n'
    hipcc = program(tmp_path / "bin" / "hipcc", text)
    monkeypatch.setenv("ROCM_HOME", str(tmp_path))
    with pytest.raises(BuildError) as caught:
        toy.loader().load("module_toy", Target("rocm", ("gfx950",)))
    first = str(caught.value).splitlines()[0]
    assert f"expected a compiler that knows gfx950, got {hipcc}" in first
    assert "gfx950 needs a newer ROCm" in first
