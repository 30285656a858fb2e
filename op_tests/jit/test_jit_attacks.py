"""Is what is loaded what was checked, whatever others do meanwhile and wherever the cache lies?

The attacker is another user who owns a folder on the way, or may write to one. Every test but the
first few needs root, who alone can act as two users.
"""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy import MODULE, Toy
from users import ALICE, BOB, OTHERS, as_user, only_root, place_for_all

from aiter.jit import load as load_module
from aiter.jit import trust
from aiter.jit.cache import Entry
from aiter.jit.errors import CacheError, JitError
from aiter.jit.trust import check_trusted, open_cache

RACE_SECONDS = 2.0


def built(toy: Toy, value: int) -> Path:
    """The build of a toy whose `value()` is `value`; its folder."""
    toy.inner.write_text(f"#define TOY_VALUE {value}\n")
    return toy.loader().ensure(MODULE, toy.target())[0].folder


@contextmanager
def racing(step: Callable[[], None]) -> Iterator[None]:
    """Runs `step` again and again in a process of its own, as fast as it can."""
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                step()
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def rename_away_and_back(path: Path) -> None:
    aside = path.with_name(f"{path.name}-aside")
    os.rename(path, aside)
    os.rename(aside, path)


@only_root
def test_foreign_code_is_never_loaded_in_a_race(toy: Toy) -> None:
    """The folder of a module belongs to somebody else, who renames it away and back."""
    module_folder = built(toy, 666).parents[2]
    for path in (module_folder, *module_folder.rglob("*")):
        os.chown(path, ALICE, ALICE)
    results = {"refused": 0, "missing": 0}
    loader = toy.loader()
    plan = loader.plan(MODULE, toy.target())
    with racing(lambda: rename_away_and_back(module_folder)):
        end = time.monotonic() + RACE_SECONDS
        while time.monotonic() < end:
            try:
                found = loader.cache.lookup(plan)
            except CacheError as error:
                assert f"got owner {ALICE}" in str(error)
                results["refused"] += 1
                continue
            assert not isinstance(found, Entry), "a build that belongs to another user was taken"
            results["missing"] += 1
    assert results["refused"] > 20, results


@only_root
@pytest.mark.parametrize("part", ["library", "build", "key"])
def test_what_is_swapped_after_the_check_is_not_loaded(toy: Toy, part: str) -> None:
    """Between the check and the load another file takes the name: it is not what is loaded."""
    good = built(toy, 1)
    loader = toy.loader()
    entry = loader.cache.lookup(loader.plan(MODULE, toy.target()))
    assert isinstance(entry, Entry)
    path = {"library": entry.library, "build": good, "key": good.parent}[part]
    aside = toy.root / "aside"
    path.rename(aside)
    if part == "library":
        path.write_bytes(b"not a library")
    module = load_module.load_extension(MODULE, entry)
    assert module.value() == 1
    assert module.__file__ == str(entry.library)


def test_swapping_builds_while_loads_run_gives_one_or_the_other(toy: Toy) -> None:
    """Our own rebuilds race as well: every load is one whole build, and no raw error comes out."""
    build = built(toy, 1)
    other = toy.root / "other"
    shutil.copytree(build, other)
    seen: set[str] = set()

    def step() -> None:
        aside = build.with_name("aside")
        os.rename(build, aside)
        os.rename(other, build)
        os.rename(aside, other)

    loads = 0
    with racing(step):
        end = time.monotonic() + RACE_SECONDS
        loader = toy.loader()
        plan = loader.plan(MODULE, toy.target())
        while time.monotonic() < end:
            found = loader.cache.lookup(plan)
            if isinstance(found, Entry):
                assert load_module.load_extension(MODULE, found).value() == 1
                loads += 1
            seen.add(type(found).__name__)
    assert loads > 20 and "Entry" in seen


def test_a_build_that_vanishes_anywhere_in_a_lookup_is_a_miss(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of the steps of a lookup, and of a load, another process takes the cache away."""
    built(toy, 1)
    real = os.open
    kept = toy.root / "kept"
    shutil.copytree(toy.cache_dir, kept)
    for step in range(1, 60):
        shutil.rmtree(toy.cache_dir, ignore_errors=True)
        shutil.copytree(kept, toy.cache_dir)
        left = step

        def vanishing(path: object, flags: int, *rest: object, **options: object) -> int:
            nonlocal left
            left -= 1
            if left == 0:
                shutil.rmtree(toy.cache_dir)
            return real(path, flags, *rest, **options)  # type: ignore[arg-type]

        loader = toy.loader()
        plan = loader.plan(MODULE, toy.target())
        monkeypatch.setattr(trust.os, "open", vanishing)
        try:
            loader.cache.lookup(plan)
        finally:
            monkeypatch.undo()
        if left > 0:
            break
    assert step > 8


def test_threads_that_load_while_the_cache_is_cleaned(toy: Toy) -> None:
    """Builds, lookups and removals at once: every load succeeds or is a JitError."""
    built(toy, 1)
    errors: list[BaseException] = []
    values: list[int] = []
    stop = time.monotonic() + RACE_SECONDS

    def load() -> None:
        while time.monotonic() < stop:
            try:
                values.append(toy.load().value())
            except JitError:
                continue
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    while time.monotonic() < stop:
        shutil.rmtree(toy.cache_dir / MODULE, ignore_errors=True)
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert values and set(values) == {1}


# Links and parents.


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of root's that every user can reach."""
    with place_for_all() as folder:
        yield folder


def refusal(root: Path) -> str:
    """What is said of a cache folder; '' if it is accepted."""
    try:
        opened = open_cache(root)
    except CacheError as error:
        return str(error)
    assert opened is not None
    opened.close()
    return ""


def cache_in(folder: Path) -> Path:
    root = folder / "cache"
    root.mkdir(mode=0o700)
    return root


@only_root
def test_a_parent_of_another_user_is_refused(place: Path) -> None:
    parent = place / "parent"
    parent.mkdir(mode=0o755)
    root = cache_in(parent)
    assert refusal(root) == ""
    os.chown(parent, ALICE, ALICE)
    assert f"got {parent} with owner {ALICE}; " in refusal(root)
    parent.chmod(0o1755)
    assert f"got {parent} with owner {ALICE}; " in refusal(root)


@only_root
@pytest.mark.parametrize("deep", [0, 1])
def test_a_parent_that_a_foreign_group_may_write_is_refused(place: Path, deep: int) -> None:
    parent = place / "parent"
    (parent / "between").mkdir(parents=True, mode=0o755)
    root = cache_in((parent, parent / "between")[deep])
    os.chown(parent, 0, OTHERS)
    parent.chmod(0o775)
    assert f"mode 0775, writable by group {OTHERS}; " in refusal(root)
    parent.chmod(0o1775)
    assert refusal(root) == ""
    os.chown(parent, 0, 0)
    parent.chmod(0o775)
    assert refusal(root) == "", "root's group has nobody else in it"


@only_root
@pytest.mark.parametrize(
    ("name", "members", "refused"),
    [("me", [], False), ("me", ["other"], True), ("team", [], True)],
)
def test_a_group_that_has_nobody_else_in_it_is_no_other(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, members: list[str], refused: bool
) -> None:
    """As distributions give one to every user, with a umask that lets it write."""
    parent = place / "parent"
    parent.mkdir()
    root = cache_in(parent)
    os.chown(parent, 0, OTHERS)
    parent.chmod(0o775)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_gid=OTHERS, pw_name="me"))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=name, gr_mem=members))
    assert ("writable by group" in refusal(root)) == refused


@only_root
def test_owners_that_a_sandbox_does_not_map_count_as_roots(place: Path) -> None:
    """In a user namespace with one user in it, root's folders look like everybody's."""
    root = cache_in(place)
    os.chown(root, ALICE, ALICE)

    def in_a_namespace() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, for the next file to be this user's
        if libc.unshare(0x10000000) != 0:  # CLONE_NEWUSER
            raise JitError("no user namespaces here")
        Path("/proc/self/uid_map").write_text(f"{ALICE} {ALICE} 1")
        assert os.stat("/").st_uid not in (0, os.geteuid())
        assert open_cache(root) is not None

    said = as_user(ALICE, [ALICE], in_a_namespace)
    if said == "no user namespaces here":
        pytest.skip(said)
    assert said == ""


@only_root
def test_the_group_of_a_shared_cache_may_write_above_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = place / "parent"
    parent.mkdir()
    os.chown(parent, 0, OTHERS)
    parent.chmod(0o2775)
    root = cache_in(parent)
    os.chown(root, 0, OTHERS)
    root.chmod(0o2770)
    monkeypatch.setattr(os, "getgroups", lambda: [OTHERS])
    assert "writable by group" in refusal(root)
    monkeypatch.setenv("AITER_SHARED_CACHE", "1")
    assert refusal(root) == ""
    os.chown(parent, 0, BOB)
    parent.chmod(0o2775)
    assert f"writable by group {BOB}" in refusal(root)


@only_root
def test_a_link_in_a_folder_that_everybody_may_write(place: Path) -> None:
    """Where the link can be swapped, it does not matter that what it leads to is in order."""
    open_to_all = place / "open"
    open_to_all.mkdir()
    real = cache_in(place)
    link = open_to_all / "link"
    link.symlink_to(real)
    open_to_all.chmod(0o777)
    assert f"got {open_to_all} with mode 0777, writable by everyone" in refusal(link)
    open_to_all.chmod(0o1777)
    assert refusal(link) == ""
    os.chown(link, ALICE, ALICE, follow_symlinks=False)
    assert f"got {link} with owner {ALICE}" in refusal(link)


@only_root
def test_a_link_in_the_middle_and_what_it_leads_to(place: Path) -> None:
    """Every component counts: of the path as given and of what its links lead to."""
    (place / "target").mkdir()
    root = cache_in(place / "target")
    (place / "first").symlink_to("second/../second")
    (place / "second").symlink_to(place / "target")
    given = place / "first" / "cache"
    assert refusal(given) == ""
    os.chown(place / "second", ALICE, ALICE, follow_symlinks=False)
    assert f"got {place / 'second'} with owner {ALICE}" in refusal(given)
    os.chown(place / "second", 0, 0, follow_symlinks=False)
    os.chown(place / "target", ALICE, ALICE)
    assert f"got {place / 'target'} with owner {ALICE}" in refusal(given)
    os.chown(place / "target", 0, 0)
    root.chmod(0o770)
    os.chown(root, 0, OTHERS)
    assert f"writable by group {OTHERS}" in refusal(given)


def test_links_without_an_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "got links without an end" in refusal(tmp_path / "a")


@only_root
def test_swapping_a_link_while_loads_run_loads_nothing_foreign(toy: Toy, place: Path) -> None:
    """The link lies where everybody may write: it is refused each time, and never followed."""
    built(toy, 666)
    foreign = place / "foreign"
    shutil.copytree(toy.cache_dir, foreign)
    for path in (foreign, *foreign.rglob("*")):
        os.chown(path, ALICE, ALICE)
    own = place / "own"
    own.mkdir(mode=0o700)
    everybody = place / "everybody"
    everybody.mkdir()
    everybody.chmod(0o777)
    link, spare = everybody / "link", everybody / "spare"
    link.symlink_to(own)

    def step() -> None:
        for target in (foreign, own):
            spare.symlink_to(target)
            os.rename(spare, link)

    plan = toy.loader().plan(MODULE, toy.target())
    toy.cache_dir = link
    cache = toy.loader().cache
    with racing(step):
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            with pytest.raises(CacheError, match="expected"):
                cache.lookup(plan)


def test_a_check_of_several_paths_does_not_end_at_the_first_that_is_missing(tmp_path: Path) -> None:
    root = cache_in(tmp_path)
    (root / "open").mkdir()
    (root / "open").chmod(0o777)
    with pytest.raises(CacheError, match="writable by everyone"):
        check_trusted(root, (root / "missing", root / "missing" / "deep", root / "open"))


def test_a_named_pipe_in_a_build_is_not_waited_for(toy: Toy) -> None:
    library = next(built(toy, 1).glob("*.so"))
    library.unlink()
    os.mkfifo(library, 0o600)
    assert toy.load().value() == 1


def test_loads_go_by_content_and_not_by_the_name_of_a_descriptor(toy: Toy) -> None:
    """Descriptors are used again, and the linker takes a library for loaded by its name alone."""
    for value in range(1, 4):
        built(toy, value)
        module = toy.load()
        assert module.value() == value
        name = f"/proc/{os.getpid()}/fd/"
        assert not module.__file__.startswith(name) and not module.__spec__.origin.startswith(name)
    assert toy.load() is module


def test_a_machine_without_proc_is_told(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.readlink

    def missing(path: str, **options: int) -> str:
        if path == "/proc/self":
            raise FileNotFoundError(2, "No such file or directory", path)
        return real(path, **options)

    built(toy, 7)
    monkeypatch.setattr(load_module.os, "readlink", missing)
    with pytest.raises(JitError, match="expected /proc to be mounted"):
        toy.load()
