"""What is left when a builder is killed, and does the next one wait for it?"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import PATIENCE_SECONDS, compiler_pids, exists, wait_for
from toy import MODULE, Toy, child_code, child_environment

from aiter.jit.cache import WORK_DIR

LOAD = "print(loader.load(MODULE, target).value())"
AT_PUBLISH = """
import time
from aiter.jit.cache import Cache
publish = Cache.publish
def stopping(*arguments):
    entry = publish(*arguments) if {after} else None
    Path({mark!r}).touch()
    time.sleep(600)
    return entry
Cache.publish = stopping
"""


def start(toy: Toy, code: str) -> subprocess.Popen[str]:
    """A process that runs `code` with the toy's loader."""
    return subprocess.Popen(
        child_code(toy, code),
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_at(toy: Toy, stage: str, number: int) -> subprocess.Popen[str]:
    """Kills a builder at `stage` while another waits for it; the other."""
    mark = toy.root / "mark"
    if stage.endswith("publish"):
        code = AT_PUBLISH.format(mark=str(mark), after=stage == "after publish")
    else:
        code = ""
        wrapper = toy.compiler_wrapper()
        word = {"compiling": "-c", "linking": "-shared"}[stage]
        wrapper.write_text(wrapper.read_text().replace('*" -c "*', f'*" {word} "*'))
        toy.hold.touch()
        mark = toy.compiles_log
    builder = start(toy, code + LOAD)
    wait_for(mark.exists)
    waiting = start(toy, "print('ready', flush=True)\n" + LOAD)
    assert waiting.stdout is not None
    # NOTE: a buffered read could take what is printed next along, and keep it from `communicate`.
    line = b""
    while len(line) < len("ready\n"):
        line += os.read(waiting.stdout.fileno(), 1) or b"?"
    assert line == b"ready\n"
    time.sleep(0.5)
    builder.send_signal(number)
    builder.communicate(timeout=PATIENCE_SECONDS)
    toy.hold.unlink(missing_ok=True)
    return waiting


@pytest.mark.parametrize("stage", ["compiling", "linking", "before publish", "after publish"])
def test_the_next_builder_does_not_wait_for_a_dead_one(counted: Toy, stage: str) -> None:
    """It gets the lock; what it would do half an hour later, and would say, is to go on without."""
    waiting = kill_at(counted, stage, signal.SIGKILL)
    stdout, stderr = waiting.communicate(timeout=PATIENCE_SECONDS)
    assert stdout == "1\n", stderr
    assert "without the lock" not in stderr
    assert len(counted.builds()) == 1
    counted.loader().ensure(MODULE, counted.target(), force=True)
    assert list((counted.cache_dir / WORK_DIR).iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_a_killed_builder_leaves_no_compiler(counted: Toy, number: int) -> None:
    waiting = kill_at(counted, "compiling", number)
    assert waiting.communicate(timeout=PATIENCE_SECONDS)[0] == "1\n"
    wait_for(lambda: not any(map(exists, compiler_pids(counted))))


def test_a_waiting_process_can_be_killed(counted: Toy) -> None:
    counted.hold.touch()
    builder = start(counted, LOAD)
    wait_for(counted.compiles_log.exists)
    waiting = start(counted, LOAD)
    wait_for(lambda: len(list((counted.cache_dir / WORK_DIR).glob("*.alive"))) == 2)
    waiting.kill()
    waiting.communicate(timeout=PATIENCE_SECONDS)
    counted.hold.unlink()
    assert builder.communicate(timeout=PATIENCE_SECONDS)[0] == "1\n"
    assert counted.compiles() == 1
    assert counted.load().value() == 1
    assert counted.compiles() == 1


def test_a_waiting_process_says_for_whom_and_can_be_interrupted(counted: Toy) -> None:
    counted.hold.touch()
    builder = start(counted, LOAD)
    wait_for(counted.compiles_log.exists)
    waiting = start(counted, LOAD)
    assert waiting.stderr is not None
    line = waiting.stderr.readline()
    assert "waiting for another process that builds module_toy" in line
    assert f"-{builder.pid})" in line
    waiting.send_signal(signal.SIGINT)
    _, stderr = waiting.communicate(timeout=PATIENCE_SECONDS)
    assert stderr.splitlines()[-1] == "KeyboardInterrupt"
    counted.hold.unlink()
    assert builder.communicate(timeout=PATIENCE_SECONDS)[0] == "1\n"


FORKING = """
import os, threading, time
def fork_when_building():
    while not Path({mark!r}).exists():
        time.sleep(0.01)
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
    Path({forked!r}).touch()
threading.Thread(target=fork_when_building, daemon=True).start()
"""


def test_a_child_forked_during_the_build_keeps_nothing_alive(counted: Toy) -> None:
    """Neither the lock nor the compilers of a dead builder live on in a worker that it forked."""
    counted.hold.touch()
    forked = counted.root / "forked"
    code = FORKING.format(mark=str(counted.compiles_log), forked=str(forked))
    builder = subprocess.Popen(
        child_code(counted, code + LOAD),
        env=child_environment(),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(forked.exists)
        builder.kill()
        builder.wait(PATIENCE_SECONDS)
        wait_for(lambda: not any(map(exists, compiler_pids(counted))))
        counted.hold.unlink()
        next_one = start(counted, LOAD)
        assert next_one.communicate(timeout=PATIENCE_SECONDS)[0] == "1\n"
        assert list((counted.cache_dir / WORK_DIR).iterdir()) == []
    finally:
        os.killpg(builder.pid, signal.SIGKILL)


def _use(toy: Toy, loaded: object, removed: object, results: object) -> None:
    module = toy.load()
    loaded.set()  # type: ignore[attr-defined]
    removed.wait(PATIENCE_SECONDS)  # type: ignore[attr-defined]
    results.put(module.value())  # type: ignore[attr-defined]


def test_a_loaded_module_outlives_its_cache(toy: Toy) -> None:
    context = multiprocessing.get_context("fork")
    loaded, removed, results = context.Event(), context.Event(), context.Queue()
    child = context.Process(target=_use, args=(toy, loaded, removed, results))
    child.start()
    assert loaded.wait(PATIENCE_SECONDS)
    for path in sorted(toy.cache_dir.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    removed.set()
    assert results.get(timeout=PATIENCE_SECONDS) == 1
    child.join(PATIENCE_SECONDS)
    assert child.exitcode == 0
    assert toy.load().value() == 1


def test_a_killed_builders_log_of_an_earlier_failure_stays(toy: Toy) -> None:
    """What a build left behind on purpose is not a leftover."""
    failed = toy.cache_dir / ".failed" / "kept.log"
    failed.parent.mkdir(parents=True, mode=0o700)
    failed.write_text("why")
    toy.load()
    assert Path(failed).read_text() == "why"
