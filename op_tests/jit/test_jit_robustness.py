"""Is docs/robustness.md true of the tests: do those that it names exist, one at least per fault?"""

from __future__ import annotations

import re

from toy import REPOSITORY

PAGE = REPOSITORY / "docs" / "robustness.md"


def rows() -> list[list[str]]:
    """The cells of the table of faults, without its two header lines."""
    section = PAGE.read_text().split("## Faults and their tests")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_fault_names_tests_that_exist() -> None:
    defined = set()
    for path in (REPOSITORY / "op_tests").rglob("test_*.py"):
        defined |= set(re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE))
    table = rows()
    assert len(table) > 40
    for fault, happens, tests in table:
        named = re.findall(r"`(\w+)`", tests)
        assert fault and happens and named, f"expected three full cells, got {fault!r}"
        assert set(named) <= defined, f"{fault}: no test {set(named) - defined}"
