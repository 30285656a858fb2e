"""Does `python -m aiter demo --model` compare what it says it compares?"""

from __future__ import annotations

import re
import sys

import _checkout  # noqa: F401
import pytest
from targets import Target

from aiter.cli import demo_model
from aiter.cli.main import main

SMALL = ["--layers", "2", "--steps", "3", "--model-dim", "64", "--width", "32", "--experts", "8"]


def test_tokens_are_equal(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    wave = [] if target.wave is None else ["--wave", str(target.wave)]
    status = main(["demo", "--model", "gpt-oss", *SMALL, "--device", target.device, *wave])
    printed = capsys.readouterr().out
    assert status == 0
    assert "tokens equal to the untouched model's: 6 of 6" in printed
    for layer in range(2):
        # NOTE: which path is the fastest depends on the device, and on what was tuned there.
        row = next(line for line in printed.splitlines() if f"layers.{layer}.mlp" in line)
        calls = re.findall(r"(?:fused|oneshot|multiphase): (\d+) calls", row)
        assert sum(map(int, calls)) == 3


def test_deepseek_v3(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(["demo", "--model", "deepseek-v3", *SMALL, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "tokens equal to the untouched model's: 6 of 6" in printed
    rows = [line for line in printed.splitlines() if line.startswith("model.layers.")]
    assert "no experts" in rows[0] and re.search(r"(fused|oneshot|multiphase): \d+ calls", rows[1])
    assert len(rows) == 2


def test_other_tokens_are_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    generate, calls = demo_model._generate, []

    def off_by_one(*arguments: object) -> object:
        calls.append(None)
        tokens = generate(*arguments)  # type: ignore[arg-type]
        tokens[1, 2] += len(calls)
        return tokens

    monkeypatch.setattr(demo_model, "_generate", off_by_one)
    assert main(["demo", "--model=mixtral", *SMALL, "--device", "cpu"]) == 1
    assert "MISMATCH: sequence 1, step 2: expected token" in capsys.readouterr().err


def test_without_transformers_the_error_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["demo", "--model", "gpt-oss"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: transformers: expected it to be installed for --model gpt-oss")
    assert "pip install -c constraints.txt -e '.[models]'" in error


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--model", "llama"])
    assert "invalid choice: 'llama'" in capsys.readouterr().err
