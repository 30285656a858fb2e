"""Fixtures for the tests of the loader."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from toy import Toy

from aiter.jit import compilers, envs

_PR_CAPBSET_DROP = 24
_CAP_DAC_OVERRIDE = 1
_CAP_DAC_READ_SEARCH = 2


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the loader's is set, so that results do not depend on the caller."""
    for variable in envs.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """A fresh toy tree."""
    if shutil.which("g++") is None:
        pytest.fail("the tests of the loader need g++ on PATH")
    return Toy(tmp_path / "toy")


@pytest.fixture
def counted(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A fresh toy tree whose compiles are counted."""
    monkeypatch.setenv("CXX", str(toy.compiler_wrapper()))
    return toy


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The loader's log lines so far."""
    caplog.set_level(logging.INFO, logger="aiter")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "aiter"]


@pytest.fixture
def obey_permissions() -> Callable[[], None]:
    """To run in a child before it executes a program: makes permission bits bind for root too."""

    def drop() -> None:
        if os.geteuid() != 0:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
            if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "cannot drop the capability")

    return drop


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    """Makes trees read-only until the end of the test."""
    changed: list[tuple[Path, int]] = []

    def protect(root: Path) -> None:
        for path in sorted(root.rglob("*"), reverse=True):
            _drop_write(path, changed)
        _drop_write(root, changed)

    yield protect
    for path, mode in reversed(changed):
        path.chmod(mode)


def _drop_write(path: Path, changed: list[tuple[Path, int]]) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    changed.append((path, mode))
    path.chmod(mode & ~0o222)


@pytest.fixture
def bare_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of one empty folder, and no packages that carry compilers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(compilers, "_has_package", lambda name: False)
    return folder
