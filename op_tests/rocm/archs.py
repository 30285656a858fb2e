"""Which architectures' machine code do the tests compile and execute?

All modules take 70 to 85 s of a core to compile for one architecture, beside which executing them is
little (2 cores of an AMD EPYC, shared with other work, 2026-11-26). So the suite has one architecture of
each wave width, and the others are `thorough`: `python -m pytest op_tests -m thorough` runs them, as CI
does.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

IN_SUITE = ("gfx942", "gfx1201")


def parameters(archs: Iterable[str]) -> list[object]:
    """`archs` as values of a parameter, those outside of the suite marked."""
    return [
        pytest.param(arch, marks=() if arch in IN_SUITE else pytest.mark.thorough) for arch in archs
    ]
