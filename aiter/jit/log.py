"""Where do messages go?

To the logger that is called as the package is. A program that configured logging keeps full control;
where none did, a handler to stderr is added with the first message, so that a build of many seconds
is never silent.
"""

from __future__ import annotations

import logging
import sys

from . import envs
from .paths import PACKAGE

_said: set[str] = set()  # keys of what `log_once` has logged in this process


class _StderrHandler(logging.Handler):
    """Writes to what stderr is now, and only while no handler of the program's would."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers or sys.stderr is None:
            return
        text = self.format(record)
        try:
            print(f"[{PACKAGE}] {text}", file=sys.stderr, flush=True)
        except (OSError, ValueError):
            pass  # NOTE: nobody reads it, as behind a pipe that was closed; that ends no build.


def get_logger() -> logging.Logger:
    """The logger, with a handler and a level if the program set none."""
    logger = logging.getLogger(PACKAGE)
    configured = logger.hasHandlers()
    if not configured:
        logger.addHandler(_StderrHandler())
    level = envs.AITER_LOG_LEVEL.get()
    if level is not None:
        logger.setLevel(level)
    elif not configured and logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    return logger


def log_once(text: str, key: str | None = None, level: int = logging.INFO) -> None:
    """Logs a line once in a process for each `key`, which is the text if none is given."""
    key = text if key is None else key
    if key not in _said:
        _said.add(key)
        get_logger().log(level, text)
