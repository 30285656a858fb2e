"""Does the session on a GPU machine run its steps, stop those that hang, and report what failed?"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from pathlib import Path

import _checkout  # noqa: F401
import gpu_session
import pytest
import torch
from gpu_session import FAILED, LATE, PASSED, SKIPPED, Outcome, Step

sys.path.append(str(Path(__file__).resolve().parent / "fire"))

import sanitize_gpu  # noqa: E402

LONG = 1000  # seconds that no step of a test gets
WAIT_FOR_SECOND = """
import os, pathlib, time
log = pathlib.Path(os.environ["AITER_JIT_DIR"]).parent / "second.log"
while not log.exists() or os.environ["AITER_JIT_DIR"] not in log.read_text():
    time.sleep(0.05)
"""


@pytest.mark.parametrize("kind", ["cpu", "cuda", "rocm"])
def test_the_limits_fit_in_a_session(tmp_path: Path, kind: str) -> None:
    steps = gpu_session.steps(tmp_path, kind)
    assert gpu_session.longest_seconds(steps) < gpu_session.SESSION_SECONDS
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) and names[:2] == ["env", "build"]
    assert names.index("tune") < names.index("soak") < names.index("tests")
    skipped = {step.name for step in steps if step.command is None}
    nvidia = {*sanitize_gpu.TOOLS, "clusters"}
    assert skipped == {"cuda": set(), "rocm": nvidia, "cpu": nvidia | {"tests", "compiled"}}[kind]


@pytest.mark.parametrize("installed", [True, False])
def test_the_tests_share_their_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """Several processes where pytest-xdist is installed, one where it is not."""
    spec = importlib.machinery.ModuleSpec("xdist", None) if installed else None
    monkeypatch.setattr(gpu_session.importlib.util, "find_spec", lambda name: spec)
    (tests,) = (step for step in gpu_session.steps(tmp_path, "cuda") if step.name == "tests")
    assert tests.command is not None
    assert ("-n" in tests.command) == installed


def test_every_step_names_a_program_that_is_there(tmp_path: Path) -> None:
    for step in gpu_session.steps(tmp_path, "cuda"):
        assert step.command is not None
        program = step.command[0]
        assert program == "-m" or (gpu_session.ROOT / program).is_file(), program


def test_a_step_beside_others_does_not_add_to_them() -> None:
    alone, beside = Step("alone", 30, None), Step("beside", 100, None, beside=True)
    assert gpu_session.longest_seconds([alone, beside, alone]) == 130
    assert gpu_session.longest_seconds([alone, beside, *[alone] * 5]) == 180


def test_outcomes(tmp_path: Path) -> None:
    environment = dict(os.environ)
    for name, seconds, command, expected in (
        ("good", LONG, ["-c", "print('fine')"], PASSED),
        ("bad", LONG, ["-c", "raise SystemExit('broken')"], FAILED),
        ("slow", 1, ["-c", "import time; print('begun', flush=True); time.sleep(600)"], LATE),
        ("none", LONG, None, SKIPPED),
    ):
        step = Step(name, seconds, command)
        outcome = gpu_session.run(step, tmp_path / f"{name}.log", environment)
        assert (outcome.step, outcome.result) == (step, expected)
    assert "fine" in (tmp_path / "good.log").read_text()
    assert "broken" in (tmp_path / "bad.log").read_text()
    assert not (tmp_path / "none.log").exists()


def test_a_step_that_runs_late_leaves_nothing_behind(tmp_path: Path) -> None:
    """The step's own children are stopped, too: the last one that holds the pipe has closed it."""
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    hang = f"import time; time.sleep({LONG})"
    child = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hang!r}], close_fds=False)"
    )
    try:
        step = Step("parent", 2, ["-c", child])
        outcome = gpu_session.run(step, tmp_path / "log", dict(os.environ), pass_fds=(writing,))
    finally:
        os.close(writing)
    assert outcome.result == LATE
    with os.fdopen(reading) as pipe:
        assert pipe.read() == ""


def test_the_summary_has_every_step() -> None:
    step = Step("one", 5, ["-m", "aiter", "env"])
    text = gpu_session.summary(
        [Outcome(step, PASSED, 2.0), Outcome(Step("two", 5, None), SKIPPED)], "cpu"
    )
    assert "python -m aiter env" in text and "needs a GPU" in text and "passed" in text


def test_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All steps run although one fails, and the status tells; one step runs alone."""
    planted = [
        Step("first", LONG, ["-c", "raise SystemExit('a reason')"]),
        Step("beside", LONG, ["-c", WAIT_FOR_SECOND], beside=True),
        Step("second", LONG, ["-c", "import os; print(os.environ['AITER_JIT_DIR'])"]),
        Step("third", LONG, None),
    ]
    monkeypatch.setattr(gpu_session, "steps", lambda *_: planted)
    monkeypatch.delenv("AITER_JIT_DIR", raising=False)
    folder = tmp_path / "new"
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", str(folder)])
    assert gpu_session.main() == 1
    printed = capsys.readouterr().out
    assert "first: FAILED" in printed and "a reason" in printed and "second: passed" in printed
    assert "beside: passed" in printed  # it waits for the second, which comes after it
    table = (folder / "summary.txt").read_text()
    assert all(step.name in table for step in planted) and SKIPPED in table
    assert str(folder / "cache") in (folder / "second.log").read_text()
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", str(folder), "--step", "second"])
    assert gpu_session.main() == 0
    assert "first" not in (folder / "summary.txt").read_text()
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", str(tmp_path / "none"), "--list"])
    assert gpu_session.main() == 0 and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, "========= ERROR SUMMARY: 0 errors\n", ""),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", ""),
        (99, "========= ERROR SUMMARY: 3 errors\n", "3 reports"),
        (0, "= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n", "1 reports"),
        (1, "========= ERROR SUMMARY: 0 errors\n", "exit status 1"),
        (0, "right on cuda", "expected a summary"),
    ],
)
def test_the_verdict_on_a_tool(status: int, output: str, expected: str) -> None:
    verdict = sanitize_gpu.verdict(status, output)
    assert expected in verdict if expected else verdict == ""


def test_the_sanitizers_grid_is_right_and_takes_every_path() -> None:
    paths = sanitize_gpu.run_grid(torch.device("cpu"))
    calls = (*sanitize_gpu.CALLS, *sanitize_gpu.RULED, *sanitize_gpu.HIDDEN)
    assert sum(paths.values()) == 3 * len(calls)
    assert all(paths[path] >= len(calls) for path in ("oneshot", "multiphase"))
    assert paths["fused"] > 0 and paths["router"] > 0


def test_the_grid_notices_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = sanitize_gpu.fused_moe.topk_softmax_sorting

    def wrong(*args: object, **kwargs: object) -> tuple[torch.Tensor, ...]:
        outputs = genuine(*args, **kwargs)  # type: ignore[arg-type]
        outputs[0][0] += 1
        return outputs

    monkeypatch.setattr(sanitize_gpu.fused_moe, "topk_softmax_sorting", wrong)
    with pytest.raises(RuntimeError, match="output 0 differs"):
        sanitize_gpu.run_grid(torch.device("cpu"))
