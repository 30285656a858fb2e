"""Does a cache that a group shares work whatever the members' umask, and whoever of them dies?"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock  # noqa: F401
import pytest
from processes import wait_for
from toy import MODULE, Toy
from users import ALICE, BOB, OTHERS, TEAM, as_user, only_root, place_for_all

# NOTE: all of the loader is imported here, as other users may not read where Python itself lies.
import aiter.jit.build  # noqa: F401
from aiter.jit import compilers, toolchain
from aiter.jit.builders import dead_builders, private_folder
from aiter.jit.cache import Cache
from aiter.jit.compilers import compiler_version, find_compiler

pytestmark = only_root


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    """A toy tree that all can read, with a cache folder that TEAM shares."""
    with place_for_all() as place:
        toy = Toy(place / "toy")
        for path in (toy.root, *toy.root.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        toy.cache_dir.mkdir()
        os.chown(toy.cache_dir, ALICE, TEAM)
        toy.cache_dir.chmod(0o2770)
        # NOTE: as headers of a virtual environment in a folder that is root's alone are not theirs.
        for module, name in ((toolchain, "python_include"), (compilers, "pybind11_include")):
            headers = place / name
            shutil.copytree(getattr(module, name)(), headers)
            for path in (headers, *headers.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            monkeypatch.setattr(module, name, lambda headers=headers: headers)
        monkeypatch.setenv("AITER_SHARED_CACHE", "1")
        monkeypatch.setenv("CXX", shutil.which("g++") or "")
        yield toy


def load(toy: Toy) -> None:
    assert toy.load().value() == 1


def alice(body: Callable[[], object], umask: int = 0o077) -> str:
    return as_user(ALICE, [TEAM], body, umask)


def bob(body: Callable[[], object], umask: int = 0o077) -> str:
    return as_user(BOB, [OTHERS, TEAM], body, umask)


def test_every_file_is_the_groups_whatever_the_umask(
    team: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert alice(lambda: load(team)) == ""
    paths = list(team.cache_dir.rglob("*"))
    assert {".compilers", ".locks", "CACHEDIR.TAG", "manifest.json", "build.log"} <= {
        path.name for path in paths
    }
    for path in paths:
        status = path.stat()
        assert status.st_gid == TEAM, path
        wanted = 0o2770 if path.is_dir() else 0o640
        assert stat.S_IMODE(status.st_mode) & wanted == wanted, (path, oct(status.st_mode))
    monkeypatch.setenv("AITER_NO_BUILD", "1")
    assert bob(lambda: load(team)) == ""


def test_members_build_by_turns(team: Toy) -> None:
    assert alice(lambda: load(team)) == ""
    team.inner.write_text("#define TOY_VALUE 1 \n")
    assert bob(lambda: load(team)) == ""
    team.inner.write_text("#define TOY_VALUE 1  \n")
    assert alice(lambda: load(team)) == ""
    assert len(team.builds()) == 3


def test_the_versions_of_compilers_are_kept_for_all(team: Toy) -> None:
    compiler = find_compiler("cpu")
    memo_dir = team.cache_dir / ".compilers"
    assert alice(lambda: compiler_version(compiler, memo_dir, {})) == ""
    (memo,) = memo_dir.iterdir()
    before = memo.stat().st_ino
    assert bob(lambda: compiler_version(compiler, memo_dir, {})) == ""
    assert memo.stat().st_ino == before


def test_what_a_member_cannot_read_is_passed_over(team: Toy) -> None:
    assert alice(lambda: load(team)) == ""
    (build,) = team.builds()
    for path in (build / "manifest.json", next(build.glob("*.so")), build):
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode & ~0o077)

        def look(path: Path = path) -> None:
            loader = team.loader()
            found = loader.cache.lookup(loader.plan(MODULE, team.target()))
            assert not hasattr(found, "manifest"), path
            load(team)

        assert bob(look) == ""
        if path.exists():
            path.chmod(mode)
        shutil.rmtree(team.cache_dir / MODULE)
        assert alice(lambda: load(team)) == ""
        (build,) = team.builds()


def die_in_a_build(cache: Cache) -> None:
    """Leaves what a killed builder leaves, with a folder inside that is for its owner alone."""
    with private_folder(cache) as folder:
        (folder / "half.o").write_text("half")
        (folder / "inner").mkdir(mode=0o700)
        (folder / "inner" / "half.o").write_text("half")
        os._exit(0)


def test_a_member_killed_in_a_build_blocks_nobody(team: Toy) -> None:
    cache = team.loader().cache
    assert alice(lambda: die_in_a_build(cache)) == ""
    (alive,) = (team.cache_dir / ".build").glob("*.alive")
    assert stat.S_IMODE(alive.stat().st_mode) == 0o640
    assert bob(lambda: load(team)) == ""
    assert len(team.builds()) == 1
    assert alice(lambda: team.loader().ensure(MODULE, team.target(), force=True)) == ""
    assert list((team.cache_dir / ".build").iterdir()) == []


def test_a_member_killed_with_a_private_umask_from_before_blocks_nobody(team: Toy) -> None:
    """What an older builder left for its owner alone cannot be opened by others: passed over."""
    cache = team.loader().cache
    assert alice(lambda: die_in_a_build(cache)) == ""
    (alive,) = (team.cache_dir / ".build").glob("*.alive")
    alive.chmod(0o600)
    assert bob(lambda: load(team)) == ""
    assert bob(lambda: dead_builders(cache)) == ""
    assert alive.exists()


def test_a_member_who_is_killed_while_another_waits(
    team: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = team.compiler_wrapper()
    wrapper.chmod(0o755)
    team.compiles_log.touch()
    team.compiles_log.chmod(0o666)
    monkeypatch.setenv("CXX", str(wrapper))
    team.hold.touch()
    pid = os.fork()
    if pid == 0:
        try:
            alice(lambda: load(team))
        finally:
            os._exit(0)
    wait_for(lambda: team.compiles() == 1)
    builder = next((team.cache_dir / ".build").glob("*.alive")).stem.split("-")[-2]
    os.kill(int(builder), 9)
    os.waitpid(pid, 0)
    team.hold.unlink()
    assert bob(lambda: load(team)) == ""
    assert team.compiles() == 2
