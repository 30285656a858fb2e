"""Which folders above a cache, and which links on the way to it, are trusted?

The attacker is another user who owns a folder on the way, or may write to one. Most tests need root,
who alone can act as two users.
"""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from racing import built, cache_in, racing
from toy import MODULE, Toy
from users import ALICE, BOB, OTHERS, as_user, only_root, place_for_all

from aiter.jit.errors import CacheError, JitError
from aiter.jit.trust import open_cache

RACE_SECONDS = 2.0


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
