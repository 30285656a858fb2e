"""What does a build say of itself, and is its shared object what it says?

`manifest.json` lies in the folder of each build: target and ABI, the inputs of the plan that it was
built from, name, size and SHA-256 of the shared object, and the headers with stat and SHA-256. It is
text that anything may have happened to, so whatever is not as it was written counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import TargetError
from .plan import Plan
from .target import Target
from .trust import File, Folder

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Header:
    """One header as a build saw it; `stat` is (size, mtime_ns, ctime_ns)."""

    path: str
    stat: tuple[int, int, int]
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One build in the cache.

    Attributes:
        folder: where it is.
        manifest: what it says of itself.
        file: the shared object as it was opened and hashed; None for one that nobody looked at.
    """

    folder: Path
    manifest: dict[str, Any]
    file: File | None = field(default=None, compare=False, repr=False)

    @property
    def library(self) -> Path:
        """The shared object."""
        return self.folder / str(self.manifest["library"]["name"])

    @property
    def target(self) -> Target:
        """What it is built for."""
        kind, archs, cpu_level, cpu_check = self.manifest["target"]
        return Target(kind, tuple(archs), cpu_level, cpu_check)


def read_manifest(folder: Path) -> Entry | None:
    """The entry in `folder`; None if its manifest is missing or damaged."""
    try:
        return _parse_manifest(folder, (folder / MANIFEST).read_bytes())
    except OSError:
        return None


def read_open_manifest(folder: Folder) -> Entry | None:
    """The same of an open folder; raises PermissionError, and CacheError if others wrote it."""
    file = folder.file(MANIFEST)
    if file is None:
        return None
    with file:
        return _parse_manifest(folder.path, file.read())


def _parse_manifest(folder: Path, content: bytes) -> Entry | None:
    try:
        manifest = json.loads(content.decode())
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
    except (ValueError, KeyError, TypeError, RecursionError, TargetError):
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


def open_library(folder: Folder, entry: Entry) -> tuple[str | None, File | None]:
    """What is wrong with the shared object of a build, and the open file if nothing is.

    Raises PermissionError if it cannot be read, CacheError if others could have written it.
    """
    expected = entry.manifest["library"]
    file = folder.file(expected["name"])
    if file is None:
        return "expected a readable file, got no such file", None
    size = os.fstat(file.fd).st_size
    if size != expected["size"]:
        return f"expected {expected['size']} bytes, got {size}", None
    digest = hashlib.sha256(file.read()).hexdigest()
    if digest != expected["sha256"]:
        return f"expected SHA-256 {expected['sha256'][:16]}..., got {digest[:16]}...", None
    return None, file


def foreign_part(entry: Entry, plan: Plan) -> str | None:
    """How `entry` shows that it was built for something else; None if it was built for `plan`."""
    changed = changed_input(entry.manifest["inputs"], plan.inputs)
    if changed is not None:
        return f"expected a build of this plan, got one from elsewhere ({changed})"
    if entry.library.name != plan.library_name:
        return f"expected {plan.library_name}, got {entry.library.name}"
    return None


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


def is_build_name(folder: Path) -> bool:
    """Whether a folder is called as those of a plan and of a build are: 16 hexadecimal digits."""
    return re.fullmatch("[0-9a-f]{16}", folder.name) is not None


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in `folder`, sorted by name; none if it cannot be read."""
    try:
        with os.scandir(folder) as found:
            names = [item.name for item in found if item.is_dir() and item.name[0] != "."]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stat_of(path: str | Path) -> tuple[int, int, int]:
    """(size, mtime_ns, ctime_ns) of a file."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def shown_path(path: str) -> str:
    """`<csrc>/include/wave.h` as people write it."""
    return path.replace("<", "", 1).replace(">", "", 1) if path.startswith("<") else path
