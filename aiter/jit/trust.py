"""Who could have put that into the cache folder, and is what is loaded what was looked at?

A shared object runs with all rights of the process that loads it, and a hash beside it proves
nothing to whoever can write both. So nothing is loaded from a folder or file that somebody else may
write to: the cache folder, every folder from there to a build, the shared object and its manifest
must belong to this user or to root, with no write permission for others, and not be links.

Above the cache folder every component counts, of the path as given and of what its links lead to:
whoever owns a folder, or may write to it, can put another one in the place of what lies in it. So
each belongs to this user or root, and is writable by nobody else unless it is sticky, as /tmp is.
Links above are followed if they belong to this user or root as well. A group that has nobody but
this user in it, as distributions give to everyone, is no other.

With AITER_SHARED_CACHE the group of the cache folder is trusted as well: what carries that group
may be written by it and belong to any of its members. The group has to be one of this process's.

No name is looked up twice. The path is walked from `/` on with a descriptor per component, each is
judged by `fstat` on that descriptor, and what is read or loaded is what was opened. A name that
vanishes on the way is a miss and says nothing about the rest. Rejected: checking paths and loading by
path afterwards. In a loop of 20 s in which the owner of a folder on the way renamed it away and back,
that loaded their code 288 times.

What is not trusted is an error and never a reason to rebuild in silence: a cache that others can
write to stays open to them after the rebuild. Checking only when the folder is created was
rejected, as the folder may be older than this package.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from . import envs
from .errors import CacheError

_MOST_LINKS = 40  # as in the kernel
_UNMAPPED = Path("/proc/sys/kernel/overflowuid")
_UID_MAP = Path("/proc/self/uid_map")

_Groups = dict[int, tuple[Path, os.stat_result]]  # who may write to a folder, and to which


class Opened:
    """Something that is open, and goes by its descriptor.

    Args:
        path: what it was called when it was opened, for messages.
        fd: the descriptor, closed with this object.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    def close(self) -> None:
        """Closes the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class File(Opened):
    """An open file."""

    def read(self) -> bytes:
        """All of it."""
        with open(os.dup(self.fd), "rb") as file:
            file.seek(0)
            return file.read()


class _Rules(NamedTuple):
    """Whom a cache folder trusts: this user, root, and the group if there is one."""

    root: Path
    group: int | None


class Folder(Opened):
    """An open folder.

    Args:
        rules: what is asked of everything that is opened in it; None for nothing.
    """

    def __init__(self, path: Path, fd: int, rules: _Rules | None) -> None:
        super().__init__(path, fd)
        self._rules = rules

    def __enter__(self) -> Folder:
        return self

    def names(self) -> list[str]:
        """What is in it, sorted."""
        return sorted(os.listdir(self.fd))

    def folder(self, name: str) -> Folder | None:
        """The folder `name` in it; None if there is none. Raises CacheError, PermissionError."""
        fd = self._open(name, os.O_DIRECTORY)
        return None if fd is None else Folder(self.path / name, fd, self._rules)

    def file(self, name: str) -> File | None:
        """The file `name` in it; None if there is none. Raises CacheError, PermissionError."""
        # NOTE: without O_NONBLOCK a named pipe would be waited for.
        fd = self._open(name, os.O_NONBLOCK)
        if fd is not None and not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            return None
        return None if fd is None else File(self.path / name, fd)

    def descend(self, names: Iterable[str]) -> Folder | None:
        """The folder that `names` lead to; None where one is missing."""
        current: Folder | None = self
        for name in names:
            below = current.folder(name) if current is not None else None
            if current is not None and current is not self:
                current.close()
            current = below
        return current

    def holds(self, name: str, opened: Opened) -> bool:
        """Whether `name` still leads to what was opened."""
        try:
            now = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(now, os.fstat(opened.fd))

    def check_contents(self) -> None:
        """Raises CacheError if others could have written anything that lies in it."""
        for name in self.names():
            self._check_name(name)

    def _open(self, name: str, flags: int) -> int | None:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=self.fd)
        except OSError as error:
            # NOTE: nothing is opened, so this look by name decides no more than what to say.
            self._check_name(name)
            if isinstance(error, PermissionError):
                raise
            return None
        try:
            self._check(name, os.fstat(fd))
        except CacheError:
            os.close(fd)
            raise
        return fd

    def _check_name(self, name: str) -> None:
        try:
            status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except OSError:
            return
        self._check(name, status)

    def _check(self, name: str, status: os.stat_result) -> None:
        if self._rules is not None:
            _check_own(self._rules, self.path / name, status)


def open_cache(root: Path) -> Folder | None:
    """The cache folder, opened and judged; None if it does not exist.

    Raises CacheError if others could put something there, or if it cannot be read.
    """
    groups: _Groups = {}
    walked = _walk(root, groups)
    if walked is None:
        return None
    path, link = walked
    try:
        shared = _shared_group(root, os.fstat(link))
        for gid, (folder, status) in groups.items():
            if gid != shared and not _is_group_of_one(gid):
                mode = stat.S_IMODE(status.st_mode)
                raise _replaceable(root, folder, f"mode {mode:04o}, writable by group {gid}")
        rules = _Rules(root, shared)
        _check_own(rules, path, os.fstat(link))
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=link)
    except OSError as error:
        raise _unusable(root, path, error) from None
    finally:
        os.close(link)
    return Folder(root, fd, rules)


def open_any(path: Path) -> Folder | None:
    """A folder of which nothing is asked; None if there is none that can be read."""
    try:
        return Folder(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), None)
    except OSError:
        return None


def check_trusted(root: Path, paths: Iterable[Path]) -> None:
    """Raises CacheError unless the cache folder `root` and `paths` in it are ours to load from.

    What does not exist is left out: there is nothing to load then. For what is read afterwards;
    what is loaded is opened through `open_cache`.
    """
    cache = open_cache(root)
    if cache is None:
        return
    with cache:
        for path in paths:
            *above, name = path.relative_to(root).parts or (".",)
            folder = cache.descend(above)
            if folder is not None:
                folder._check_name(name)


def read_trusted(root: Path, names: Iterable[str]) -> bytes | None:
    """The file that `names` lead to in the cache folder, judged as it was opened; None for none.

    Raises CacheError as `open_cache` does, PermissionError if the file cannot be read.
    """
    *above, name = names
    cache = open_cache(root)
    if cache is None:
        return None
    with cache:
        folder = cache.descend(above)
        file = folder.file(name) if folder is not None else None
        return None if file is None else file.read()


def _walk(root: Path, groups: _Groups) -> tuple[Path, int] | None:
    """Where the path leads, and a descriptor of it; every component above it is judged.

    Adds to `groups` those that may write to a component, with the first such one.
    """
    # NOTE: ".." stays as it is, since behind a link it leads elsewhere than its text says.
    waiting = list(reversed((root if root.is_absolute() else Path.cwd() / root).parts[1:]))
    where, fd, links = Path("/"), _open_path("/", None), 0
    try:
        while waiting:
            status = os.fstat(fd)
            if _check_above(root, where, status):
                groups.setdefault(status.st_gid, (where, status))
            name = waiting.pop()
            try:
                below = _open_path(name, fd)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                raise _unusable(root, where / name, error) from None
            status = os.fstat(below)
            if not stat.S_ISLNK(status.st_mode):
                os.close(fd)
                where, fd = where / name if name != ".." else where.parent, below
                continue
            target = os.readlink("", dir_fd=below)
            os.close(below)
            _check_link(root, where / name, status)
            links += 1
            if links > _MOST_LINKS:
                raise CacheError(f"cache folder {root}: expected a path, got links without an end")
            parts = Path(target).parts
            if target.startswith("/"):
                os.close(fd)
                where, fd = Path("/"), _open_path("/", None)
                parts = parts[1:]
            waiting += reversed(parts)
        found, fd = fd, -1
        return where, found
    finally:
        if fd >= 0:
            os.close(fd)


def _open_path(name: str, folder: int | None) -> int:
    return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)


def _unusable(root: Path, path: Path, error: OSError) -> CacheError:
    return CacheError(
        f"cache folder {root}: expected a folder that this user can read, got {error.strerror}"
        f" ({path}); set AITER_JIT_DIR to a folder of your own"
    )


def _shared_group(root: Path, status: os.stat_result) -> int | None:
    """The id of the group that is trusted; None without AITER_SHARED_CACHE."""
    if not envs.AITER_SHARED_CACHE.get():
        return None
    own = {os.getegid(), *os.getgroups()}
    if status.st_gid not in own:
        raise CacheError(
            f"cache folder {root}: expected a group of this process ({_listed(own)}), since"
            f" AITER_SHARED_CACHE trusts it, got group {status.st_gid}; `chgrp` the folder, or unset"
            " AITER_SHARED_CACHE"
        )
    return status.st_gid


def _check_above(root: Path, folder: Path, status: os.stat_result) -> bool:
    """Raises CacheError if others could put another folder in the place of what lies in this one.

    True if its group could, which remains to be judged.
    """
    if not stat.S_ISDIR(status.st_mode):
        return False  # NOTE: nothing lies in it, which whoever wants to build there is told.
    mode = stat.S_IMODE(status.st_mode)
    if not _is_own(status.st_uid):
        raise _replaceable(root, folder, f"owner {status.st_uid}")
    if mode & stat.S_ISVTX:
        return False
    if mode & stat.S_IWOTH:
        raise _replaceable(root, folder, f"mode {mode:04o}, writable by everyone")
    return bool(mode & stat.S_IWGRP)


def _replaceable(root: Path, folder: Path, got: str) -> CacheError:
    return CacheError(
        f"cache folder {root}: expected no folder above it in which others may replace it, got"
        f" {folder} with {got}; `chown` it or `chmod go-w {folder}`, or set AITER_JIT_DIR to a folder"
        " elsewhere"
    )


def _check_link(root: Path, link: Path, status: os.stat_result) -> None:
    if not _is_own(status.st_uid):
        raise CacheError(
            f"cache folder {root}: expected links of this user or root on the way, got {link} with"
            f" owner {status.st_uid}; set AITER_JIT_DIR to where it should lead"
        )


def _check_own(rules: _Rules, path: Path, status: os.stat_result) -> None:
    """Raises CacheError unless nobody but those who are trusted could have written `path`."""
    mode = stat.S_IMODE(status.st_mode)
    shared = rules.group is not None and status.st_gid == rules.group
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
            f"cache folder {rules.root}: expected {path} to be writable by nobody but user"
            f" {os.geteuid()} and root, got {got}; if its contents are yours, `chmod -R go-w` or"
            " `chown -R` the folder, else remove it or set AITER_JIT_DIR to a folder of your own;"
            " AITER_SHARED_CACHE=1 trusts the folder's group"
        )


def _is_own(owner: int) -> bool:
    """Whether a folder or link above the cache belongs to this user or root.

    NOTE: where a user namespace maps neither, as in sandboxes, the kernel shows the same number for
    root and for all others; who made the sandbox saw to what is in it.
    """
    if owner in (os.geteuid(), 0):
        return True
    try:
        unmapped = int(_UNMAPPED.read_text())
        ranges = [tuple(map(int, line.split())) for line in _UID_MAP.read_text().splitlines()]
    except (OSError, ValueError):
        return False
    mapped = any(first <= owner < first + count for first, _, count in ranges)
    return owner == unmapped and not mapped


def _is_group_of_one(gid: int) -> bool:
    """Whether a group is root's, or has nobody in it but this user."""
    if gid == 0:
        return True
    # NOTE: imported late, as they are asked about few folders, and over the network at worst.
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == user.pw_gid and user.pw_name == group.gr_name and not group.gr_mem


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
