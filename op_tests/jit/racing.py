"""Builds that tests attack, and a process that attacks them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from toy import MODULE, Toy


def built(toy: Toy, value: int) -> Path:
    """The build of a toy whose `value()` is `value`; its folder."""
    toy.inner.write_text(f"#define TOY_VALUE {value}\n")
    return toy.loader().ensure(MODULE, toy.target())[0].folder


@contextmanager
def racing(step: Callable[[], None]) -> Iterator[None]:
    """Runs `step` again and again in a process of its own, as fast as it can."""
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                step()
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def cache_in(folder: Path) -> Path:
    root = folder / "cache"
    root.mkdir(mode=0o700)
    return root
