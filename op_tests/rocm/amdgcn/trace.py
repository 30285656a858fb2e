"""What did a wave execute, in order: instructions, and behind each the memory that it touched.

A trace is a flat list, as cheap to write as can be: the index of an instruction, followed by an
`LdsAccess` or `Segments` for each access that it made; nothing where EXEC was empty.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SEGMENT_BYTES = 64


class LdsAccess(NamedTuple):
    """Passes over the banks that an access needed."""

    passes: int


class Segments(NamedTuple):
    """The 64-byte segments of global memory that an access touched, by number."""

    numbers: tuple[int, ...]


Trace = list["int | LdsAccess | Segments"]


def segments_of(addresses: NDArray[np.int64], size: int) -> Segments:
    """The segments of `size` bytes at each address."""
    first, last = addresses // SEGMENT_BYTES, (addresses + size - 1) // SEGMENT_BYTES
    if len(addresses) == 1:
        return Segments(tuple(range(int(first[0]), int(last[0]) + 1)))
    both = set(first.tolist())
    both.update(last.tolist())
    return Segments(tuple(sorted(both)))
