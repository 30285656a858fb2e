"""Does any input make the loader or an op do what is not documented?

Run as `python op_tests/fire/fuzz.py [--inputs 1000000] [--seed 0] [--kind NAME ...]`. Draws inputs of
every kind, gives each to what it is meant for and judges what happens: a result that a plain
recomputation confirms, or a documented exception that leaves every output as it was. Prints a table
and every finding, and exits with status 1 if there is one.

Every input is a function of seed, kind and number alone, so `--kind K --only N` repeats one. The
inputs are drawn by hand-written generators (`fuzz_loader`, `fuzz_ops`) from a seeded `random.Random`:
hypothesis draws some hundred inputs a second, these draw thousands. Children do the work and tell how
far they are; one that dies is replaced by another that goes on behind the input that ended it.

With `--check address` the ops run in the cpu target's build with the address sanitizer, and their
tensors are allocated one by one, so that it knows their bounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import _checkout  # noqa: E402, F401
from checked import WAVES, build_checked, checked_environment, python  # noqa: E402

from aiter.cli.table import format_table  # noqa: E402

REPORT_EVERY = 500
CHILD_SECONDS = 3600
MOST_FINDINGS = 10  # per kind; what comes after the first is mostly the same
MOST_DEATHS = 3
DEATH = "ended the process"

Judge = Callable[[random.Random], str]
"""Draws an input and judges it: returns what happened in a word, raises on a finding."""


@dataclass
class Outcome:
    """What the inputs of one kind gave."""

    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def shares() -> dict[str, float]:
    """The kinds of input and how many of all inputs are of each."""
    return {
        "config": 0.3,
        "template": 0.06,
        "target": 0.08,
        "variable": 0.08,
        "depfile": 0.06,
        "compiler memo": 0.06,
        "manifest": 0.08,
        "prebuilt": 0.04,
        "sizes": 0.05,
        "expert_load": 0.04,
        "topk_softmax": 0.05,
        "moe_sorting_opus": 0.04,
        "fused_topk_moe_sorting": 0.04,
        "routing": 0.02,
    }


OPS = (
    "sizes",
    "expert_load",
    "topk_softmax",
    "moe_sorting_opus",
    "fused_topk_moe_sorting",
    "routing",
)


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", nargs="+", choices=shares(), help="only these")
    parser.add_argument("--only", type=int, metavar="N", help="only this input of the kind")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for the ops")
    parser.add_argument("--check", choices=("address",), help="run the ops, under this checker")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        run_child(options)
        return 0
    kinds = options.kind or (OPS if options.check else list(shares()))
    total = sum(shares()[kind] for kind in kinds)
    outcomes = {}
    for kind in kinds:
        count = max(1, round(options.inputs * shares()[kind] / total))
        first = 0 if options.only is None else options.only
        end = count if options.only is None else options.only + 1
        outcomes[kind] = run_kind(options, kind, first, end)
    show(options, outcomes)
    return 1 if any(outcome.findings for outcome in outcomes.values()) else 0


def run_kind(options: argparse.Namespace, kind: str, first: int, end: int) -> Outcome:
    """Gives the inputs `first` to `end` of `kind` to children; what they report, and their deaths."""
    outcome = Outcome()
    environment = dict(os.environ)
    if options.check:
        from fuzz_ops import MODULES

        from aiter.jit.load import default_loader

        for wave in WAVES:
            build_checked(default_loader(), MODULES, options.check, wave)
        environment = checked_environment(options.check, WAVES[0])
    with tempfile.NamedTemporaryFile() as mark:
        while first < end and len(outcome.findings) < MOST_FINDINGS:
            if outcome.counts[DEATH] == MOST_DEATHS:
                break
            arguments = ["--child", mark.name, "--kind", kind, "--seed", str(options.seed)]
            arguments += ["--only", str(first), "--inputs", str(end), "--device", options.device]
            arguments += ["--check", options.check] if options.check else []
            child = subprocess.run(
                python(__file__, *arguments),
                env=environment,
                capture_output=True,
                text=True,
                timeout=CHILD_SECONDS,
                check=False,
            )
            for line in child.stdout.splitlines():
                seconds, counts, findings, first = json.loads(line)
                outcome.seconds += seconds
                outcome.counts.update(counts)
                outcome.findings += findings
            if child.returncode != 0:
                text = mark.file.seek(0) or mark.file.read().decode()
                at = int(text) if text else first
                outcome.counts[DEATH] += 1
                outcome.findings.append(
                    f"{kind} {at}: ended the process with status {child.returncode}:\n"
                    f"{child.stderr[-3000:]}"
                )
                first = at + 1
    return outcome


def run_child(options: argparse.Namespace) -> None:
    """Judges the inputs from `--only` up to `--inputs`; a line of JSON after every few hundred."""
    (kind,) = options.kind
    mark = os.open(options.child, os.O_WRONLY)
    with judges(kind, options.device, bool(options.check)) as judge:
        outcome, start = Outcome(), time.perf_counter()
        for number in range(options.only, options.inputs):
            os.pwrite(mark, b"%20d" % number, 0)
            try:
                outcome.counts[judge(random.Random(f"{options.seed} {kind} {number}"))] += 1
            except Exception as error:  # NOTE: whatever was not documented is a finding.
                outcome.counts["findings"] += 1
                outcome.findings.append(f"{kind} {number}: {type(error).__name__}: {error}")
            done = number + 1 == options.inputs or len(outcome.findings) >= MOST_FINDINGS
            if done or (number + 1) % REPORT_EVERY == 0:
                seconds = time.perf_counter() - start
                report = [seconds, outcome.counts, outcome.findings, number + 1]
                print(json.dumps(report), flush=True)
                outcome, start = Outcome(), time.perf_counter()
            if done:
                return


@contextlib.contextmanager
def judges(kind: str, device: str, exact: bool) -> Iterator[Judge]:
    """The judge of one kind, ready to be called."""
    if kind in OPS:
        from fuzz_ops import Ops

        yield Ops(device, exact).judge(kind)
        return
    from fuzz_loader import LoaderJudges

    # In memory where that can be: files are written for most inputs.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield LoaderJudges(Path(folder)).judge(kind)


def show(options: argparse.Namespace, outcomes: dict[str, Outcome]) -> None:
    """Prints the table and the findings."""
    rows = []
    for kind, outcome in outcomes.items():
        number = outcome.counts.total()
        words = ", ".join(f"{word} {count}" for word, count in sorted(outcome.counts.items()))
        speed = f"{number / outcome.seconds:.0f}/s" if outcome.seconds else "-"
        rows.append((kind, number, f"{outcome.seconds:.1f} s", speed, words))
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    number = sum(outcome.counts.total() for outcome in outcomes.values())
    rows.append(("all", number, f"{seconds:.1f} s", f"{number / max(seconds, 1e-9):.0f}/s", ""))
    print(f"seed {options.seed}, ops on {options.device}{', ' + (options.check or 'no')} check")
    print(format_table(("kind", "inputs", "time", "speed", "what happened"), rows))
    for outcome in outcomes.values():
        for finding in outcome.findings:
            print(f"\n{finding}")


if __name__ == "__main__":
    sys.exit(main())
