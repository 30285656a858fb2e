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
            (32, 4, 480, 32), (128, 4, 416, 40), (256, 8, 288, 128), (896, 16, 187, 224),
        ),
        "f16": (
            (32, 4, 480, 32), (128, 4, 416, 40), (256, 8, 316, 129), (896, 16, 187, 256),
        ),
        "f32": (
            (32, 4, 368, 32), (128, 4, 376, 40), (256, 8, 208, 64), (896, 16, 187, 256),
        ),
    },
    "gfx942": {
        "bf16": (
            (32, 4, 448, 0), (128, 4, 416, 16), (256, 8, 428, 192), (896, 16, 187, 256),
        ),
        "f16": (
            (32, 4, 448, 0), (128, 4, 416, 16), (256, 8, 438, 193), (896, 16, 187, 320),
        ),
        "f32": (
            (32, 4, 404, 0), (128, 4, 410, 16), (256, 8, 208, 64), (896, 16, 187, 288),
        ),
    },
}
# fmt: on
