"""What does a layer launch that Triton has to compile first? Compiled here, ahead of use."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..routing.arguments import check_bool, check_strided
from ..routing.buffers import check_size
from .arguments import check_knobs, check_layer, check_swiglu_limit
from .experts import triton_problem
from .parts import SWIGLU_LIMIT, Activation, Experts
from .triton_experts import compile_ahead
from .types import ActivationType


def warmup_layer(
    w1: Tensor,
    w2: Tensor,
    topk: int,
    *,
    num_experts: int | None = None,
    max_tokens: int = 8192,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: Activation = ActivationType.Silu,
    gate_up_interleaved: bool = False,
    swiglu_limit: float | None = None,
    doweight_stage1: bool = False,
    dtype: torch.dtype | None = None,
    all_routed: bool = True,
) -> float:
    """Compiles what a layer with these weights launches for 1 to `max_tokens` rows, ahead of use.

    The Triton backend compiles on first use, about a second for each of some ten kernels; all layers of
    a model share them. The other backends compile nothing. Launches nothing. `aiter.warmup` does the
    same for the routing.

    Args:
        w1, w2, bias1, bias2, activation, gate_up_interleaved, swiglu_limit, doweight_stage1, dtype: as
            in `fused_moe`; hidden states are taken to be dense rows. Weights may require grad.
        topk: the slots of a row: K, and as many more as the rule has shared experts.
        num_experts: E of the router, shared ones among them; None for the experts of w1.
        max_tokens: the largest M.
        all_routed: for calls of `fused_moe_from_logits` without `expert_mask`, `num_local_tokens` and
            zero experts; False for all others.

    Returns:
        The seconds that it took.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    limit = SWIGLU_LIMIT if swiglu_limit is None else swiglu_limit
    experts = Experts(w1, w2, bias1, bias2, activation, gate_up_interleaved, limit)
    check_bool("all_routed", all_routed)
    check_swiglu_limit(swiglu_limit, activation)
    with torch.no_grad():
        check_layer(_some_rows(w1), experts, dtype)
    check_knobs(None, None, experts, doweight_stage1)
    if num_experts is not None:
        check_size("num_experts", num_experts)
    check_size("topk", topk)
    check_size("max_tokens", max_tokens)
    start = time.monotonic()
    if w1.shape[0] and w1.device.type != "meta" and triton_problem(w1.device, activation) is None:
        compile_ahead(
            experts, topk, num_experts or w1.shape[0], max_tokens, dtype or w1.dtype, all_routed,
            doweight_stage1,
        )  # fmt: skip
    return time.monotonic() - start


def _some_rows(w1: Tensor) -> Tensor:
    """Hidden states [0, D] for w1; what is no such tensor is refused with them."""
    check_strided("w1", w1)
    return w1.new_empty((0, w1.shape[-1] if w1.dim() else 0))
