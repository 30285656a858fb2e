"""Do the commands of the README and of docs/ work? Every block is run, in its page's order.

A block's info string says what it is: `bash` and `python` are run from the checkout; `bash install`
changes the environment and is left to `.ci/run`, `bash gpu` needs a GPU, `bash long` takes minutes
and names what CI runs instead, `models` needs transformers. Any other word is an error.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import _checkout  # noqa: F401  (makes a checkout importable)
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|python)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEFT_OUT = {"install": "changes the environment", "long": "takes minutes"}
SECONDS = 600


def blocks() -> list[tuple[str, str, str, str]]:
    """Page, language, marks and text of every block."""
    return [
        (page.name, language, marks.strip(), text)
        for page in PAGES
        for language, marks, text in BLOCK.findall(page.read_text())
    ]


@pytest.mark.parametrize(
    ("page", "language", "marks", "text"),
    blocks(),
    ids=lambda value: value.splitlines()[0][:60] if value else "plain",
)
def test_block(page: str, language: str, marks: str, text: str) -> None:
    if marks in LEFT_OUT:
        pytest.skip(LEFT_OUT[marks])
    if marks == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if marks == "models":
        pytest.importorskip("transformers")
    assert marks in ("", "gpu", "models"), f"{page}: unknown mark {marks!r}"
    code = (
        text
        if language == "python"
        else f"set -e\npython() {{ '{sys.executable}' \"$@\"; }}\n{text}"
    )
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"{page}:\n{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_pages_have_blocks() -> None:
    found = {page for page, *_ in blocks()}
    assert {"README.md", "adding_an_op.md", "debugging.md", "kernel.md"} <= found


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: no {link}"
