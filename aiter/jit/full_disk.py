"""Is it that the disk is full?

A compiler or linker that cannot write says so somewhere in its output and ends with an ordinary
status, or is killed by SIGBUS where it writes through a mapping. Who reads the error should learn it
from the first line, with the folder: of the cache, or of what else the compiler writes to, as /tmp.

What counts is what the system said, in English since compilers run with LC_ALL=C. How much room there
is now tells little, as the partial output is gone again by then; it decides only for a compiler that
was killed. Three things can be used up and take three ways out: room, a quota, and inodes.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

_TEXTS = {
    os.strerror(errno.ENOSPC): errno.ENOSPC,
    os.strerror(errno.EDQUOT): errno.EDQUOT,
}
_LITTLE_BYTES = 64 << 10


def why_full(error: OSError, folder: Path) -> str | None:
    """What is used up, as words with the folder, where that is why `error` was raised; else None."""
    if error.errno is None or error.errno not in _TEXTS.values():
        return None
    place = Path(os.fsdecode(error.filename)).parent if error.filename else folder
    return _describe(error.errno, _existing(place))


def why_compiler_failed(output: str, folder: Path, killed: bool) -> str | None:
    """The same for a compiler that worked in `folder`, from what it printed; else None.

    Args:
        killed: whether a signal ended it.
    """
    for line in output.splitlines():
        for text, number in _TEXTS.items():
            if text in line:
                # NOTE: a line begins with the program, as "/usr/bin/ld: final link failed".
                named = re.search(r"\s['\"]?(/[^\s:'\"]+)", line)
                place = Path(named[1]).parent if named else folder
                return _describe(number, place if place.is_dir() else folder)
    if (killed or "Bus error" in output) and _is_used_up(folder):
        return _describe(errno.ENOSPC, folder)
    return None


def _describe(number: int, folder: Path) -> str:
    text = os.strerror(number)
    if number == errno.EDQUOT:
        return f"a quota that is used up: {text} in {folder}"
    return f"a full disk, {_what_is_used_up(folder)}: {text} in {folder}"


def _what_is_used_up(folder: Path) -> str:
    try:
        there = os.statvfs(folder)
    except OSError:
        return "of room"
    no_inodes = there.f_files > 0 and there.f_favail == 0
    return "without inodes" if no_inodes else "without room"


def _is_used_up(folder: Path) -> bool:
    try:
        there = os.statvfs(folder)
    except OSError:
        return False
    no_inodes = there.f_files > 0 and there.f_favail == 0
    return no_inodes or there.f_bavail * there.f_frsize < _LITTLE_BYTES


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder
