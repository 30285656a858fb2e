"""Top-k of router logits by any rule: the first launch of the separate chain, and by itself."""

from __future__ import annotations

from torch import Tensor

from ..jit import compile_ops
from .rule import RoutingRule


@compile_ops("module_topk_routing")
def topk_routing(
    topk_weights: Tensor,
    topk_ids: Tensor,
    gating_output: Tensor,
    *,
    rule: RoutingRule | None = None,
    correction_bias: Tensor | None = None,
) -> None:
    """The K experts that a rule chooses for every row, and what they weigh.

    `RoutingRule` has the formula, docs/contract.md ("any rule") every case of it. With E routed, Z zero
    and S shared experts (the last two mostly 0): slots K to K + S - 1 are the shared experts, ids E
    to E + S - 1; zero experts have the ids behind these. Selection and weights are those of the fused
    launch by the same rule, bit for bit.

    Args:
        topk_weights: out, float32 [M, K + S]; inner stride 1, any row stride.
        topk_ids: out, int32 [M, K + S], likewise; descending by key, ties by lower id.
        gating_output: [M, E + Z] float32, float16 or bfloat16, or [M, E + Z + S] where shared experts
            have logits of their own; inner stride 1, any row stride.
        rule: None for plain softmax, renormalised.
        correction_bias: [E + Z] float32, float16 or bfloat16, contiguous; is added to the scores for
            selection only.

    Runs on PyTorch's current stream of the tensors' device, allocates nothing and does not synchronise.

    Raises:
        ValueError: an argument does not fit, such as experts that the rule's groups do not divide, or
            a bias with a rule that chooses by logits.
        TypeError: an argument is of the wrong Python type.
        aiter.jit.JitError: the module could not be built or loaded (first call on a device).
    """
