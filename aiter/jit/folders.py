"""How does a folder or file of the cache come to be?

Folders are for the owner alone, or for the group with AITER_SHARED_CACHE, whatever the umask: others
could otherwise leave a shared object there that this process then loads. The same holds for files,
the small ones that say who builds included, since members of a group must be able to read them.

The cache folder is marked when it is made, or when it is first used and still empty. The mark is a
file `CACHEDIR.TAG` with a line of our own: that name is what backup programs leave out folders by.
What removes anything goes by the mark (`cli.cache_commands`); reading does not, as caches are older
than it. Rejected: marking whatever folder is written to, which would make a home folder ours once
AITER_JIT_DIR names it.
"""

from __future__ import annotations

import os
from pathlib import Path

from . import envs

MARKER = "CACHEDIR.TAG"
_TAG = """Signature: 8a477f597d28d172789f06886806bc55
# The cache folder of a loader that compiles modules on first use. It holds nothing else: everything
# in it can be made again, and `clean` may remove it.
"""
_MOST_TRIES = 8


def make_private_folder(root: Path, name: str | Path = "") -> Path:
    """Creates `root`, marked, and the folder `name` in it, for the owner alone where they are new.

    With AITER_SHARED_CACHE new folders are for the group of the folder above, too. Another process
    may remove what it finds empty meanwhile, so that is tried again.
    """
    for _ in range(_MOST_TRIES - 1):
        try:
            return _make_all(root, name)
        except FileNotFoundError:
            continue
    return _make_all(root, name)


def _make_all(root: Path, name: str | Path) -> Path:
    shared = envs.AITER_SHARED_CACHE.get()
    _make_parents(root.parent, shared)
    _make(root, shared)
    _mark(root)
    folder = root
    for part in Path(name).parts:
        folder = folder / part
        _make(folder, shared)
    return folder


def _make_parents(folder: Path, shared: bool) -> None:
    """Creates what is missing above the cache folder, writable by nobody else whatever the umask."""
    if folder.exists():
        return
    _make_parents(folder.parent, shared)
    try:
        folder.mkdir(mode=0o755)
    except FileExistsError:
        return
    if shared:
        folder.chmod(0o755)


def _make(folder: Path, shared: bool) -> None:
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return
    if shared:
        folder.chmod(0o2770)


def _mark(root: Path) -> None:
    """Leaves the mark in a cache folder that is empty."""
    tag = root / MARKER
    if tag.exists() or any(root.iterdir()):
        return
    write_atomically(tag, _TAG)


def is_marked(root: Path) -> bool:
    """Whether `root` was made, or found empty, as a cache folder."""
    try:
        lines = (root / MARKER).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return lines[1:2] == _TAG.splitlines()[1:2]


def file_mode() -> int:
    """What a file may be used for, whatever the umask: reading, by those we share with."""
    return 0o640 if envs.AITER_SHARED_CACHE.get() else 0o600


def child_umask() -> int:
    """The umask for compilers: what they leave in the cache is for those we share with; -1: ours."""
    return 0o007 if envs.AITER_SHARED_CACHE.get() else -1


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` in one step, or leaves it as it is."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(file_mode())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
