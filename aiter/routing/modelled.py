"""Up to how many tokens is which path the fastest in the timing model of AMD's GPUs?

Written by `python op_tests/rocm/write_model.py`, which see: do not edit.
"""

from __future__ import annotations

from typing import Literal

DATE = "2026-11-27"
COMMAND = "python op_tests/rocm/write_model.py"

# By architecture and dtype of the logits: E, K, the largest M of the fused launch and, of the chain,
# that of the oneshot sort; 0 for never.
# fmt: off
ROWS: dict[str, dict[Literal["f32", "f16", "bf16"], tuple[tuple[int, int, int, int], ...]]] = {
    "gfx1201": {
        "bf16": (
            (32, 4, 992, 1088), (128, 4, 1168, 1040), (256, 8, 512, 576), (896, 16, 187, 288),
        ),
        "f16": (
            (32, 4, 993, 1088), (128, 4, 1168, 1040), (256, 8, 512, 576), (896, 16, 187, 288),
        ),
        "f32": (
            (32, 4, 572, 1088), (128, 4, 576, 1040), (256, 8, 448, 576), (896, 16, 187, 288),
        ),
    },
    "gfx942": {
        "bf16": (
            (32, 4, 992, 1088), (128, 4, 1150, 1024), (256, 8, 559, 576), (896, 16, 187, 316),
        ),
        "f16": (
            (32, 4, 993, 1088), (128, 4, 1153, 1024), (256, 8, 559, 576), (896, 16, 187, 316),
        ),
        "f32": (
            (32, 4, 576, 1088), (128, 4, 632, 1024), (256, 8, 449, 576), (896, 16, 187, 316),
        ),
    },
}
# fmt: on
