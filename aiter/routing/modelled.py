"""Up to how many tokens is which path the fastest in the timing model of AMD's GPUs?

Written by `python op_tests/rocm/write_model.py`, which see: do not edit.
"""

from __future__ import annotations

from typing import Literal

DATE = "2026-11-26"
COMMAND = "python op_tests/rocm/write_model.py"

# By architecture and dtype of the logits: E, K, the largest M of the fused launch and, of the chain,
# that of the oneshot sort; 0 for never.
# fmt: off
ROWS: dict[str, dict[Literal["f32", "f16", "bf16"], tuple[tuple[int, int, int, int], ...]]] = {
    "gfx1201": {
        "bf16": (
            (32, 4, 1280, 1088), (128, 4, 1276, 1056), (256, 8, 558, 576), (896, 16, 187, 304),
        ),
        "f16": (
            (32, 4, 1280, 1088), (128, 4, 1276, 1056), (256, 8, 558, 576), (896, 16, 187, 304),
        ),
        "f32": (
            (32, 4, 640, 1088), (128, 4, 640, 1056), (256, 8, 558, 576), (896, 16, 187, 304),
        ),
    },
    "gfx942": {
        "bf16": (
            (32, 4, 1248, 1088), (128, 4, 1213, 1024), (256, 8, 605, 576), (896, 16, 187, 330),
        ),
        "f16": (
            (32, 4, 1248, 1088), (128, 4, 1213, 1024), (256, 8, 605, 576), (896, 16, 187, 330),
        ),
        "f32": (
            (32, 4, 640, 1088), (128, 4, 736, 1024), (256, 8, 558, 576), (896, 16, 187, 330),
        ),
    },
}
# fmt: on
