"""How does a plan become a shared object in the cache?

Everything happens in a private folder inside the cache (`builders` hands it out); one rename
publishes it. A file lock per plan only saves double work: where it cannot be had, two builders
publish equal builds and the first wins. The builder looks the plan up again under the lock, so any
number of processes that miss at the same time compile once.

What is published must be what was hashed. Sources are hashed before and after the compilers ran. A
header is known only afterwards: on the first attempt one that is not older than the build's start,
by the clock of the cache's filesystem, counts as changed, and so does that clock itself if it was set
back; later attempts compare a header's content before and after. The build is then repeated, a few
times at most, as it is when the cache folder was removed meanwhile.
"""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from . import envs, toolchain
from .builders import plan_lock, private_folder
from .cache import BUILD_LOG, FAILED_DIR, TOOL_DIR, Cache
from .driver import Job, JobFailed, first_error, parse_depfile, run_jobs
from .errors import BuildError
from .folders import file_mode
from .full_disk import why_compiler_failed
from .log import get_logger
from .manifest import Entry, Header, file_sha256, stat_of
from .plan import Plan
from .progress import Progress
from .rocm_flags import unknown_arch

MAX_ATTEMPTS = 4
_TICK_SECONDS = 0.05
_CLOCK_TOLERANCE_SECONDS = 1.0


@dataclass(frozen=True)
class _Result:
    """What one attempt gave; `changed` names a file that was edited meanwhile."""

    headers: list[Header]
    changed: str | None


def build(make_plan: Callable[[], Plan], cache: Cache, reason: str, force: bool) -> Entry:
    """Builds what `make_plan` describes, or takes what another process built meanwhile.

    Args:
        make_plan: gives the plan afresh; called again if a source changes during the build.
        reason: why, for the log.
        force: whether to build even if the cache has it.

    Raises:
        BuildError: the compiler failed, ran out of time, or files kept changing.
        CacheError: the cache folder cannot be written.
        ToolchainError: Python's headers are missing.
    """
    toolchain.check_python_headers()
    known: dict[str, str] = {}
    changed: str | None = None
    for _ in range(MAX_ATTEMPTS):
        started = time.monotonic()
        plan = make_plan()
        with private_folder(cache) as folder, plan_lock(cache, plan):
            if not force:
                found = cache.lookup(plan)
                if isinstance(found, Entry):
                    return found
            known = _hashes(known)
            try:
                result = _attempt(plan, cache, folder, reason, known)
                if result.changed is None:
                    entry = cache.publish(plan, folder, result.headers, force)
                    seconds = time.monotonic() - started
                    get_logger().info("built %s in %.1f s: %s", plan.module, seconds, entry.library)
                    return entry
            except (OSError, BuildError):
                if folder.is_dir():
                    raise
                result = _Result([], str(cache.root))
        changed = result.changed
        reason = f"{changed} changed during the build"
        known = {plan.roots.expand(header.path): header.sha256 for header in result.headers}
    raise BuildError(
        plan.module,
        plan.target.label,
        f"expected files that keep still during a build, got {changed} changed in each of"
        f" {MAX_ATTEMPTS} attempts; end what edits or removes it, then try again",
    )


def _hashes(paths: Iterable[str]) -> dict[str, str]:
    """The hashes of those files that can be read."""
    hashes = {}
    for path in paths:
        try:
            hashes[path] = file_sha256(Path(path))
        except OSError:
            continue
    return hashes


def _attempt(plan: Plan, cache: Cache, folder: Path, reason: str, known: dict[str, str]) -> _Result:
    """Compiles and links in `folder`; `known` maps headers to their hashes before the build."""
    logger = get_logger()
    logger.info("building %s for %s (%s)", plan.module, plan.target.label, reason)
    started = time.monotonic()
    if plan.compiler.family == "zig" and not (cache.root / TOOL_DIR).is_dir():
        logger.info("zig compiles its own C++ library first: a minute or two, once per cache")
    start_ns = _clock_tick(folder / "clock")
    started_clock = time.monotonic()
    compiles, link = _jobs(plan, folder)
    limit = envs.AITER_BUILD_TIMEOUT.get()
    deadline = None if limit is None else started + limit
    progress = Progress(f"{plan.module} for {plan.target.label}", len(compiles) + 1)
    environment = envs.child_environment(
        {
            **plan.environment,
            "ZIG_GLOBAL_CACHE_DIR": str(cache.root / TOOL_DIR),
            "ZIG_LOCAL_CACHE_DIR": str(folder / "zig"),
        }
    )
    max_jobs = envs.MAX_JOBS.get() or os.cpu_count() or 1
    show = plan.verbose or envs.AITER_LOG_MORE.get()
    if show:
        for job in (*compiles, link):
            logger.info("command: %s", job.text)
    try:
        run_jobs(compiles, folder, environment, max_jobs, deadline, progress)
        run_jobs([link], folder, environment, 1, deadline, progress, len(compiles))
        if folder.is_dir() and not (folder / plan.library_name).is_file():
            raise JobFailed(link, "the compiler succeeded, and wrote no shared object", "")
    except JobFailed as failure:
        raise _build_error(plan, cache, folder, [*compiles, link], failure) from None
    log = _write_log(folder / BUILD_LOG, [*compiles, link])
    if show and log.strip():
        logger.info("output of the compilers:\n%s", log)
    result = _check_inputs(plan, folder, start_ns, known)
    passed = (_filesystem_time(folder / "clock") - start_ns) / 1e9
    if passed < time.monotonic() - started_clock - _CLOCK_TOLERANCE_SECONDS and not known:
        result = _Result(result.headers, result.changed or "the filesystem's clock")
    _tidy(folder, plan)
    return result


def _clock_tick(path: Path) -> int:
    """The time by the filesystem's clock, just after it ticked.

    A file edited before the call is older than that, one edited afterwards is not, although such
    clocks advance in steps of milliseconds. Where steps are longer, an edit just before the build
    looks like one during it, which costs a second attempt.
    """
    now = first = _filesystem_time(path)
    end = time.monotonic() + _TICK_SECONDS
    while now == first and time.monotonic() < end:
        time.sleep(0.001)
        now = _filesystem_time(path)
    return now


def _filesystem_time(path: Path) -> int:
    """What the filesystem's clock says, by touching the file `path`."""
    path.touch()
    return path.stat().st_mtime_ns


def _jobs(plan: Plan, folder: Path) -> tuple[list[Job], Job]:
    """The compile jobs and the link job; writes rendered templates."""
    command = plan.compiler.command
    compiles = []
    objects = []
    for index, source in enumerate(plan.sources):
        path = source.path
        if source.rendered is not None:
            path = folder / f"{index}-{path.name.removesuffix('.jinja')}"
            path.write_text(source.rendered, encoding="utf-8")
            path = Path(path.name)
        name = f"{index}-{path.name.removeprefix(f'{index}-')}"
        objects.append(f"{name}.o")
        words = (*command, *source.flags, "-MD", "-MF", f"{name}.d", "-c", str(path))
        compiles.append(Job((*words, "-o", f"{name}.o"), folder / f"{name}.txt"))
    words = (*command, *plan.link, *objects, "-o", plan.library_name, *plan.link_tail)
    # NOTE: device code takes longest, so it starts first; a stable sort keeps the rest in order.
    compiles.sort(key=lambda job: ".cu.o" not in job.command[-1])
    return compiles, Job(words, folder / "link.txt")


def _check_inputs(plan: Plan, folder: Path, start_ns: int, known: dict[str, str]) -> _Result:
    """The headers that the compilers read, and the first file that changed since the start."""
    own = {str(source.path) for source in plan.sources if source.rendered is None}
    paths: dict[str, None] = {}
    for depfile in sorted(folder.glob("*.d")):
        for name in parse_depfile(os.fsdecode(depfile.read_bytes())):
            path = str(folder / name)
            # NOTE: only the real path is safe where ".." may follow a link.
            path = os.path.realpath(path) if "/../" in path else os.path.normpath(path)
            if path not in own and not path.startswith(f"{folder}/"):
                paths[path] = None
    changed: str | None = None
    headers = []
    for path in sorted(paths):
        try:
            stat = stat_of(path)
            sha256 = file_sha256(Path(path))
        except OSError:
            changed = changed or path
            continue
        late = max(stat[1], stat[2]) >= start_ns
        if known[path] != sha256 if path in known else late:
            changed = changed or path
        # NOTE: a stat from the build's own time could hide a later edit; such a one is not kept.
        trusted = (stat[0], 0, 0) if late else stat
        headers.append(Header(plan.roots.shorten(path), trusted, sha256))
    for source in plan.sources:
        if source.rendered is None and not _holds(source.path, source.sha256):
            changed = changed or str(source.path)
    return _Result(headers, changed)


def _holds(path: Path, sha256: str) -> bool:
    try:
        return file_sha256(path) == sha256
    except OSError:
        return False


def _tidy(folder: Path, plan: Plan) -> None:
    """Leaves only what is worth keeping in the folder."""
    for item in folder.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name not in (plan.library_name, BUILD_LOG):
            item.unlink()


def _write_log(path: Path, jobs: list[Job]) -> str:
    """Writes every command with its output; returns the outputs alone."""
    outputs = [
        job.output.read_text(encoding="utf-8", errors="replace") if job.output.exists() else ""
        for job in jobs
    ]
    parts = [f"$ {job.text}\n{output}" for job, output in zip(jobs, outputs, strict=True)]
    path.write_text("\n".join(parts), encoding="utf-8", errors="surrogateescape")
    return "".join(outputs)


def _why_failed(plan: Plan, failure: JobFailed, folder: Path) -> str:
    """What the first line of the error says: the cause where it is known, else the status."""
    full = why_compiler_failed(failure.output, folder, failure.killed)
    if full is not None:
        return f"expected room to write, got {full} ({failure.problem})"
    if plan.target.kind == "rocm":
        unknown = unknown_arch(failure.output, plan.target.archs)
        if unknown is not None:
            return (
                f"expected a compiler that knows {unknown}, got {shlex.join(plan.compiler.command)},"
                f" which does not: {unknown} needs a newer ROCm ({failure.problem})"
            )
    return failure.problem


def _build_error(
    plan: Plan, cache: Cache, folder: Path, jobs: list[Job], failure: JobFailed
) -> BuildError:
    """Keeps the log of a failed build and describes it."""
    kept = cache.root / FAILED_DIR / f"{plan.module}-{plan.place.parent.name}-{plan.key[:16]}.log"
    problem = _why_failed(plan, failure, folder)
    log = folder / BUILD_LOG
    try:
        cache.make_folder(FAILED_DIR)
        _write_log(log, [job for job in jobs if job.output.exists()])
        log.chmod(file_mode())
        log.replace(kept)
    except OSError as error:
        if not folder.is_dir():
            raise
        # NOTE: what the compiler said matters more than that its log could not be kept.
        return BuildError(
            plan.module,
            plan.target.label,
            f"{problem}, and its log could not be kept ({error.strerror}: {cache.root})",
            shlex.join(failure.job.command),
            first_error(failure.output),
        )
    stopped = "time ran out" in failure.problem
    return BuildError(
        plan.module,
        plan.target.label,
        problem,
        shlex.join(failure.job.command),
        "" if stopped else first_error(failure.output),
        kept,
    )
