"""How are compiler processes run?

A small driver on `subprocess`: it keeps up to MAX_JOBS compilers running, each in a session of its
own, and kills the sessions of all others when one fails, time runs out or the user interrupts. A
build is two or three objects and a link, so a build system would only add a dependency; and threads
that wait for one process each were rejected because an interrupt reaches only the main thread.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from aiter.jit.progress import Progress

_POLL_SECONDS = 0.01
_ERROR_LINE = re.compile(
    r"\berror\b\s*(:|[A-Z#]*\d+)|\bfatal\s*:|^error|undefined (reference|symbol)|cannot find -l"
)


@dataclass(frozen=True)
class Job:
    """One command; `output` receives what it prints."""

    command: tuple[str, ...]
    output: Path

    @property
    def text(self) -> str:
        """The command as one would type it."""
        return shlex.join(self.command)


class JobFailed(Exception):
    """A job ended with an error, or was stopped."""

    def __init__(self, job: Job, problem: str) -> None:
        self.job = job
        self.problem = problem
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
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < max_jobs:
                job = waiting.pop()
                running.append((job, _start(job, folder, environment)))
            for job, process in list(running):
                status = process.poll()
                if status is None:
                    continue
                running.remove((job, process))
                if status != 0:
                    raise JobFailed(job, _describe(status))
                done += 1
            if deadline is not None and running and time.monotonic() > deadline:
                raise JobFailed(running[0][0], "time ran out (AITER_BUILD_TIMEOUT)")
            progress.show(done)
            if running:
                time.sleep(_POLL_SECONDS)
    finally:
        for _, process in running:
            _kill(process)
        progress.clear()


def first_error(output: str) -> str:
    """The first line of a compiler's output that reports an error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        if _ERROR_LINE.search(line):
            return line
    return lines[-1] if lines else "no output"


def parse_depfile(text: str) -> list[str]:
    """The files that a Makefile rule written by `-MD -MF` depends on, in order, each once."""
    rule = text.replace("\\\n", " ")
    _, _, names = rule.partition(": ")
    words = re.findall(r"(?:\\.|[^\s\\])+", names)
    unescaped = (re.sub(r"\\([ #\\])", r"\1", word).replace("$$", "$") for word in words)
    return list(dict.fromkeys(unescaped))


def _start(job: Job, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with job.output.open("wb") as output:
        try:
            return subprocess.Popen(
                job.command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            output.write(f"error: cannot start the command: {error.strerror}\n".encode())
            raise JobFailed(job, f"cannot start the compiler: {error.strerror}") from None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a job with everything that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _describe(status: int) -> str:
    if status < 0:
        return f"the compiler was killed by {signal.Signals(-status).name}"
    return f"the compiler exited with status {status}"
