"""Is nothing loaded that somebody else could have written?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy import MODULE, Toy
from users import ALICE, BOB, OTHERS, TEAM, as_user, only_root, place_for_all

from aiter.jit.cache import Cache
from aiter.jit.errors import CacheError
from aiter.jit.folders import write_atomically
from aiter.jit.trust import open_cache


def parts(toy: Toy) -> dict[str, Path]:
    """The paths that lead to the shared object of the only build, by what they are."""
    (folder,) = toy.builds()
    return {
        "cache": toy.cache_dir,
        "module": folder.parents[2],
        "target": folder.parents[1],
        "key": folder.parent,
        "build": folder,
        "library": next(folder.glob("*.so")),
        "manifest": folder / "manifest.json",
    }


PARTS = ("cache", "module", "target", "key", "build", "library", "manifest")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("bits", "who"), [(0o002, "everyone"), (0o020, "group")])
def test_what_others_may_write_is_refused(toy: Toy, part: str, bits: int, who: str) -> None:
    toy.load()
    path = parts(toy)[part]
    mode = path.stat().st_mode & 0o777
    path.chmod(mode | bits)
    with pytest.raises(CacheError, match=f"expected {path} to be .*writable by {who}.*chmod -R"):
        toy.load()
    path.chmod(mode)
    assert toy.load().value() == 1


@only_root
@pytest.mark.parametrize("part", PARTS)
def test_what_belongs_to_others_is_refused(toy: Toy, part: str) -> None:
    toy.load()
    path = parts(toy)[part]
    os.chown(path, ALICE, -1)
    with pytest.raises(CacheError, match=f"expected {path} to be .* got owner {ALICE};.*AITER_JIT"):
        toy.load()


@pytest.mark.parametrize("part", ["module", "build", "library", "manifest"])
def test_links_are_refused(toy: Toy, part: str) -> None:
    toy.load()
    path = parts(toy)[part]
    aside = toy.root / "aside"
    path.rename(aside)
    path.symlink_to(aside)
    with pytest.raises(CacheError, match="got a symbolic link"):
        toy.load()


def test_a_cache_folder_that_is_a_link_is_followed(toy: Toy) -> None:
    (toy.root / "real").mkdir(mode=0o700)
    toy.cache_dir.symlink_to(toy.root / "real")
    assert toy.load().value() == 1
    (toy.root / "real").chmod(0o777)
    with pytest.raises(CacheError, match="writable by everyone"):
        toy.load()


def test_a_folder_above_that_everyone_may_write_is_refused(toy: Toy) -> None:
    toy.load()
    toy.root.chmod(0o777)
    with pytest.raises(
        CacheError, match=f"expected no folder above it .* got {toy.root} with mode"
    ):
        toy.load()
    toy.root.chmod(0o1777)
    assert toy.load().value() == 1


def test_nothing_is_built_where_others_may_write(counted: Toy) -> None:
    counted.cache_dir.mkdir(mode=0o700)
    counted.cache_dir.chmod(0o777)
    with pytest.raises(CacheError, match="writable by everyone"):
        counted.load()
    assert counted.compiles() == 0


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_is_published_is_trusted_whatever_the_umask(toy: Toy, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert toy.load().value() == 1
        assert toy.load().value() == 1
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o077 for path in parts(toy).values()}
    assert modes == {0}


@pytest.fixture
def shared_place() -> Iterator[Path]:
    """A folder that every user can reach."""
    with place_for_all() as place:
        yield place


def publish(cache: Cache, name: str) -> None:
    """Leaves something that looks like a build."""
    folder = cache.make_folder(Path(MODULE, "target", "key", name))
    write_atomically(folder / "manifest.json", "{}")


def check_build(root: Path, folder: Path) -> None:
    """Raises CacheError if others may write to the folder, to its files or above them."""
    cache = open_cache(root)
    opened = cache.descend(folder.relative_to(root).parts) if cache is not None else None
    assert opened is not None
    opened.check_contents()


@only_root
def test_two_users_of_one_folder(shared_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shared_place / "cache"
    root.mkdir()
    os.chown(root, ALICE, TEAM)
    root.chmod(0o2770)
    cache = Cache(root)
    build = root / MODULE / "target" / "key" / "first"
    monkeypatch.setenv("AITER_SHARED_CACHE", "1")
    assert as_user(ALICE, [TEAM], lambda: publish(cache, "first")) == ""
    assert build.stat().st_mode & 0o7777 == 0o2770
    assert as_user(BOB, [OTHERS, TEAM], lambda: check_build(root, build)) == ""
    assert as_user(BOB, [OTHERS, TEAM], lambda: publish(cache, "second")) == ""
    assert as_user(ALICE, [TEAM], lambda: check_build(root, build.with_name("second"))) == ""
    os.chown(build / "manifest.json", BOB, OTHERS)
    refused = as_user(ALICE, [TEAM], lambda: check_build(root, build))
    assert f"got owner {BOB}" in refused
    monkeypatch.delenv("AITER_SHARED_CACHE")
    second = build.with_name("second")
    assert "AITER_SHARED_CACHE=1 trusts" in as_user(
        ALICE, [TEAM], lambda: check_build(root, second)
    )


@only_root
def test_a_group_that_one_is_not_in(shared_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shared_place / "cache"
    root.mkdir()
    os.chown(root, BOB, TEAM)
    monkeypatch.setenv("AITER_SHARED_CACHE", "1")
    refused = as_user(BOB, [OTHERS], lambda: check_build(root, root))
    assert f"expected a group of this process ({OTHERS})" in refused
    assert f"got group {TEAM}; `chgrp`" in refused
