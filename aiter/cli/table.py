"""How does a table look in a terminal?

Columns are as wide as their widest cell; a column whose cells are all numbers is right-aligned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"[-+]?[\d.,]+( ?(%|x|us|ms|s|[kMG]i?B|B))?|-|")


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The table as text, one line per row, without a line break at the end.

    Args:
        headers: the column titles.
        rows: the cells; each row has one per header.

    Raises:
        ValueError: a row has another number of cells than there are headers.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"table row: expected {len(headers)} cells, got {len(row)}: {row!r}")
    cells = [[str(cell) for cell in row] for row in rows]
    columns = list(zip(*cells, strict=True)) if cells else [() for _ in headers]
    widths = [
        max(len(header), *(len(cell) for cell in column), 0)
        for header, column in zip(headers, columns, strict=True)
    ]
    numeric = [
        any(re.search(r"\d", cell) for cell in column)
        and all(_NUMBER.fullmatch(cell) for cell in column)
        for column in columns
    ]
    lines = [list(headers), ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )
