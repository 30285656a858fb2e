"""How are compiler processes run?

A small driver on `subprocess`: it keeps up to MAX_JOBS compilers running, each in a session of its
own, and kills the sessions of all others when one fails, time runs out or the user interrupts.

Compilers must not outlive a builder that is killed, by whatever signal. So each runs under a shell
that also holds the reading end of a pipe; when the builder is gone, its end is closed, and the shell
kills the session. Rejected: PR_SET_PDEATHSIG, which reaches the compiler's driver but not `cc1plus`
behind it; signal handlers, which belong to the program and do not see SIGKILL. A shell costs 2 ms.

What a compiler prints goes to memory while it runs, and to its file when it ended: on a full disk the
file would be without the line that says so.

A build is two or three objects and a link, so a build system would only add a dependency; and threads
that wait for one process each were rejected because an interrupt reaches only the main thread.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .folders import child_umask
from .progress import Progress

_POLL_SECONDS = 0.01
_MAX_LINE = 500
# The compiler runs in the foreground. NOTE: a process that a signal ends has status 128 + signal.
_SHELL = """
exec 3<&0 </dev/null
(read -r _ <&3; kill -KILL 0) >/dev/null 2>&1 &
watcher=$!
"$@" 3<&-
status=$?
kill -KILL $watcher 2>/dev/null
exit $status
"""
_CANNOT_START = (126, 127)
_SIGNALLED = 128
_ERROR_LINE = re.compile(
    r"\berror\b\s*(:|[A-Z#]*\d+)|\bfatal\s*:|^error|undefined (reference|symbol)|cannot find -l"
)


@dataclass(frozen=True)
class Job:
    """One command; `output` receives what it printed, as far as there is room."""

    command: tuple[str, ...]
    output: Path

    @property
    def text(self) -> str:
        """The command as one would type it."""
        return shlex.join(self.command)


@dataclass(frozen=True)
class _Running:
    """A job that runs and prints to `said`; the shell ends it when `pipe_end` is closed."""

    job: Job
    process: subprocess.Popen[bytes]
    pipe_end: int
    said: IO[bytes]


# The pipe ends of all running jobs. A forked child closes its copies, which would otherwise keep
# the compilers of a dead builder alive as long as the child.
_pipe_ends: set[int] = set()


# It is held from the making of a pipe until it is in the set, so that no fork comes between.
_pipes_lock = threading.Lock()


def _close_pipe_ends() -> None:
    """Starts anew in a forked child."""
    global _pipes_lock
    _pipes_lock = threading.Lock()
    while _pipe_ends:
        os.close(_pipe_ends.pop())


os.register_at_fork(
    before=lambda: _pipes_lock.acquire(),
    after_in_parent=lambda: _pipes_lock.release(),
    after_in_child=_close_pipe_ends,
)


class JobFailed(Exception):
    """A job ended with an error, or was stopped.

    Attributes:
        problem: how, in words.
        output: what it printed until then.
        killed: whether a signal ended it that was not ours.
    """

    def __init__(self, job: Job, problem: str, output: str, killed: bool = False) -> None:
        self.job = job
        self.problem = problem
        self.output = output
        self.killed = killed
        super().__init__(problem)


def run_jobs(
    jobs: list[Job],
    folder: Path,
    environment: dict[str, str],
    max_jobs: int,
    deadline: float | None,
    progress: Progress,
    done: int = 0,
) -> None:
    """Runs `jobs` in `folder`, at most `max_jobs` at once, until all succeeded.

    Args:
        deadline: a `time.monotonic()` value after which the rest is killed; None for no limit.
        done: how many steps `progress` counts as done already.

    Raises:
        JobFailed: for the first job that fails; no process is left running then.
    """
    waiting = list(reversed(jobs))
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < max_jobs:
                running.append(_start(waiting.pop(), folder, environment))
            for item in list(running):
                status = item.process.poll()
                if status is None:
                    continue
                running.remove(item)
                output = _end(item)
                if status != 0:
                    killed = bool(_signal_name(status))
                    raise JobFailed(item.job, _describe(status), output, killed)
                done += 1
            if deadline is not None and running and time.monotonic() > deadline:
                late = running.pop(0)
                raise JobFailed(late.job, "time ran out (AITER_BUILD_TIMEOUT)", _end(late))
            progress.show(done)
            if running:
                time.sleep(_POLL_SECONDS)
    finally:
        for item in running:
            _end(item)
        progress.clear()


def first_error(output: str) -> str:
    """The first line of a compiler's output that reports an error, else its last; cut if long."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        if _ERROR_LINE.search(line):
            return line[:_MAX_LINE]
    return lines[-1][:_MAX_LINE] if lines else "no output"


def parse_depfile(text: str) -> list[str]:
    """The files that a Makefile rule written by `-MD -MF` depends on, in order, each once."""
    rule = text.replace("\\\n", " ")
    _, _, names = rule.partition(": ")
    words = re.findall(r"(?:\\.|[^\s\\])+", names)
    unescaped = (re.sub(r"\\([ #\\])", r"\1", word).replace("$$", "$") for word in words)
    return list(dict.fromkeys(unescaped))


def _start(job: Job, folder: Path, environment: dict[str, str]) -> _Running:
    if shutil.which(job.command[0], path=environment.get("PATH")) is None:
        problem = f"cannot start the compiler: no program {job.command[0]}"
        raise JobFailed(job, problem, f"error: {problem}\n")
    said = open(os.memfd_create("output", os.MFD_CLOEXEC), "w+b")
    with _pipes_lock:
        read_end, pipe_end = os.pipe()
        _pipe_ends.add(pipe_end)
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", _SHELL, "sh", *job.command],
            cwd=folder,
            env=environment,
            stdin=read_end,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=child_umask(),
        )
    except OSError as error:
        said.close()
        _close(pipe_end)
        problem = f"cannot start the compiler: {error.strerror}"
        raise JobFailed(job, problem, f"error: {problem}\n") from None
    finally:
        os.close(read_end)
    return _Running(job, process, pipe_end, said)


def _end(item: _Running) -> str:
    """Kills what is left of a job: the whole session of one that runs, nothing of one that ended.

    Returns what it printed, which is in its file from now on, unless that cannot be written.
    """
    try:
        os.killpg(item.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    item.process.wait()
    _close(item.pipe_end)
    with item.said:
        item.said.seek(0)
        output = item.said.read()
    try:
        item.job.output.write_bytes(output)
    except OSError:
        pass  # NOTE: the caller has it, and a build that succeeds writes it to its log again.
    return output.decode("utf-8", errors="replace")


def _close(pipe_end: int) -> None:
    with _pipes_lock:
        if pipe_end in _pipe_ends:
            _pipe_ends.remove(pipe_end)
            os.close(pipe_end)


def _signal_name(status: int) -> str:
    """The signal that ended a process of this status; empty if none did."""
    number = status - _SIGNALLED if status > _SIGNALLED else -status
    return signal.Signals(number).name if number in set(signal.Signals) else ""


def _describe(status: int) -> str:
    if _signal_name(status):
        return f"the compiler was killed by {_signal_name(status)}"
    if status in _CANNOT_START:
        return f"cannot start the compiler (status {status} of the shell)"
    return f"the compiler exited with status {status}"
