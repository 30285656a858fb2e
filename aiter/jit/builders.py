"""Where does a builder work, and what does it leave to others?

Every builder has a private folder inside the cache. Beside it lies a file that is locked while its
builder lives, so that the next builder can remove the folders of those that died: a lock ends with
its process, however that ends, whereas a process id may be another's by then, or another machine's.

The lock per plan, and per text of device code, saves double work and nothing else. It is waited for
with a line in the log, and not for ever; where the filesystem has no locks, the build goes on without.
In a cache that a group shares, whatever one member cannot open or remove of another's is left to those
who can.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from . import envs
from .cache import LOCK_DIR, WORK_DIR, Cache
from .errors import CacheError
from .folders import file_mode
from .full_disk import why_full
from .log import get_logger
from .plan import Plan
from .trust import check_trusted

_LOCK_NOTICES_SECONDS = (2.0, *([30.0] * 60))  # waiting ends, and the build starts, after the last


@contextmanager
def private_folder(cache: Cache) -> Iterator[Path]:
    """A folder of this builder alone, removed at the end unless it was published."""
    name = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        parent = cache.make_folder(WORK_DIR)
        check_trusted(cache.root, (parent,))
        with _alive_file(parent / f"{name}.alive"):
            remove_leftovers(cache)
            folder = cache.make_folder(f"{WORK_DIR}/{name}")
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        full = why_full(error, cache.root)
        raise CacheError(
            f"cache folder {cache.root}: expected to build in it, got"
            f" {full or error.strerror or error} ({error.filename or 'no name'});"
            f"{' make room, or' if full else ''} set AITER_JIT_DIR to a folder that can be written"
        ) from error


@contextmanager
def _alive_file(path: Path) -> Iterator[None]:
    """A file that is locked while this builder lives, and goes with it."""
    with path.open("w") as file:
        # NOTE: whatever the umask, as other members of the group ask it whether this one lives.
        os.fchmod(file.fileno(), file_mode())
        _try_flock(file)
        _alive_files.add(file)
        try:
            yield
        finally:
            _alive_files.discard(file)
            path.unlink(missing_ok=True)


# A forked child closes its copies: it would otherwise make a dead builder look alive.
_alive_files: set[IO[str]] = set()


def _close_alive_files() -> None:
    while _alive_files:
        _alive_files.pop().close()


os.register_at_fork(after_in_child=_close_alive_files)


def dead_builders(cache: Cache) -> list[Path]:
    """The files of builders that died; beside each may lie their folder."""
    dead = []
    for alive in _alive_paths(cache):
        try:
            with alive.open() as file:
                if _try_flock(file):
                    dead.append(alive)
        except OSError:
            continue
    return dead


def remove_leftovers(cache: Cache) -> None:
    """Removes the private folders of builders that died, as far as this user may."""
    for alive in _alive_paths(cache):
        try:
            with alive.open() as file:
                if _try_flock(file):
                    folder = alive.with_suffix("")
                    shutil.rmtree(folder, ignore_errors=True)
                    if not folder.exists():  # NOTE: else it is for its owner to remove.
                        alive.unlink(missing_ok=True)
        except OSError:
            continue


def _alive_paths(cache: Cache) -> list[Path]:
    """The files of builders, living or dead; none where the folder cannot be read."""
    try:
        return sorted((cache.root / WORK_DIR).glob("*.alive"))
    except OSError:
        return []


def _try_flock(file: IO[str]) -> bool:
    """Whether the lock on `file` was free and is ours now; not, where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def plan_lock(cache: Cache, plan: Plan) -> Iterator[None]:
    """Holds the plan's lock, or goes on without it where it cannot be had."""
    name = f"{plan.module}-{plan.place.parent.name}-{plan.key[:16]}"
    with build_lock(cache, name, plan.module):
        yield


@contextmanager
def build_lock(cache: Cache, name: str, what: str) -> Iterator[None]:
    """Holds the lock `name` for building `what`, or goes on without it where it cannot be had."""
    import filelock

    logger = get_logger()
    name = f"{name}.lock"
    mode = 0o660 if envs.AITER_SHARED_CACHE.get() else 0o600
    path = cache.make_folder(LOCK_DIR) / name
    _make_lock_file(path, mode)
    lock = filelock.FileLock(path, mode=mode)
    held = False
    started = time.monotonic()
    for wait in _LOCK_NOTICES_SECONDS:
        try:
            lock.acquire(timeout=wait)
            held = True
            break
        except filelock.Timeout:
            logger.info(
                "waiting for another process that builds %s, for %.0f s now (builders: %s)",
                what,
                time.monotonic() - started,
                _living_builders(cache),
            )
        except (OSError, NotImplementedError) as error:
            logger.warning("building %s without a lock: %s", what, error)
            break
    else:
        waited = time.monotonic() - started
        logger.warning("building %s without the lock after %.0f s", what, waited)
    try:
        yield
    finally:
        if held:
            lock.release()


def _make_lock_file(path: Path, mode: int) -> None:
    """Creates a file with just this mode, whatever the umask; one that is there stays as it is."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode)
    except FileExistsError:
        return
    try:
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def _living_builders(cache: Cache) -> str:
    """The builders in this cache but for the running process, as host-process."""
    names = (path.name.rpartition("-")[0] for path in _alive_paths(cache))
    own = f"{socket.gethostname()}-{os.getpid()}"
    return ", ".join(sorted({name for name in names if name != own})) or "not named"
