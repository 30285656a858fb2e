"""When is a cached build used, and when not?"""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from toy import MODULE, Toy

from aiter.jit.cache import BROKEN_DIR, MANIFEST, Entry, Header, Miss
from aiter.jit.errors import CacheError

Messages = Callable[[], list[str]]


def test_second_load_compiles_nothing(counted: Toy) -> None:
    assert counted.load().value() == 1
    assert counted.load().value() == 1
    assert counted.compiles() == 1


def test_layout_is_readable_and_private(toy: Toy) -> None:
    toy.load()
    (folder,) = toy.builds()
    abi = importlib.machinery.EXTENSION_SUFFIXES[0].removesuffix(".so").lstrip(".")
    assert folder.parts[-4] == MODULE
    assert folder.parts[-3] == f"{toy.target().label}-{abi}"
    assert {item.name for item in folder.iterdir()} == {
        MODULE + importlib.machinery.EXTENSION_SUFFIXES[0],
        MANIFEST,
        "build.log",
    }
    assert "-c" in (folder / "build.log").read_text()
    assert toy.cache_dir.stat().st_mode & 0o777 == 0o700
    assert list((toy.cache_dir / ".build").iterdir()) == []


def test_touching_files_rebuilds_nothing(counted: Toy) -> None:
    counted.load()
    for path in (counted.source, counted.inner, counted.outer):
        os.utime(path, ns=(1, 1))
    assert counted.load().value() == 1
    assert counted.compiles() == 1


def test_stats_of_touched_headers_are_refreshed(toy: Toy) -> None:
    toy.load()
    (folder,) = toy.builds()
    os.utime(toy.inner, ns=(1, 1))
    time.sleep(0.1)  # what changed this very moment is not trusted
    toy.load()
    headers = {name: rest for name, *rest in json.loads((folder / MANIFEST).read_text())["headers"]}
    stat = toy.inner.stat()
    assert headers["<csrc>/include/inner.h"][:3] == [stat.st_size, 1, stat.st_ctime_ns]


def test_a_fresh_copy_of_the_tree_hits(counted: Toy) -> None:
    counted.load()
    moved = counted.root / "elsewhere"
    shutil.copytree(counted.csrc, moved)
    counted.csrc = moved
    assert counted.load().value() == 1
    assert counted.compiles() == 1


def test_equal_size_edit_with_equal_mtime_is_noticed(toy: Toy) -> None:
    assert toy.load().value() == 1
    stat = toy.inner.stat()
    toy.inner.write_text("#define TOY_VALUE 2\n")
    os.utime(toy.inner, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert toy.load().value() == 2


@pytest.mark.parametrize("header", ["inner", "outer"])
def test_header_edit_rebuilds(toy: Toy, messages: Messages, header: str) -> None:
    assert toy.load().value() == 1
    path: Path = getattr(toy, header)
    path.write_text("#define TOY_VALUE 2\n")
    assert toy.load().value() == 2
    assert any(f"(csrc/include/{header}.h changed)" in line for line in messages())


def test_going_back_finds_the_older_build(counted: Toy) -> None:
    old = counted.inner.read_text()
    counted.load()
    counted.inner.write_text("#define TOY_VALUE 2\n")
    counted.load()
    counted.inner.write_text(old)
    assert counted.load().value() == 1
    assert counted.compiles() == 2


def test_removed_header_is_a_miss(toy: Toy) -> None:
    toy.load()
    toy.inner.unlink()
    loader = toy.loader()
    found = loader.cache.lookup(loader.plan(MODULE, toy.target()))
    assert found == Miss("csrc/include/inner.h changed")


def test_source_edit_rebuilds(toy: Toy, messages: Messages) -> None:
    toy.load()
    toy.source.write_text(toy.source.read_text().replace("2 * number", "3 * number"))
    assert toy.load().twice(None, 5) == 15
    assert any("(csrc/toy.cpp changed)" in line for line in messages())


def test_flag_edit_rebuilds(toy: Toy, messages: Messages) -> None:
    assert toy.load().extra() == 0
    toy.configure(flags_extra_cc=["-DTOY_EXTRA=7"])
    assert toy.load().extra() == 7
    assert any("(flags changed)" in line for line in messages())


def test_flag_order_matters(toy: Toy) -> None:
    toy.configure(flags_extra_cc=["-UTOY_EXTRA", "-DTOY_EXTRA=7"])
    assert toy.load().extra() == 7
    toy.configure(flags_extra_cc=["-DTOY_EXTRA=7", "-UTOY_EXTRA"])
    assert toy.load().extra() == 0


def test_template_edit_rebuilds(counted: Toy) -> None:
    template = counted.csrc / "toy_template.cpp.jinja"
    text = counted.source.read_text().replace("{{", "{ {").replace("}}", "} }")
    template.write_text(text.replace("PyLong_FromLong(TOY_VALUE)", "PyLong_FromLong({{ number }})"))
    counted.configure(
        srcs=["{{ AITER_CSRC_DIR }}/toy_template.cpp.jinja"], template_args={"number": 5}
    )
    assert counted.load().value() == 5
    assert counted.load().value() == 5
    assert counted.compiles() == 1
    counted.configure(template_args={"number": 6})
    assert counted.load().value() == 6
    template.write_text(template.read_text().replace("{{ number }}", "{{ number * 10 }}"))
    assert counted.load().value() == 60


def test_waves_have_builds_of_their_own(toy: Toy) -> None:
    loader = toy.loader()
    modules = [loader.load(MODULE, toy.target(wave)) for wave in (64, 32)]
    assert [module.lanes() for module in modules] == [64, 32]
    assert len(toy.builds()) == 2


def test_another_abi_is_a_miss(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = toy.loader()
    entry, _ = loader.ensure(MODULE, toy.target())
    monkeypatch.setattr(
        importlib.machinery, "EXTENSION_SUFFIXES", [".cpython-399-x86_64-linux-gnu.so"]
    )
    plan = loader.plan(MODULE, toy.target())
    assert loader.cache.lookup(plan) == Miss("no cached build")
    other, built = loader.ensure(MODULE, toy.target())
    assert built
    assert other.library.name == f"{MODULE}.cpython-399-x86_64-linux-gnu.so"
    assert other.folder.parent.parent != entry.folder.parent.parent


def test_another_level_is_a_miss(toy: Toy) -> None:
    loader = toy.loader()
    loader.ensure(MODULE, toy.target())
    other = type(toy.target())("cpu", ("wave64",), "" if toy.target().cpu_level else "x86-64-v2")
    assert isinstance(loader.cache.lookup(loader.plan(MODULE, other)), Miss)


def test_a_variable_that_the_compiler_reads_is_part_of_the_key(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, messages: Messages
) -> None:
    toy.load()
    monkeypatch.setenv("CPATH", str(toy.root))
    toy.load()
    assert any("(variables changed)" in line for line in messages())


def _truncate(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:1000])


def _empty(library: Path) -> None:
    library.write_bytes(b"")


def _flip(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(bytes(content))


def _foreign(library: Path) -> None:
    library.write_bytes(b"#!/bin/sh\n".ljust(library.stat().st_size, b"\0"))


def _remove(library: Path) -> None:
    library.unlink()


def _manifest(library: Path) -> None:
    (library.parent / MANIFEST).write_text('{"inputs": ')


DAMAGES = [_truncate, _empty, _flip, _foreign, _remove, _manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_build_is_rebuilt(
    toy: Toy, messages: Messages, damage: Callable[[Path], None]
) -> None:
    entry, _ = toy.loader().ensure(MODULE, toy.target())
    damage(entry.library)
    assert toy.load().value() == 1
    assert any(line.startswith(f"damaged build {entry.folder}") for line in messages())
    assert any("(the cached build was damaged)" in line for line in messages())
    assert len(list((toy.cache_dir / BROKEN_DIR).iterdir())) == 1


def test_a_damaged_build_is_an_error_where_building_is_forbidden(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, _ = toy.loader().ensure(MODULE, toy.target())
    _truncate(entry.library)
    monkeypatch.setenv("AITER_NO_BUILD", "1")
    with pytest.raises(CacheError, match="AITER_NO_BUILD.*the cached build was damaged"):
        toy.load()


def test_publishing_twice_keeps_the_intact_build(toy: Toy) -> None:
    loader = toy.loader()
    entry, _ = loader.ensure(MODULE, toy.target())
    before = entry.library.stat().st_ino
    folder = toy.cache_dir / ".build" / "second"
    shutil.copytree(entry.folder, folder)
    plan = loader.plan(MODULE, toy.target())
    headers = [Header(h[0], (h[1], h[2], h[3]), h[4]) for h in entry.manifest["headers"]]
    published = loader.cache.publish(plan, folder, headers, replace=False)
    assert published.folder == entry.folder
    assert published.library.stat().st_ino == before
    replaced = loader.cache.publish(plan, folder, headers, replace=True)
    assert replaced.folder == entry.folder
    assert replaced.library.stat().st_ino != before
    assert isinstance(loader.cache.lookup(plan), Entry)
