"""Softmax and top-k of router logits: the first launch of the separate chain."""

from __future__ import annotations

from torch import Tensor

from ..jit import compile_ops


@compile_ops("module_topk_softmax")
def topk_softmax(
    topk_weights: Tensor,
    topk_indices: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    need_renorm: bool,
) -> None:
    """The K experts of largest logit of every row, and their softmax weights.

    Selection and weights are those of `fused_topk_moe_sorting_fwd`, bit for bit.

    Args:
        topk_weights: out, float32 [M, K], contiguous.
        topk_indices: out, int32 [M, K], contiguous; descending by logit, ties by lower index.
        token_expert_indices: out, int32 [M, K], contiguous: k * M + row.
        gating_output: [M, E] float32, float16 or bfloat16; inner stride 1, any row stride.
        need_renorm: weights sum to 1 over the K slots (True) or over all E experts (False).

    Raises:
        ValueError: an argument does not fit.
        TypeError: an argument is of the wrong Python type.
        aiter.jit.JitError: the module could not be built or loaded (first call on a device).
    """
