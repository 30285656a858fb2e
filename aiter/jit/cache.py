"""Do we have it already?

Two levels, as in ccache's direct mode. The plan's key leads to a folder of builds; each build lists
the headers that went into it with size, mtime, ctime and SHA-256. A build fits if every header is
still what it was: equal stat is trusted, otherwise the content decides. So touching a file rebuilds
nothing, editing a header does, and going back to an older text finds the older build again.

    <cache>/<module>/<target>-<arch>-<abi>/<key of the plan>/<key of the headers>/
        <module>.cpython-311-x86_64-linux-gnu.so   manifest.json   build.log

Before a build is used its inputs are compared with the plan's, its files with their hashes, and
their owners and permissions with what `trust` asks for; so a build that was copied there from
another compiler, Python or machine, cut short or replaced is never loaded.

A build appears by one rename of a complete folder, so readers need no lock. Rejected: one flat key
with the headers in it, as the headers' list is only known from an earlier compile; and mtimes
alone, as a fresh checkout changes them all.

A header that newly appears earlier on the include path is not noticed, as in ccache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import envs
from .errors import CacheError, TargetError
from .log import get_logger
from .paths import make_private_folder
from .plan import Plan, Roots
from .target import Target
from .trust import check_trusted

MANIFEST = "manifest.json"
BUILD_LOG = "build.log"
WORK_DIR = ".build"
LOCK_DIR = ".locks"
COMPILER_DIR = ".compilers"
BROKEN_DIR = ".broken"
FAILED_DIR = ".failed"
TOOL_DIR = ".zig"  # NOTE: zig keeps the C++ library that it builds for itself here.


@dataclass(frozen=True)
class Header:
    """One header as a build saw it; `stat` is (size, mtime_ns, ctime_ns)."""

    path: str
    stat: tuple[int, int, int]
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One build in the cache."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def library(self) -> Path:
        """The shared object."""
        return self.folder / str(self.manifest["library"]["name"])

    @property
    def target(self) -> Target:
        """What it is built for."""
        kind, archs, cpu_level, cpu_check = self.manifest["target"]
        return Target(kind, tuple(archs), cpu_level, cpu_check)


@dataclass(frozen=True)
class Miss:
    """No build fits; `reason` says why in a few words."""

    reason: str


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stat_of(path: str | Path) -> tuple[int, int, int]:
    """(size, mtime_ns, ctime_ns) of a file."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class Cache:
    """The cache folder.

    Args:
        root: the folder; it is created, for its owner alone, when first written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def lookup(self, plan: Plan) -> Entry | Miss:
        """The build that fits `plan`, its shared object verified, else why there is none.

        A damaged build is reported, moved aside and then missing. Raises CacheError if it cannot be
        moved, and if others may write to the cache (see `trust`).
        """
        changed = ""
        damaged = False
        for folder in subfolders(self.root / plan.place):
            self.check_trusted(folder)
            entry = read_manifest(folder)
            problem: str | None
            if entry is not None:
                differing = self.first_changed_header(entry, plan.roots)
                if differing is not None:
                    changed = changed or differing
                    continue
                problem = foreign_part(entry, plan) or self.damage(entry)
                if problem is None:
                    return entry
            else:
                problem = f"expected a complete {MANIFEST}"
            if folder.is_dir():  # NOTE: else another process replaced it meanwhile.
                get_logger().warning("damaged build %s: %s; moving it aside", folder, problem)
                self.set_aside(folder)
                damaged = True
        if damaged:
            return Miss("the cached build was damaged")
        if changed:
            return Miss(f"{shown_path(changed)} changed")
        return Miss(self._why_no_key(plan))

    def publish(self, plan: Plan, folder: Path, headers: list[Header], replace: bool) -> Entry:
        """Makes the complete build in `folder` visible, or takes an equal one that is there.

        With `replace` an equal build that is there makes way.
        """
        names = "\n".join(f"{header.path} {header.sha256}" for header in headers)
        place = self.root / plan.place / hashlib.sha256(os.fsencode(names)).hexdigest()[:16]
        library = folder / plan.library_name
        for path in (library, folder / BUILD_LOG):
            path.chmod(_file_mode())
        manifest = {
            "target": [
                plan.target.kind,
                plan.target.archs,
                plan.target.cpu_level,
                plan.target.cpu_check,
            ],
            "abi": plan.abi,
            "inputs": plan.inputs,
            "library": {
                "name": library.name,
                "size": library.stat().st_size,
                "sha256": file_sha256(library),
            },
            "headers": [[header.path, *header.stat, header.sha256] for header in headers],
        }
        write_atomically(folder / MANIFEST, json.dumps(manifest))
        self.make_folder(plan.place)
        for _ in range(8):
            try:
                os.rename(folder, place)
                return Entry(place, manifest)
            except OSError:
                if not place.is_dir():
                    raise
            there = read_manifest(place)
            if not replace and there is not None and self.damage(there) is None:
                return there
            shutil.rmtree(self.set_aside(place), ignore_errors=True)
        raise CacheError(
            f"cache folder {place}: expected to publish a build there, got other processes that"
            " kept replacing it"
        )

    def make_folder(self, name: str | Path) -> Path:
        """Creates the folder `name` in the cache, for the owner alone where it is new."""
        return make_private_folder(self.root, name)

    def check_trusted(self, folder: Path) -> None:
        """Raises CacheError if others may write to `folder`, to its files or above them."""
        above = [parent for parent in folder.parents if self.root in parent.parents]
        with os.scandir(folder) as found:
            files = [Path(item.path) for item in found]
        check_trusted(self.root, (*above, folder, *files))

    def set_aside(self, folder: Path) -> Path:
        """Moves a build out of sight, keeping it for a look; raises CacheError if it cannot."""
        target = self.root / BROKEN_DIR / f"{folder.parts[-4]}-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            self.make_folder(BROKEN_DIR)
            os.rename(folder, target)
        except FileNotFoundError:
            return target
        except OSError as error:
            raise CacheError(
                f"cache folder {self.root}: expected to move {folder} aside, got {error.strerror};"
                " set AITER_JIT_DIR to a folder that can be written"
            ) from None
        return target

    def damage(self, entry: Entry) -> str | None:
        """What is wrong with the shared object of `entry`; None if it is as published."""
        expected = entry.manifest["library"]
        try:
            size = entry.library.stat().st_size
            if size != expected["size"]:
                return f"expected {expected['size']} bytes, got {size}"
            digest = file_sha256(entry.library)
        except OSError as error:
            return f"expected a readable file, got {error.strerror}"
        if digest != expected["sha256"]:
            return f"expected SHA-256 {expected['sha256'][:16]}..., got {digest[:16]}..."
        return None

    def entries(self) -> list[tuple[Entry | None, Path]]:
        """Every build folder of the cache with its entry, None where the manifest is damaged."""
        found = []
        for module in subfolders(self.root):
            for place in subfolders(module):
                for key in subfolders(place):
                    found += [(read_manifest(folder), folder) for folder in subfolders(key)]
        return found

    def first_changed_header(self, entry: Entry, roots: Roots) -> str | None:
        """The first header whose content differs; None if all fit, with their stats refreshed."""
        fresh: list[list[Any]] = []
        stale = False
        for path, size, mtime, ctime, sha256 in entry.manifest["headers"]:
            actual = roots.expand(path)
            try:
                now = stat_of(actual)
                if now != (size, mtime, ctime):
                    stale = True
                    if now[0] != size or file_sha256(Path(actual)) != sha256:
                        return str(path)
            except OSError:
                return str(path)
            fresh.append([path, *now, sha256])
        if stale:
            self._refresh(entry, fresh)
        return None

    def _refresh(self, entry: Entry, headers: list[list[Any]]) -> None:
        """Records new stats of unchanged headers, so that the next lookup need not read them."""
        stamp = entry.folder / f".stamp-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            stamp.touch()
            now = stamp.stat().st_mtime_ns
            stamp.unlink()
            # NOTE: a file changed this very moment could change again without a new ctime.
            if all(max(mtime, ctime) < now for _, _, mtime, ctime, _ in headers):
                text = json.dumps({**entry.manifest, "headers": headers})
                write_atomically(entry.folder / MANIFEST, text)
        except OSError as error:
            get_logger().debug("cannot refresh %s: %s", entry.folder, error)

    def _why_no_key(self, plan: Plan) -> str:
        """How the plan differs from the newest build for the same target and ABI."""
        place = (self.root / plan.place).parent
        folders = [folder for key in subfolders(place) for folder in subfolders(key)]
        known = [entry for entry in map(read_manifest, folders) if entry is not None]
        if not known:
            return "no cached build"
        newest = max(known, key=lambda entry: entry.folder.stat().st_mtime_ns)
        return changed_input(newest.manifest["inputs"], plan.inputs) or "no cached build"


def changed_input(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first part of a plan's inputs that differs, in words; None if none does."""
    old_sources, new_sources = old.get("sources", {}), new.get("sources", {})
    if not isinstance(old_sources, dict):
        return "sources changed"
    for path in {**old_sources, **new_sources}:
        if old_sources.get(path) != new_sources.get(path):
            return f"{shown_path(path)} changed"
    for part in {**new, **old}:
        if part not in old or part not in new or old[part] != new[part]:
            return f"{part} changed"
    return None


def read_manifest(folder: Path) -> Entry | None:
    """The entry in `folder`; None if its manifest is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entry = Entry(folder, manifest)
        library = manifest["library"]
        complete = (
            isinstance(manifest["inputs"]["sources"], dict)
            and bool(entry.target.label)
            and isinstance(manifest["abi"], str)
            and _is_path(library["name"])
            and Path(library["name"]).name == library["name"]
            and isinstance(library["size"], int)
            and isinstance(library["sha256"], str)
            and all(map(_is_header, manifest["headers"]))
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError, TargetError):
        return None
    return entry if complete else None


def _is_path(value: Any) -> bool:
    """Whether a JSON value is text that a file could be called."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _is_header(value: Any) -> bool:
    path, size, mtime, ctime, sha256 = value
    return (
        _is_path(path)
        and all(isinstance(number, int) for number in (size, mtime, ctime))
        and isinstance(sha256, str)
    )


def foreign_part(entry: Entry, plan: Plan) -> str | None:
    """How `entry` shows that it was built for something else; None if it was built for `plan`."""
    changed = changed_input(entry.manifest["inputs"], plan.inputs)
    if changed is not None:
        return f"expected a build of this plan, got one from elsewhere ({changed})"
    if entry.library.name != plan.library_name:
        return f"expected {plan.library_name}, got {entry.library.name}"
    return None


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` in one step, or leaves it as it is."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(_file_mode())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _file_mode() -> int:
    """What a published file may be used for, whatever the umask: reading, by those we share with."""
    return 0o640 if envs.AITER_SHARED_CACHE.get() else 0o600


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in `folder`, sorted by name; none if it does not exist."""
    try:
        with os.scandir(folder) as found:
            names = [item.name for item in found if item.is_dir() and item.name[0] != "."]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in sorted(names)]


def shown_path(path: str) -> str:
    """`<csrc>/include/wave.h` as people write it."""
    return path.replace("<", "", 1).replace(">", "", 1) if path.startswith("<") else path
