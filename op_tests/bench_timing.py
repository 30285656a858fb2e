"""Where are the benches' clocks? In the package, as `python -m aiter tune` needs them, too."""

from __future__ import annotations

import _checkout  # noqa: F401  (makes a checkout importable)

from aiter.cli.timing import (
    Call,
    Timing,
    affordable,
    call_us,
    cold_us,
    cpu_us,
    empty_kernel,
    floor_us,
    graph_slope_us,
    host_us,
    slopes,
    strict_us,
    summary,
    synchronize,
    wall_us,
)

__all__ = [
    "Call",
    "Timing",
    "affordable",
    "call_us",
    "cold_us",
    "cpu_us",
    "empty_kernel",
    "floor_us",
    "graph_slope_us",
    "host_us",
    "slopes",
    "strict_us",
    "summary",
    "synchronize",
    "wall_us",
]
