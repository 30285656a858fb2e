"""Which environment variables exist, and how are bad values refused?"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from aiter.jit import envs
from aiter.jit.errors import EnvError

PACKAGE = Path(envs.__file__).resolve().parents[1]

GOOD = [
    ("AITER_REBUILD", "1", True),
    ("AITER_REBUILD", "off", False),
    ("AITER_NO_BUILD", "true", True),
    ("AITER_JIT_DIR", "/x/y", Path("/x/y")),
    ("AITER_BUILD_TIMEOUT", "2.5", 2.5),
    ("AITER_LOG_LEVEL", "debug", "DEBUG"),
    ("AITER_LOG_MORE", "0", False),
    ("AITER_CPU_WAVE", "32", 32),
    ("GPU_ARCHS", "gfx942;gfx90a", ("gfx942", "gfx90a")),
    ("GPU_ARCHS", "gfx942:sramecc+:xnack-, sm_90", ("gfx942:sramecc+:xnack-", "sm_90")),
    ("GPU_ARCHS", "native", ()),
    ("MAX_JOBS", "3", 3),
    ("XDG_CACHE_HOME", "/x", Path("/x")),
    ("CXX", "ccache g++", "ccache g++"),
]

BAD = [
    ("AITER_REBUILD", "maybe", "1 or 0"),
    ("AITER_NO_BUILD", "2", "1 or 0"),
    ("AITER_JIT_DIR", "relative", "an absolute path"),
    ("AITER_JIT_DIR", "~nobody-of-this-name/x", "an absolute path"),
    ("AITER_BUILD_TIMEOUT", "soon", "a number of seconds above 0"),
    ("AITER_BUILD_TIMEOUT", "0", "a number of seconds above 0"),
    ("AITER_BUILD_TIMEOUT", "nan", "a number of seconds above 0"),
    ("AITER_LOG_LEVEL", "loud", "one of DEBUG, INFO"),
    ("AITER_CPU_WAVE", "16", "32 or 64"),
    ("GPU_ARCHS", "gfx 942", "architecture names"),
    ("GPU_ARCHS", ";", "architecture names"),
    ("MAX_JOBS", "0", "a whole number of at least 1"),
    ("MAX_JOBS", "-2", "a whole number of at least 1"),
]


def variable(name: str) -> envs.Variable[object]:
    return {variable.name: variable for variable in envs.VARIABLES}[name]


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_good_values(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object) -> None:
    monkeypatch.setenv(name, text)
    assert variable(name).get() == value


@pytest.mark.parametrize(("name", "text", "expected"), BAD)
def test_bad_values_name_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, expected: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(EnvError, match=f"variable {name}: expected {expected}.*, got '{text}'"):
        variable(name).get()


@pytest.mark.parametrize("entry", envs.VARIABLES, ids=lambda entry: entry.name)
def test_empty_means_unset(monkeypatch: pytest.MonkeyPatch, entry: envs.Variable[object]) -> None:
    monkeypatch.setenv(entry.name, "")
    assert entry.get() == entry.default


def test_every_variable_is_listed_once() -> None:
    listed = [entry.name for entry in envs.VARIABLES]
    defined = [value.name for value in vars(envs).values() if isinstance(value, envs.Variable)]
    assert sorted(listed) == sorted(defined)
    assert len(set(listed)) == len(listed)


def test_only_envs_reads_the_environment() -> None:
    readers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", getattr(node, "id", None))
            if name in ("environ", "environb", "getenv"):
                readers.add(path.relative_to(PACKAGE).as_posix())
    assert readers == {"jit/envs.py"}


def test_cache_dir_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert envs.cache_dir() == Path("/home/someone/.cache/aiter")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert envs.cache_dir() == Path("/xdg/aiter")
    monkeypatch.setenv("AITER_JIT_DIR", "/own")
    assert envs.cache_dir() == Path("/own/aiter")
