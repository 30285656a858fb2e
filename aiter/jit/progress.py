"""What does a person see while compilers run?

On a terminal one line on stderr that is rewritten in place: a spinner, how many objects are done,
and the seconds so far. Elsewhere a log line every half minute, so that a compiler that hangs does
not look like a program that does. It is driven by the loop that waits for the compilers
anyway, so it needs no thread of its own.
"""

from __future__ import annotations

import sys
import time

from .log import get_logger

_FRAMES = "|/-\\"
_INTERVAL = 0.1
LOG_INTERVAL = 30.0


class Progress:
    """The live line of one build.

    Args:
        title: what is built.
        total: how many steps there are.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._start = time.monotonic()
        self._shown_at = -1.0
        self._logged_at = self._start
        self._frame = 0
        self._live = sys.stderr is not None and sys.stderr.isatty()

    def show(self, done: int) -> None:
        """Rewrites the line if it is due; `done` is the number of finished steps."""
        now = time.monotonic()
        if not self._live:
            if now - self._logged_at >= LOG_INTERVAL:
                self._logged_at = now
                get_logger().info(
                    "still building %s: %d of %d steps done after %.0f s",
                    self._title,
                    done,
                    self._total,
                    now - self._start,
                )
            return
        if now - self._shown_at < _INTERVAL:
            return
        self._shown_at = now
        self._frame = (self._frame + 1) % len(_FRAMES)
        line = f"{_FRAMES[self._frame]} {self._title}: {done}/{self._total} objects"
        self._write(f"\r\033[K{line}, {now - self._start:.1f} s")

    def clear(self) -> None:
        """Removes the line."""
        if self._live and self._shown_at >= 0.0:
            self._write("\r\033[K")

    def _write(self, text: str) -> None:
        """To the terminal; one that is gone meanwhile gets no line, and ends no build."""
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError):
            self._live = False
