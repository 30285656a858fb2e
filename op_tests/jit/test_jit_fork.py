"""Does a child that was forked during a build start anew, with nothing held by nobody?"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

from processes import PATIENCE_SECONDS, wait_for
from toy import MODULE, Toy

from aiter.jit import driver


def in_child(body: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> str:
    """What `body` gives in a forked child, as text; fails if it hangs."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(int(seconds))
            os.write(write_end, str(body()).encode())
        except BaseException as error:  # NOTE: a forked child must not return into pytest.
            os.write(write_end, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    status = os.waitpid(pid, 0)[1]
    assert not os.WIFSIGNALED(status), f"the child hung, and had said {text!r}"
    return text


def test_a_child_forked_while_a_thread_builds_makes_its_first_call(counted: Toy) -> None:
    """The thread holds the lock of the very module that the child asks for."""
    counted.hold.touch()
    loader = counted.loader()
    values: list[int] = []
    thread = threading.Thread(
        target=lambda: values.append(loader.load(MODULE, counted.target()).value())
    )
    thread.start()
    wait_for(counted.compiles_log.exists)

    def first_call() -> int:
        counted.hold.unlink(missing_ok=True)
        return int(loader.load(MODULE, counted.target()).value())

    assert in_child(first_call, 30) == "1"
    thread.join(PATIENCE_SECONDS)
    assert values == [1]
    assert counted.load().value() == 1


def test_a_child_looks_up_every_module_anew(toy: Toy) -> None:
    """What the parent loaded stays the parent's: the child takes what the cache has now."""
    loader = toy.loader()
    assert loader.load(MODULE, toy.target()).value() == 1
    toy.inner.write_text("#define TOY_VALUE 2\n")
    assert loader.load(MODULE, toy.target()).value() == 1
    assert in_child(lambda: loader.load(MODULE, toy.target()).value()) == "2"


def test_a_child_holds_no_pipe_and_no_lock(counted: Toy) -> None:
    counted.hold.touch()
    loader = counted.loader()
    thread = threading.Thread(target=lambda: loader.load(MODULE, counted.target()))
    thread.start()
    wait_for(lambda: bool(driver._pipe_ends))
    seen = in_child(
        lambda: (driver._pipe_ends, loader._modules, loader._locks, driver._pipes_lock.locked())
    )
    counted.hold.unlink()
    thread.join(PATIENCE_SECONDS)
    assert seen == "(set(), {}, {}, False)"


def test_forks_in_a_row_while_threads_build(toy: Toy) -> None:
    """Whatever a thread is at when the fork comes, no child hangs."""
    toy.load()
    stop = time.monotonic() + 2.0
    loader = toy.loader()

    def build() -> None:
        while time.monotonic() < stop:
            loader.ensure(MODULE, toy.target(), force=True)

    thread = threading.Thread(target=build)
    thread.start()
    children = 0
    while time.monotonic() < stop:
        assert in_child(lambda: loader.load(MODULE, toy.target()).value(), 30) == "1"
        children += 1
    thread.join(PATIENCE_SECONDS)
    assert children > 3
