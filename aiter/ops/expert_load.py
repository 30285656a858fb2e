"""How many tokens every expert got: the smallest op, and the example of docs/adding_an_op.md."""

from __future__ import annotations

from torch import Tensor

from ..jit import compile_ops


@compile_ops("module_expert_load")
def expert_load(topk_ids: Tensor, load: Tensor) -> None:
    """Counts the entries of `topk_ids` per expert.

    Args:
        topk_ids: [M, K] int32, contiguous; ids outside [0, E) are not counted.
        load: out, [E] int32, contiguous, E at most 12288: load[e] is the number of entries e.

    Raises:
        ValueError: an argument does not fit.
        TypeError: an argument is of the wrong Python type.
        aiter.jit.JitError: the module could not be built or loaded (first call on a device).
    """
