"""Up to how many tokens is which path the fastest in the timing model of AMD's GPUs?

Written by `python op_tests/rocm/write_model.py`, which see: do not edit.
"""

from __future__ import annotations

from typing import Literal

DATE = "2026-11-28"
COMMAND = "python op_tests/rocm/write_model.py"

# By architecture and dtype of the logits: E, K, the largest M of the fused launch and, of the chain,
# that of the oneshot sort; 0 for never.
# fmt: off
ROWS: dict[str, dict[Literal["f32", "f16", "bf16"], tuple[tuple[int, int, int, int], ...]]] = {
    "gfx1201": {
        "bf16": (
            (32, 4, 768, 513), (128, 4, 768, 513), (256, 8, 288, 24), (896, 16, 104, 32),
        ),
        "f16": (
            (32, 4, 768, 513), (128, 4, 768, 513), (256, 8, 288, 24), (896, 16, 104, 32),
        ),
        "f32": (
            (32, 4, 576, 513), (128, 4, 544, 513), (256, 8, 288, 24), (896, 16, 105, 32),
        ),
    },
    "gfx942": {
        "bf16": (
            (32, 4, 704, 512), (128, 4, 704, 8), (256, 8, 289, 8), (896, 16, 84, 16),
        ),
        "f16": (
            (32, 4, 704, 512), (128, 4, 704, 8), (256, 8, 289, 8), (896, 16, 84, 16),
        ),
        "f32": (
            (32, 4, 576, 512), (128, 4, 545, 8), (256, 8, 256, 8), (896, 16, 84, 16),
        ),
    },
}
# fmt: on
