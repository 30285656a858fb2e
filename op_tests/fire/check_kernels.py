"""Do the kernels stay clean under the race check and the sanitizers?

Run as `python op_tests/fire/check_kernels.py [--check race|address|all] [--wave 32|64] [--quick]`.
Builds the checked modules, runs every case of `kernel_cases` in child processes, prints a table,
then every report, and exits with status 1 if there is one. A child that a report ends is replaced by
another that goes on with the next case, so one bug hides no other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import _checkout  # noqa: E402, F401
from checked import (  # noqa: E402
    CHECKS,
    WAVES,
    build_checked,
    checked_environment,
    python,
)
from kernel_cases import MODULES, RUNS, Check, make_checks  # noqa: E402

from aiter.cli.table import format_table  # noqa: E402
from aiter.jit.load import default_loader  # noqa: E402

# Every kernel under each checker, each wave width once: half of the modules to build.
QUICK = (("race", 32), ("address", 64))
CHILD_SECONDS = 1200  # for one child with all its cases


@dataclass
class Outcome:
    """What the cases of one op gave under one checker at one wave width."""

    cases: int = 0
    seconds: float = 0.0
    reports: list[str] = field(default_factory=list)


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", choices=(*CHECKS, "all"), default="all")
    parser.add_argument("--wave", type=int, choices=WAVES, action="append")
    parser.add_argument("--quick", action="store_true", help="the subset that the tests run")
    parser.add_argument("--child", type=int, metavar="FIRST", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        run_child(make_checks(options.quick), options.child, options.wave[0])
        return 0
    rows, reports = [], []
    for check, wave in QUICK if options.quick else itertools.product(CHECKS, WAVES):
        if options.check not in (check, "all") or wave not in (options.wave or WAVES):
            continue
        for name, outcome in run_checks(check, wave, options.quick).items():
            seconds = f"{outcome.seconds:.1f} s"
            rows.append((check, wave, name, outcome.cases, seconds, len(outcome.reports)))
            reports += [f"{check}, wave{wave}, {name}: {text}" for text in outcome.reports]
    print(format_table(("check", "wave", "op", "cases", "time", "reports"), rows))
    for report in reports:
        print(f"\n{report}")
    return 1 if reports else 0


def run_checks(check: str, wave: int, quick: bool) -> dict[str, Outcome]:
    """Runs all cases under `check` at `wave`; the outcome by op."""
    build_checked(default_loader(), MODULES, check, wave)
    checks = make_checks(quick)
    outcomes = {name: Outcome() for name in RUNS}
    first = 0
    while first < len(checks):
        command = python(__file__, "--child", str(first), "--wave", str(wave))
        child = subprocess.run(
            [*command, *(["--quick"] if quick else [])],
            env=checked_environment(check, wave),
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            check=False,
        )
        done = [json.loads(line) for line in child.stdout.splitlines()]
        for offset, (seconds, report) in enumerate(done):
            outcome = outcomes[checks[first + offset].run]
            outcome.cases += 1
            outcome.seconds += seconds
            outcome.reports += [] if report is None else [report]
        first += len(done)
        if first < len(checks):
            # NOTE: the child died in the case that it did not report on.
            outcome = outcomes[checks[first].run]
            outcome.cases += 1
            outcome.reports.append(
                f"{checks[first].case}\n  ended the process with status {child.returncode}:\n"
                f"{child.stderr[-6000:]}"
            )
            first += 1
    return outcomes


def run_child(checks: list[Check], first: int, wave: int) -> None:
    """Runs the checks from `first` on; prints [seconds, report or null] after each."""
    from targets import Target

    target = Target("cpu", wave)
    for check in checks[first:]:
        start = time.perf_counter()
        report = None
        try:
            RUNS[check.run](check.case, target)
        except Exception as error:  # NOTE: whatever goes wrong is what this program is to report.
            report = f"{type(error).__name__}: {error}"
        print(json.dumps([time.perf_counter() - start, report]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
