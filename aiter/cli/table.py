"""How does a table look in a terminal?

Columns are as wide as their widest cell; a column whose cells are all numbers is right-aligned. Where
a terminal is too narrow for that, text columns are wrapped, the widest first; where they would be too
narrow to read, every row becomes lines of `title: cell`. What is not a terminal has no width: a line
per row is what other programs read.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence

_NUMBER = re.compile(r"[-+]?[\d.,]+( ?(%|x|us|ms|s|[kMG]i?B|B))?|-|")
_GAP = "  "
_NARROWEST = 12  # of a wrapped column


def format_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None
) -> str:
    """The table as text, one line per row that fits, without a line break at the end.

    Args:
        headers: the column titles.
        rows: the cells; each row has one per header.
        width: the longest line; None for the terminal's, where stdout is one.

    Raises:
        ValueError: a row has another number of cells than there are headers.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"table row: expected {len(headers)} cells, got {len(row)}: {row!r}")
    cells = [[str(cell) for cell in row] for row in rows]
    columns = list(zip(*cells, strict=True)) if cells else [() for _ in headers]
    natural = [
        max(len(header), *(len(cell) for cell in column), 0)
        for header, column in zip(headers, columns, strict=True)
    ]
    numeric = [
        any(re.search(r"\d", cell) for cell in column)
        and all(_NUMBER.fullmatch(cell) for cell in column)
        for column in columns
    ]
    limit = width if width is not None else _terminal_width()
    widths = fitting_widths(natural, numeric, limit) if limit else natural
    if widths is None:
        return _as_records(headers, cells, limit)
    lines = [list(headers), ["-" * width for width in widths], *cells]
    return "\n".join(text for line in lines for text in _wrapped(line, widths, numeric))


def _terminal_width() -> int:
    """Columns of the terminal that stdout is; 0 where it is none."""
    return shutil.get_terminal_size((0, 0)).columns if sys.stdout.isatty() else 0


def fitting_widths(natural: Sequence[int], numeric: Sequence[bool], limit: int) -> list[int] | None:
    """Widths of columns that take at most `limit` together; None if they would be too narrow."""
    widths = list(natural)
    over = sum(widths) + len(_GAP) * (len(widths) - 1) - limit
    while over > 0:
        widest = max(
            (index for index in range(len(widths)) if not numeric[index]),
            key=lambda index: widths[index],
            default=None,
        )
        if widest is None or widths[widest] <= _NARROWEST:
            return None
        widths[widest] -= 1
        over -= 1
    return widths


def _wrapped(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> list[str]:
    """The lines of one row."""
    wrapped = [_wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
    return [
        _GAP.join(
            text[index].rjust(width) if right else text[index].ljust(width)
            for text, width, right in zip(
                (part + [""] * (height - len(part)) for part in wrapped),
                widths,
                numeric,
                strict=True,
            )
        ).rstrip()
        for height in [max((len(part) for part in wrapped), default=1)]
        for index in range(height)
    ]


def _wrap(text: str, width: int) -> list[str]:
    if len(text) <= width:
        return [text]
    return textwrap.wrap(text, max(width, 1), break_on_hyphens=False) or [""]


def _as_records(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Every row as lines of title and cell, wrapped, with an empty line between rows."""
    records = []
    for row in rows:
        lines = []
        for header, cell in zip(headers, row, strict=True):
            lines += textwrap.wrap(f"{header}: {cell}", max(width, 1), break_on_hyphens=False)
        records.append("\n".join(lines))
    return "\n\n".join(records) or "\n".join(textwrap.wrap(_GAP.join(headers), max(width, 1)))
