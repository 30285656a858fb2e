"""What do tests need to know about other processes: when they got somewhere, and whether they live?"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from toy import Toy

PATIENCE_SECONDS = 60.0


def wait_for(condition: Callable[[], bool]) -> None:
    """Waits until `condition` holds; fails the test if it does not for a long time."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)


def wait_for_compiles(toy: Toy, count: int) -> None:
    """Waits until the compiler wrapper has started `count` times."""
    wait_for(lambda: toy.compiles() == count)


def exists(pid: int) -> bool:
    """Whether a process of this id runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pid: int) -> None:
    """Waits until the process has died; a kill returns before its target is gone."""
    wait_for(lambda: not exists(pid))


def compiler_pids(toy: Toy) -> list[int]:
    """The processes that the compiler wrapper was."""
    return [int(line) for line in toy.compiles_log.read_text().split()]
