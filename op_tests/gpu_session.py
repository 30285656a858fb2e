"""Everything that has to run on a GPU machine once, in order, with a time limit per step.

    python op_tests/gpu_session.py FOLDER [--step NAME ...] [--list]

Writes one log per step, the benches' CSV files and plots, and `summary.txt` into FOLDER. A step that
fails or runs out of time is reported and the next one runs; the exit status is 1 if any did not
pass. With `--step`, only the named steps run. What measures time has the GPU for itself; then
the soak runs beside the tests, which share their work among processes where pytest-xdist is installed,
and the sanitizers. The limits add up to less than 25 minutes, on 16 cores and one GPU. Without a GPU,
every step that needs one is skipped, and the others run small on the cpu target, which tests this
program. Builds go to AITER_JIT_DIR, or to FOLDER/cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import _checkout  # noqa: F401  (makes a checkout importable)
import torch
from bench_fused_topk_moe_sorting import SHAPES

from aiter.cli.table import format_table

ROOT = Path(__file__).resolve().parents[1]
SESSION_SECONDS = 25 * 60
PYTHON = sys.executable
TEST_PROCESSES = 12
ROUTERS = ("2880,128,4", "7168,256,8", "4096,512,10")
BENCH = "op_tests/bench_fused_topk_moe_sorting.py"
SOAK = "op_tests/fire/soak.py"
PASSED, FAILED, LATE, SKIPPED = "passed", "FAILED", "OUT OF TIME", "skipped"


@dataclass(frozen=True)
class Step:
    """One command, as on the command line after `python`; None where the machine cannot run it.

    With `beside`, the steps after it run at the same time.
    """

    name: str
    seconds: int
    command: list[str] | None
    beside: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    step: Step
    result: str
    seconds: float = 0.0


def steps(folder: Path, kind: str) -> list[Step]:
    """The steps on a machine of a `kind`: cuda, rocm or, for a trial of this program, cpu."""
    gpu = kind != "cpu"
    plots = importlib.util.find_spec("matplotlib") is not None

    def figures(name: str) -> list[str]:
        plot = ["--plot", f"{folder}/{name}.png"] if plots else []
        return ["--csv", f"{folder}/{name}.csv", *plot]

    small = [] if gpu else ["--device", "cpu", "--shape", "32,4,64", "--tokens", "1,4"]
    tuned = (
        [part for shape in SHAPES for part in ("--shape", shape)] if gpu else ["--dry-run", *small]
    )
    routers = (
        [part for shape in ROUTERS for part in ("--router", shape)] if gpu
        else ["--dry-run", "--device", "cpu", "--router", "136,32,4", "--tokens", "1,4"]
    )  # fmt: skip
    tests = ["op_tests", *(f"--ignore=op_tests/{name}" for name in ("jit", "rocm", "fire"))]
    if importlib.util.find_spec("xdist") is not None:
        tests += ["-n", str(TEST_PROCESSES)]
    sanitize = ["op_tests/fire/sanitize_gpu.py", "--tool"]
    return [
        Step("env", 60, ["-m", "aiter", "env"]),
        Step("build", 120, ["-m", "aiter", "build", "--all", "--target", kind]),
        Step("selftest", 60, ["-m", "aiter", "selftest", *([] if gpu else ["--quick"])]),
        Step("host", 30, ["op_tests/bench_host.py", "--csv", f"{folder}/host.csv"]),
        Step("bench", 200, [BENCH, "--no-compile", *small, *figures("bench")]),
        Step(
            "compiled", 90,
            [BENCH, "--compile", "--tokens", "1,32,256", *figures("compiled")] if gpu else None,
        ),
        Step(
            "clusters", 60,
            [BENCH, "--clusters", "1,8,16", "--tokens", "16,32,64,122,256,1024",
             *figures("clusters")] if kind == "cuda" else None,
        ),
        # NOTE: the last ones that measure, as the others are to run by the rule of capacity.
        Step("tune", 120, ["-m", "aiter", "tune", *tuned]),
        Step("tune-router", 60, ["-m", "aiter", "tune", *routers]),
        Step("soak", 690, [SOAK, "--minutes", "10" if gpu else "0.2"], beside=True),
        Step("tests", 450, ["-m", "pytest", "-q", "--durations=15", *tests] if gpu else None),
        *(
            Step(tool, 60, [*sanitize, tool] if kind == "cuda" else None)
            for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
        ),
    ]  # fmt: skip


def longest_seconds(chosen: Sequence[Step]) -> int:
    """What the steps take if each takes as long as it may."""
    seconds, end_of_beside = 0, 0
    for step in chosen:
        if step.beside:
            end_of_beside = max(end_of_beside, seconds + step.seconds)
        else:
            seconds += step.seconds
    return max(seconds, end_of_beside)


def run(
    step: Step, log: Path, environment: dict[str, str], pass_fds: Sequence[int] = ()
) -> Outcome:
    """Runs a step to its end or its limit, its whole process group with it."""
    if step.command is None:
        return Outcome(step, SKIPPED)
    start = time.monotonic()
    with log.open("w") as output:
        print(f"$ python {shlex.join(step.command)}", file=output, flush=True)
        process = subprocess.Popen(
            [PYTHON, *step.command], cwd=ROOT, env=environment, stdout=output, stderr=output,
            start_new_session=True, pass_fds=pass_fds,
        )  # fmt: skip
        try:
            result = PASSED if process.wait(timeout=step.seconds) == 0 else FAILED
        except subprocess.TimeoutExpired:
            result = LATE
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(step, result, time.monotonic() - start)


def summary(outcomes: Sequence[Outcome], kind: str) -> str:
    """The table of the steps."""
    rows = []
    for outcome in outcomes:
        note = f"python {shlex.join(outcome.step.command or ['-'])}"
        if outcome.result == SKIPPED:
            note = f"needs {'an NVIDIA GPU' if kind == 'rocm' else 'a GPU'}"
        limit = f"{outcome.step.seconds} s"
        rows.append((outcome.step.name, outcome.result, f"{outcome.seconds:.0f} s", limit, note))
    return format_table(("step", "result", "time", "limit", "command"), rows)


def machine_kind() -> str:
    """cuda, rocm or cpu."""
    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if torch.version.hip is None else "rocm"


def main() -> int:
    kind = machine_kind()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=lambda text: Path(text).resolve(), help="for the results")
    names = [step.name for step in steps(Path(), kind)]
    parser.add_argument("--step", action="append", choices=names, help="only this one; repeatable")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args()
    chosen = [s for s in steps(options.folder, kind) if s.name in (options.step or names)]
    if options.list:
        print(summary([Outcome(s, "" if s.command else SKIPPED) for s in chosen], kind))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    environment = {"AITER_JIT_DIR": str(options.folder / "cache"), **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part
    )

    def carry_out(step: Step) -> Outcome:
        log = options.folder / f"{step.name}.log"
        outcome = run(step, log, environment)
        print(f"{step.name}: {outcome.result}, {outcome.seconds:.0f} s", flush=True)
        if outcome.result in (FAILED, LATE):
            print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:]))
        return outcome

    with ThreadPoolExecutor() as beside:
        running: list[Outcome | Future[Outcome]] = [
            beside.submit(carry_out, step) if step.beside else carry_out(step) for step in chosen
        ]
        outcomes = [each.result() if isinstance(each, Future) else each for each in running]
    text = summary(outcomes, kind)
    (options.folder / "summary.txt").write_text(text + "\n")
    print(f"\n{text}\n\nresults in {options.folder}")
    return 1 if any(outcome.result in (FAILED, LATE) for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
