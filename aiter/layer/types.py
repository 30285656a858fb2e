"""Which activations and quantisations can a MoE layer name?

The members and their values are those of ROCm's aiter, so that a program that passes them by name
or by number means the same here. What `fused_moe` does not compute is still listed: it is refused
by name instead of failing as an unknown attribute.
"""

from enum import IntEnum


class ActivationType(IntEnum):
    """What is applied between the two products of an expert; see `fused_moe` for the formulas."""

    No = -1
    Silu = 0
    Gelu = 1
    Swiglu = 2
    Situv2 = 3


class QuantType(IntEnum):
    """How weights and activations are quantised; `fused_moe` takes No only."""

    No = 0
    per_Tensor = 1
    per_Token = 2
    per_1x32 = 3
    per_1x128 = 4
    per_128x128 = 5
    per_256x128 = 6
    per_1024x128 = 7
