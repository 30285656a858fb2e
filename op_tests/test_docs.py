"""Do the commands of the README and of docs/ work? Every block is run, in its page's order.

`doc_blocks.py` says what the marks of a block mean. Any other mark is an error.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import _checkout  # noqa: F401  (makes a checkout importable)
import pytest
from doc_blocks import CI_RUN, PAGES, ROOT, Block, blocks, commands, is_step_of_ci

import aiter

NEEDED = {"models": "transformers", "cross": "ziglang"}
LEFT_OUT = {"install": "run by .ci/install_blocks.py", "long": "takes minutes"}
SECONDS = 600
# NOTE: gloo asks for the machine's name otherwise, which a container may not resolve.
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", **os.environ}


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks(), ids=str)
def test_block(block: Block) -> None:
    page, marks, text = block.page, block.marks, block.text
    if marks in LEFT_OUT:
        pytest.skip(LEFT_OUT[marks])
    assert marks in ("", *NEEDED), f"{page}: unknown mark {marks!r}"
    if marks:
        pytest.importorskip(NEEDED[marks])
    if block.language == "python":
        command = [sys.executable, "-c", text]
    else:
        command = ["bash", "-c", f"set -e\npython() {{ '{sys.executable}' \"$@\"; }}\n{text}"]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{page}:\n{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_pages_have_blocks() -> None:
    found = {block.page for block in blocks()}
    assert {"README.md", "adding_an_op.md", "debugging.md", "kernel.md"} <= found


def test_ci_runs_the_blocks_that_install() -> None:
    """Each is run by `.ci/install_blocks.py` or a step of `.ci/run`; the test suite is the latter."""
    if not CI_RUN.is_file():
        pytest.skip(".ci is not part of this installation")
    assert ".ci/install_blocks.py" in CI_RUN.read_text().splitlines()
    install = [block for block in blocks() if block.marks == "install"]
    steps = [block for block in install if is_step_of_ci(block)]
    assert 0 < len(steps) < len(install)
    for block in install:
        suite = "python -m pytest op_tests" in commands(block.text)
        assert block in steps or not suite, f"{block}: the suite beside commands not of .ci/run"


def test_the_largest_batches_are_the_ones_of_now() -> None:
    """The table of `kernel.md` has what the CPU target computes."""
    text = (ROOT / "docs" / "kernel.md").read_text()
    table = text[text.index("| E | K | largest M |") :].split("\n\n", 1)[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|$", table, re.MULTILINE)
    assert rows
    for num_experts, topk, most in (map(int, row) for row in rows):
        found = aiter.fused_topk_moe_sorting_max_tokens(num_experts, topk, device="cpu")
        assert found == most, f"E={num_experts} K={topk}: expected {most} as the page says"


def test_commands_of_a_block() -> None:
    text = "a 'x;y' && b  # why\n# nothing\nc \\\n  --d\n"
    assert commands(text) == ["a 'x;y'", "b", "c    --d"]


def headings(text: str) -> set[str]:
    """What links lead to within a page, as GitHub names its headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    found = 0
    for page in PAGES:
        for link, heading in re.findall(r"\]\(([^)#:]*)#?([^)#:]*)\)", page.read_text()):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: no {link}"
            if heading:
                found += 1
                assert heading in headings(target.read_text()), f"{page.name}: no {link}#{heading}"
    assert found


NAMED_PAGE = re.compile(r'docs/([a-z_]+\.md)\b(?:[^\n"]{0,12}\("([^"\n]+)"\))?')


def test_pages_that_code_names_are_there() -> None:
    """With the heading, where one follows: docs/PAGE.md ("end of the heading")."""
    found = 0
    paths = [*(ROOT / "aiter").rglob("*.py"), *(ROOT / "csrc").rglob("*.[hc]*")]
    for path in filter(Path.is_file, paths):
        text = path.read_text()
        for name, title in NAMED_PAGE.findall(text):
            page = ROOT / "docs" / name
            assert page.is_file(), f"{path}: no docs/{name}"
            if title:
                found += 1
                assert f"{title}\n" in page.read_text(), f'{path}: docs/{name} has no "{title}"'
        assert not re.search(r"docs/[a-z_]+\.md, section \d", text), f"{path}: a numbered section"
    assert found >= 2
