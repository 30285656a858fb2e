"""Which commands do the documents show?

A fenced block's info string says what it is: `bash` and `python` are run from the checkout by
`test_docs.py`; `bash install` changes the environment and is run by `.ci/install_blocks.py`, in an
environment of its own; `bash long` takes minutes and names what CI runs instead; `models` needs
transformers, `cross` ziglang. Standard library only, since nothing is installed yet where it is read
first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CI_RUN = ROOT / ".ci" / "run"
_BLOCK = re.compile(r"^```(bash|python)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page's name, `bash` or `python`, its marks and its text."""

    page: str
    language: str
    marks: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0][:60]}"


def blocks() -> list[Block]:
    """Every block, in the order of the pages and of their text."""
    return [
        Block(page.name, language, marks.strip(), text)
        for page in PAGES
        for language, marks, text in _BLOCK.findall(page.read_text())
    ]


def commands(text: str) -> list[str]:
    """The commands of a shell text: one for each line and each side of `&&`, without comments."""
    lines = (re.sub(r"(^|\s)#.*", "", line) for line in text.replace("\\\n", " ").splitlines())
    return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


def is_step_of_ci(block: Block) -> bool:
    """Whether every command of a block is a line of `.ci/run` itself, as the test suite is."""
    return set(commands(block.text)) <= set(CI_RUN.read_text().splitlines())
