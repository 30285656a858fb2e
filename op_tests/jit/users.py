"""What do tests need to act as other users? Numbers for them, a place that all reach, and children."""

from __future__ import annotations

import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aiter.jit.errors import JitError

ALICE, BOB, TEAM, OTHERS = 50001, 50002, 50010, 50011

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as other users")


@contextmanager
def place_for_all() -> Iterator[Path]:
    """A folder of root's that every user can reach; it goes at the end."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    place.chmod(0o755)
    try:
        yield place
    finally:
        shutil.rmtree(place)


def as_user(uid: int, groups: list[int], body: Callable[[], object], umask: int = 0o022) -> str:
    """Runs `body` in a child that is another user; what it raised from the loader, else ''."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 3
        try:
            os.setgroups(groups)
            os.setgid(groups[0])
            os.setuid(uid)
            os.umask(umask)
            body()
            status = 0
        except JitError as error:
            os.write(write_end, str(error).encode())
            status = 0
        except BaseException as error:  # NOTE: a forked child must not return into pytest.
            os.write(write_end, "".join(traceback.format_exception(error)).encode())
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, text
    return text
