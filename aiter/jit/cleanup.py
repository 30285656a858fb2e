"""What in the cache folder is ours to remove?

AITER_JIT_DIR may lead to a folder that holds anything else: a home, a scratch disk, $XDG_CACHE_HOME.
So nothing is removed from a folder that has not our mark (`folders`), unless there is nothing in it
but what we leave. In a marked one, what is ours has a name and a place that only we give:

    <module>/<target>/<16 digits>/<16 digits>/manifest.json   a build
    .build/<name>.alive and the folder .build/<name>          of a builder, ours once it is dead
    .broken/<module>-<process>-<8 digits>                     a build that was moved aside
    .failed/<name>.log                                        of a failed build
    .device_code/<source>/<architecture>/<key>.s              device code as text
    .compilers/<name>-<16 digits>.json, .zig                  only with everything

Links are not followed. Rejected: to take what lies as deep as a build for a damaged one, which is how
other people's files went.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .builders import dead_builders, remove_leftovers
from .cache import (
    BROKEN_DIR,
    COMPILER_DIR,
    DEVICE_CODE_DIR,
    FAILED_DIR,
    LOCK_DIR,
    TOOL_DIR,
    TUNED_DIR,
    WORK_DIR,
    Cache,
)
from .errors import CacheError
from .folders import MARKER, is_marked
from .manifest import MANIFEST, Entry, is_build_name

_OWN = {
    BROKEN_DIR,
    COMPILER_DIR,
    DEVICE_CODE_DIR,
    FAILED_DIR,
    LOCK_DIR,
    TOOL_DIR,
    TUNED_DIR,
    WORK_DIR,
}
_SUFFIX = r"(\.\d+-[0-9a-f]{8})?"  # of a file whose writer was killed


@dataclass(frozen=True)
class Removable:
    """Something of ours, and why it is to go."""

    path: Path
    reason: str
    is_build: bool = False


def check_is_cache(root: Path) -> None:
    """Raises CacheError unless `root` is marked, or holds nothing but what we leave."""
    if is_marked(root):
        return
    foreign = next(_foreign(root), None)
    if foreign is not None:
        raise CacheError(
            f"cache folder {root}: expected the mark of a cache in it ({MARKER}), or nothing that is"
            f" not a build, got {foreign}; nothing was removed; set AITER_JIT_DIR to a folder that"
            " holds nothing else, or remove the builds by hand"
        )


def removable(
    cache: Cache, everything: bool, why: Callable[[Entry | None], str | None]
) -> list[Removable]:
    """What is to go from the cache folder, builds first.

    Args:
        everything: all builds, and what is kept about compilers.
        why: the reason why a build goes; None if it stays.
    """
    found = []
    for entry, folder in cache.entries():
        reason = "as everything" if everything else why(entry)
        if reason is not None:
            found.append(Removable(folder, reason, True))
    root = cache.root
    found += [
        Removable(path, "left by a builder that died")
        for alive in dead_builders(cache)
        for path in (alive, alive.with_suffix(""))
        if os.path.lexists(path)
    ]
    kinds = [
        (BROKEN_DIR, r".+-\d+-[0-9a-f]{8}", 1, "moved aside as damaged"),
        (FAILED_DIR, rf".+\.log{_SUFFIX}", 1, "log of a failed build"),
        (DEVICE_CODE_DIR, rf".+\.s{_SUFFIX}", 3, "text of device code"),
    ]
    if everything:
        kinds.append(
            (COMPILER_DIR, rf".+-[0-9a-f]{{16}}\.json{_SUFFIX}", 1, "version of a compiler")
        )
    for name, pattern, depth, reason in kinds:
        paths = _at_depth(root / name, depth) if not os.path.islink(root / name) else []
        found += [Removable(path, reason) for path in paths if re.fullmatch(pattern, path.name)]
    if everything and _is_folder(root / TOOL_DIR):
        found.append(Removable(root / TOOL_DIR, "the compiler's own library"))
    return found


def remove(cache: Cache, items: list[Removable]) -> None:
    """Removes what `removable` found, and the folders that are empty then; raises CacheError."""
    remove_leftovers(cache)
    for item in items:
        try:
            if _is_folder(item.path):
                shutil.rmtree(item.path)
            else:
                item.path.unlink(missing_ok=True)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CacheError(
                f"cache folder {cache.root}: expected to remove {error.filename or item.path}, got"
                f" {error.strerror}"
            ) from None
    for item in items:
        for parent in item.path.parents:
            if cache.root not in parent.parents or not _rmdir(parent):
                break


def _rmdir(folder: Path) -> bool:
    """Removes an empty folder; whether it was one."""
    try:
        folder.rmdir()
    except OSError:
        return not folder.exists()
    return True


def _at_depth(folder: Path, depth: int) -> list[Path]:
    """What lies `depth` levels below a folder, links left out; nothing if it cannot be read."""
    try:
        with os.scandir(folder) as items:
            found = [item for item in items if not item.is_symlink()]
    except OSError:
        return []
    if depth == 1:
        return sorted(Path(item.path) for item in found)
    inner = [Path(item.path) for item in found if item.is_dir()]
    return [path for below in sorted(inner) for path in _at_depth(below, depth - 1)]


def _foreign(root: Path) -> Iterator[Path]:
    """What we did not leave in a folder, as far as it takes to find the first."""
    for item in _all(root):
        if item.name in _OWN:
            continue
        if not _is_folder(item) or item.name[0] == ".":
            yield item
            continue
        for place in _all(item):
            for key in _all(place) if _is_folder(place) else [place]:
                if not _is_folder(key) or not is_build_name(key):
                    yield key
                    continue
                for build in _all(key):
                    if not is_build_name(build) or not os.path.isfile(build / MANIFEST):
                        yield build


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _all(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
