"""Does a short soak stay right and flat, and would growth or a wrong result be seen?"""

from __future__ import annotations

import subprocess

import pytest
import soak
from checked import python
from soak import Size, problems

MINUTES = 1 / 6
TIMEOUT_SECONDS = 900  # most of it is for building modules


@pytest.mark.slow
def test_a_short_soak_is_right_and_flat() -> None:
    """In a process of its own: this one's memory belongs to all tests."""
    done = subprocess.run(
        python(str(soak.__file__), "--minutes", str(MINUTES)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all right" in done.stdout


GROWN = {
    "resident memory": Size(soak.MOST_GROWTH_BYTES["cpu"] + 1, 0, 9),
    "GPU memory": Size(0, 1, 9),
    "open files": Size(0, 0, 10),
}


@pytest.mark.parametrize("what", GROWN)
def test_growth_is_a_problem(what: str) -> None:
    (problem,) = problems("cpu", Size(0, 0, 9), GROWN[what])
    assert problem.startswith(f"{what}: expected at most ")


def test_the_same_size_is_none() -> None:
    assert problems("cpu", Size(5, 5, 5), Size(5, 5, 5)) == []


def test_a_wrong_result_ends_the_soak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(*arguments: object, **options: object) -> None:
        return None

    monkeypatch.setattr(soak.aiter, "topk_softmax", nothing)
    monkeypatch.setattr(soak, "STEPS", {"topk_softmax": soak.STEPS["topk_softmax"]})
    monkeypatch.setattr(soak, "SHAPES", ((8, 32, 4),))
    monkeypatch.setattr(soak, "cold_start", lambda: None)
    monkeypatch.setattr("sys.argv", ["soak.py", "--minutes", "0.001", "--device", "cpu"])
    assert soak.main() == 1
    assert "wrong after seed 0: topk_indices" in capsys.readouterr().out
