"""Do we have it already?

Two levels, as in ccache's direct mode. The plan's key leads to a folder of builds; each build lists
the headers that went into it with size, mtime, ctime and SHA-256. A build fits if every header is
still what it was: equal stat is trusted, otherwise the content decides. So touching a file rebuilds
nothing, editing a header does, and going back to an older text finds the older build again.

    <cache>/<module>/<target>-<arch>-<abi>/<key of the plan>/<key of the headers>/
        <module>.cpython-311-x86_64-linux-gnu.so   manifest.json   build.log

Before a build is used its inputs are compared with the plan's, its files with their hashes, and
their owners and permissions with what `trust` asks for; so a build that was copied there from
another compiler, Python or machine, cut short or replaced is never loaded. What a lookup gives is
the open shared object whose bytes were hashed, not its name.

What vanishes while it is looked at, since others rebuild or clean up, is missing and no error. What
cannot be read, as a member of a group may have left it, is passed over with a line in the log.

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .errors import CacheError
from .folders import file_mode, make_private_folder, write_atomically
from .log import get_logger
from .manifest import (
    MANIFEST,
    Entry,
    Header,
    changed_input,
    file_sha256,
    foreign_part,
    is_build_name,
    open_library,
    read_manifest,
    read_open_manifest,
    shown_path,
    stat_of,
    subfolders,
)
from .plan import Plan, Roots
from .trust import Folder, open_any, open_cache

BUILD_LOG = "build.log"
WORK_DIR = ".build"
LOCK_DIR = ".locks"
COMPILER_DIR = ".compilers"
BROKEN_DIR = ".broken"
FAILED_DIR = ".failed"
DEVICE_CODE_DIR = ".device_code"
TUNED_DIR = ".tuned"
TOOL_DIR = ".zig"  # NOTE: zig keeps the C++ library that it builds for itself here.


@dataclass(frozen=True)
class Miss:
    """No build fits; `reason` says why in a few words."""

    reason: str


class _Unfit(NamedTuple):
    """A build that is not used: a header changed since, or there is something wrong with it."""

    changed: str = ""
    problem: str = ""


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
        for place, name, folder in self._builds(plan.place):
            try:
                found = self._judge(folder, plan)
            except PermissionError as error:
                _pass_over(folder.path, error)
                continue
            if isinstance(found, Entry):
                return found
            if found.changed:
                changed = changed or found.changed
            elif place.holds(name, folder):  # NOTE: else another process replaced it meanwhile.
                get_logger().warning(
                    "damaged build %s: %s; moving it aside", folder.path, found.problem
                )
                self.set_aside(folder.path)
                damaged = True
        if damaged:
            return Miss("the cached build was damaged")
        if changed:
            return Miss(f"{shown_path(changed)} changed")
        return Miss(self._why_no_key(plan))

    def opened(self, entry: Entry) -> Entry | None:
        """`entry` as it is there now, its shared object opened and verified; None if it is not."""
        for _, name, folder in self._builds(entry.folder.relative_to(self.root).parent):
            if name == entry.folder.name:
                now = read_open_manifest(folder)
                problem, file = open_library(folder, now) if now is not None else ("none", None)
                if now is not None and problem is None:
                    return Entry(folder.path, now.manifest, file)
        return None

    def _builds(self, place: Path) -> Iterator[tuple[Folder, str, Folder]]:
        """The open folders of a plan's builds, each with the folder that it is in and its name."""
        root = open_cache(self.root)
        if root is None:
            return
        with root:
            above = root.descend(place.parts)
            if above is None:
                return
            with above:
                for name in above.names():
                    try:
                        folder = above.folder(name) if name[0] != "." else None
                        if folder is not None:
                            folder.check_contents()
                    except PermissionError as error:
                        _pass_over(above.path / name, error)
                        continue
                    if folder is not None:
                        with folder:
                            yield above, name, folder

    def _judge(self, folder: Folder, plan: Plan) -> Entry | _Unfit:
        """The build in `folder` if it fits `plan`, else why it does not."""
        entry = read_open_manifest(folder)
        if entry is None:
            return _Unfit(problem=f"expected a complete {MANIFEST}")
        differing = self.first_changed_header(entry, plan.roots)
        if differing is not None:
            return _Unfit(changed=differing)
        problem = foreign_part(entry, plan)
        if problem is None:
            problem, file = open_library(folder, entry)
            if problem is None:
                return Entry(folder.path, entry.manifest, file)
        return _Unfit(problem=problem)

    def publish(self, plan: Plan, folder: Path, headers: list[Header], replace: bool) -> Entry:
        """Makes the complete build in `folder` visible, or takes an equal one that is there.

        With `replace` an equal build that is there makes way.
        """
        names = "\n".join(f"{header.path} {header.sha256}" for header in headers)
        place = self._place(plan, names)
        library = folder / plan.library_name
        for path in (library, folder / BUILD_LOG):
            path.chmod(file_mode())
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
        for attempt in range(1, 8):
            try:
                self.make_folder(plan.place)
                os.rename(folder, place)
                return Entry(place, manifest)
            except FileNotFoundError:
                if not folder.is_dir():
                    raise
                continue  # NOTE: others remove what they find empty.
            except OSError:
                if not place.is_dir():
                    raise
            if not replace and self._is_intact(place):
                return Entry(place, manifest)
            try:
                shutil.rmtree(self.set_aside(place), ignore_errors=True)
            except CacheError:
                if os.access(place, os.R_OK | os.X_OK):
                    raise
                # NOTE: what another member keeps to himself is not in the way; lookups take any name.
                place = self._place(plan, names + "\n" * attempt)
        raise CacheError(
            f"cache folder {place}: expected to publish a build there, got other processes that"
            " kept replacing it"
        )

    def _place(self, plan: Plan, names: str) -> Path:
        return self.root / plan.place / hashlib.sha256(os.fsencode(names)).hexdigest()[:16]

    def make_folder(self, name: str | Path) -> Path:
        """Creates the folder `name` in the cache, for the owner alone where it is new."""
        return make_private_folder(self.root, name)

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

    def _is_intact(self, folder: Path) -> bool:
        """Whether the build there can be read and is as it was published."""
        entry = read_manifest(folder)
        try:
            return entry is not None and self.damage(entry) is None
        except PermissionError:
            return False

    def damage(self, entry: Entry) -> str | None:
        """What is wrong with the shared object of `entry`; None if it is as published.

        Raises PermissionError if it cannot be read.
        """
        folder = open_any(entry.folder)
        if folder is None:
            return "expected a readable folder, got none"
        with folder:
            return open_library(folder, entry)[0]

    def entries(self) -> list[tuple[Entry | None, Path]]:
        """Every build folder of the cache with its entry, None where the manifest is damaged.

        What has no manifest, or another name than builds have, is no build and left out, and so is
        what a link leads to, and what this user may not read.
        """
        folders = [self.root]
        for _ in ("module", "target", "key", "build"):
            folders = [
                below
                for folder in folders
                for below in subfolders(folder)
                if not os.path.islink(below)
            ]
        return [
            (read_manifest(folder), folder)
            for folder in folders
            if is_build_name(folder.parent)
            and is_build_name(folder)
            and os.path.isfile(folder / MANIFEST)
            and os.access(folder / MANIFEST, os.R_OK)
        ]

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
        newest = max(known, key=lambda entry: _changed_at(entry.folder))
        return changed_input(newest.manifest["inputs"], plan.inputs) or "no cached build"


def _pass_over(path: Path, error: OSError) -> None:
    get_logger().warning("passing over %s, which cannot be read: %s", path, error.strerror)


def _changed_at(folder: Path) -> int:
    """When something was last put in the folder; 0 if it has vanished."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0
