"""Does the README's table of environment variables say what the package reads?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aiter.jit import envs

README = Path(__file__).resolve().parents[2] / "README.md"


def test_readme_lists_every_variable() -> None:
    if not README.is_file():
        pytest.skip("the README is not part of this installation")
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| (.*?) \|$", README.read_text(), re.MULTILINE)
    expected = [(v.name, v.default_text, v.meaning) for v in envs.VARIABLES]
    assert rows == expected
