"""Who could have put that into the cache folder?

A shared object runs with all rights of the process that loads it, and a hash beside it proves
nothing to whoever can write both. So nothing is loaded from a folder or file that somebody else may
write to: the cache folder, every folder from there to a build, the shared object and its manifest
must belong to this user or to root, with no write permission for others, and not be links. Above
the cache folder, no folder may be writable by everyone unless it is sticky, as /tmp is.

With AITER_SHARED_CACHE the group of the cache folder is trusted as well: what carries that group
may be written by it and belong to any of its members. The group has to be one of this process's.

What is not trusted is an error and never a reason to rebuild in silence: a cache that others can
write to stays open to them after the rebuild. Checking only when the folder is created was
rejected, as the folder may be older than this package.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from . import envs
from .errors import CacheError


def check_trusted(root: Path, paths: Iterable[Path]) -> None:
    """Raises CacheError unless the cache folder `root` and `paths` in it are ours to load from.

    What does not exist is left out: there is nothing to load then.
    """
    try:
        group = _shared_group(root)
        for ancestor in Path(os.path.realpath(root)).parents:
            _check_ancestor(root, ancestor)
        _check(root, Path(os.path.realpath(root)), group)
        for path in paths:
            _check(root, path, group)
    except FileNotFoundError:
        return


def _shared_group(root: Path) -> int | None:
    """The id of the group that is trusted; None without AITER_SHARED_CACHE."""
    if not envs.AITER_SHARED_CACHE.get():
        return None
    group = root.stat().st_gid
    own = {os.getegid(), *os.getgroups()}
    if group not in own:
        raise CacheError(
            f"cache folder {root}: expected a group of this process ({_listed(own)}), since"
            f" AITER_SHARED_CACHE trusts it, got group {group}; `chgrp` the folder, or unset"
            " AITER_SHARED_CACHE"
        )
    return group


def _check_ancestor(root: Path, folder: Path) -> None:
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise CacheError(
            f"cache folder {root}: expected no folder above it that everyone may replace it in, got"
            f" {folder} with mode {stat.S_IMODE(mode):04o}; `chmod o-w {folder}`, or set"
            " AITER_JIT_DIR to a folder elsewhere"
        )


def _check(root: Path, path: Path, group: int | None) -> None:
    status = path.lstat()
    mode = stat.S_IMODE(status.st_mode)
    shared = group is not None and status.st_gid == group
    got = ""
    if stat.S_ISLNK(status.st_mode):
        got = "a symbolic link"
    elif status.st_uid not in (os.geteuid(), 0) and not shared:
        got = f"owner {status.st_uid}"
    elif mode & stat.S_IWOTH:
        got = f"mode {mode:04o}, writable by everyone"
    elif mode & stat.S_IWGRP and not shared:
        got = f"mode {mode:04o}, writable by group {status.st_gid}"
    if got:
        raise CacheError(
            f"cache folder {root}: expected {path} to be writable by nobody but user"
            f" {os.geteuid()} and root, got {got}; if its contents are yours, `chmod -R go-w` or"
            " `chown -R` the folder, else remove it or set AITER_JIT_DIR to a folder of your own;"
            " AITER_SHARED_CACHE=1 trusts the folder's group"
        )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
