"""Are the kernels clean under the race check and the sanitizers, and would a report be seen?"""

from __future__ import annotations

import subprocess
from pathlib import Path

import check_kernels
import pytest
from checked import python
from kernel_cases import RUNS, Check

PROGRAM = Path(__file__).resolve().parent / "check_kernels.py"
TIMEOUT_SECONDS = 900  # most of it is for building four modules


@pytest.mark.slow
@pytest.mark.parametrize("check", [check for check, _ in check_kernels.QUICK])
def test_kernels_are_clean(check: str) -> None:
    done = subprocess.run(
        python(str(PROGRAM), "--quick", "--check", check),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == [check] * len(RUNS)
    assert {row[-1] for row in rows} == {"0"}


@pytest.mark.parametrize("ending", ["raise RuntimeError('race')", "os.abort()", "sys.exit(3)"])
def test_a_report_is_counted_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: str
) -> None:
    """The second of three cases fails, in a child that is a made-up program."""
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys\n"
        "for i in range(int(sys.argv[2]), 3):\n"
        "    report = None\n"
        "    try:\n"
        f"        if i == 1: {ending}\n"
        "    except RuntimeError as error: report = str(error)\n"
        "    print(json.dumps([0.5, report]), flush=True)\n"
    )
    name = next(iter(RUNS))
    case = check_kernels.make_checks(quick=True)[0].case
    monkeypatch.setattr(check_kernels, "__file__", str(child))
    monkeypatch.setattr(check_kernels, "make_checks", lambda quick: [Check(name, case)] * 3)
    monkeypatch.setattr(check_kernels, "build_checked", lambda *arguments: None)
    outcome = check_kernels.run_checks("race", 64, quick=True)[name]
    assert outcome.cases == 3
    (report,) = outcome.reports
    assert ("race" in report) if ending.startswith("raise") else (repr(case) in report)
