"""Does every command's help say what its options are for, and what holds where they are left out?"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import _checkout  # noqa: F401
import pytest

from aiter.cli import demo, demo_model, tune_experts, tune_router
from aiter.cli.main import OWN_PARSERS, main, make_parser, verbs

ROOT = Path(__file__).resolve().parents[2]
PARSERS = {
    **{name: parser for name, parser in verbs(make_parser()).items() if name not in OWN_PARSERS},
    **{name: importlib.import_module(f"aiter.cli.{name}").make_parser() for name in OWN_PARSERS},
    "demo --model": demo_model.make_parser(),
    "tune --experts": tune_experts.make_parser(),
    "tune --router": tune_router.make_parser(),
}
SCRIPTS = (
    "jit/bench_loader.py", "rocm/write_router.py", "rocm/write_tables.py",
    "integrations/test_models.py",
)  # fmt: skip


@pytest.mark.parametrize("command", PARSERS)
def test_options_are_told(command: str) -> None:
    parser = PARSERS[command]
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help, f"{command}: {action.option_strings} has no help"
        default = action.default
        if isinstance(default, int | str) and not isinstance(default, bool):
            if default != argparse.SUPPRESS and default != "":
                assert f"(default {default})" in text, f"{command}: {action.option_strings}"


def test_demo_names_every_model() -> None:
    text = " ".join(demo.make_parser().format_help().split())
    for name in demo_model.MODELS:
        assert name in text


def test_an_option_without_the_one_it_is_for_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["build", "module_expert_load", "--mix"]) == 2
    assert "--mix: expected --device-only beside it, got --mix alone" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_that_take_minutes_answer_before(script: str) -> None:
    """Rather than compile, or write to the documents, for who asked what they do."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "op_tests" / script), "--help"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
