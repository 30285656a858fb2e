"""Up to how many tokens is one launch from hidden states the fastest in the timing model?

Written by `python op_tests/rocm/write_router.py`, which see: do not edit.
"""

from __future__ import annotations

DATE = "2026-11-27"
COMMAND = "python op_tests/rocm/write_router.py"

# By architecture: D', E, K and the largest M of the launch that makes the product as well; 0 for never.
# fmt: off
ROWS: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "gfx942": ((2880, 128, 4, 64), (7168, 256, 8, 0), (4096, 512, 10, 16)),
    "gfx1201": ((2880, 128, 4, 16), (7168, 256, 8, 16), (4096, 512, 10, 0)),
}
# fmt: on
