"""AMD's names for selections that a routing rule describes, with its argument orders.

Each is one call of `topk_routing` by the rule that it stands for; all rules and cases are stated there.
Outputs are float32 weights and int32 ids [M, K], inner stride 1, any row stride; logits are float32,
float16 or bfloat16 [M, E], a correction bias [E] any of these. Errors are those of `topk_routing`, under
its names of the arguments.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..ops.rule import GroupScore, RoutingRule, ScoringFunc
from .arguments import check_bool, check_int, check_number, check_strided
from .buffers import check_size
from .graph import topk_routing
from .graph import topk_softmax as _topk_softmax


def _made(
    scoring_func: ScoringFunc,
    need_renorm: bool,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: GroupScore | None = None,
    routed_scaling_factor: float = 1.0,
    num_shared_experts: int = 0,
    shared_expert_scoring_func: str = "",
    shared_expert_weight: float = 1.0,
) -> RoutingRule:
    return RoutingRule(
        scoring_func,
        num_expert_group,
        topk_group,
        group_score,
        need_renorm,
        routed_scaling_factor=routed_scaling_factor,
        num_shared_experts=num_shared_experts,
        shared_expert_scoring_func=shared_expert_scoring_func,  # type: ignore[arg-type]
        shared_expert_weight=shared_expert_weight,
    )


_kept = lru_cache(None, typed=True)(_made)  # NOTE: 1 is not True, which a rule refuses or takes.


def _rule(*args: Any, **kwargs: Any) -> RoutingRule:
    # NOTE: kept, as making and checking a rule takes as long as the rest of the call; torch.compile,
    # which makes one per graph, would warn of a cache.
    if not is_dynamo_compiling():
        try:
            return _kept(*args, **kwargs)
        except TypeError:
            pass  # NOTE: of a wrong type, or without a hash; the rule itself says which argument.
    return _made(*args, **kwargs)


def biased_grouped_topk(
    gating_output: Tensor,
    correction_bias: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    num_expert_group: int,
    topk_group: int,
    need_renorm: bool,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Sigmoid scores, chosen with a correction bias in the groups whose two best keys sum up highest."""
    rule = _rule(
        "sigmoid", need_renorm, num_expert_group, topk_group, "top2", routed_scaling_factor
    )
    topk_routing(topk_weights, topk_ids, gating_output, rule=rule, correction_bias=correction_bias)


def grouped_topk(
    gating_output: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    num_expert_group: int,
    topk_group: int,
    need_renorm: bool,
    is_softmax: bool = True,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Softmax or sigmoid scores, chosen in the groups with the highest ones."""
    check_bool("is_softmax", is_softmax)
    rule = _rule(
        "softmax" if is_softmax else "sigmoid", need_renorm, num_expert_group, topk_group, "max",
        routed_scaling_factor,
    )  # fmt: skip
    topk_routing(topk_weights, topk_ids, gating_output, rule=rule)


def topk_gating(
    topk_weights: Tensor,
    topk_indices: Tensor,
    gating_output: Tensor,
    correction_bias: Tensor | None = None,
    need_renorm: bool = True,
    routed_scaling_factor: float = 1.0,
    score_func: ScoringFunc = "sqrtsoftplus",
) -> None:
    """Scores of any kind, chosen with a correction bias."""
    rule = _rule(score_func, need_renorm, routed_scaling_factor=routed_scaling_factor)
    topk_routing(
        topk_weights, topk_indices, gating_output, rule=rule, correction_bias=correction_bias
    )


topk_softplus = topk_gating


def topk_sigmoid(topk_weights: Tensor, topk_indices: Tensor, gating_output: Tensor) -> None:
    """Sigmoid scores, which are the weights."""
    topk_routing(topk_weights, topk_indices, gating_output, rule=_rule("sigmoid", False))


def moe_fused_gate(
    input: Tensor,
    bias: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    n_share_experts_fusion: int,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As `biased_grouped_topk`, renormalised, with shared experts in the last of the `topk` slots.

    As with AMD's op the scale is left to the caller: routed experts weigh what they do before it, and
    each of the `n_share_experts_fusion` shared ones, ids E and up, weighs 1 / `routed_scaling_factor`.

    Returns:
        topk_weights and topk_ids.

    Raises:
        ValueError, TypeError: `topk` is not the width of the outputs, the scale is 0 beside shared
            experts, or an argument does not fit.
    """
    check_strided("topk_ids", topk_ids)
    check_size("topk", topk)
    if topk_ids.dim() != 2 or topk_ids.shape[1] != topk:
        raise ValueError(
            f"topk: expected the width of topk_ids, got {topk} for shape {list(topk_ids.shape)}"
        )
    check_size("n_share_experts_fusion", n_share_experts_fusion, low=0)
    check_number("routed_scaling_factor", routed_scaling_factor)
    is_zero = n_share_experts_fusion > 0 and routed_scaling_factor == 0
    if is_zero or not abs(routed_scaling_factor) < float("inf"):
        raise ValueError(
            "routed_scaling_factor: expected a finite number other than 0, got"
            f" {routed_scaling_factor}"
        )
    rule = _rule(
        "sigmoid", True, num_expert_group, topk_group, "top2",
        num_shared_experts=n_share_experts_fusion,
        shared_expert_weight=1 / routed_scaling_factor if n_share_experts_fusion else 1.0,
    )  # fmt: skip
    topk_routing(topk_weights, topk_ids, input, rule=rule, correction_bias=bias)
    return topk_weights, topk_ids


def topk_softmax(
    topk_weights: Tensor,
    topk_indices: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    need_renorm: bool,
    num_shared_experts: int = 0,
    shared_expert_scoring_func: str = "",
) -> None:
    """As `aiter.ops.topk_softmax.topk_softmax`, and shared experts behind the routed ones.

    With S = `num_shared_experts` above 0 the outputs are [M, K + S], the last S slots hold the ids E to
    E + S - 1 and weigh 1, or with "sigmoid" the sigmoid of the S logits behind the E.

    Raises:
        ValueError, TypeError: an argument does not fit.
        aiter.jit.JitError: the module could not be built or loaded (first call on a device).
    """
    check_int("num_shared_experts", num_shared_experts)
    if num_shared_experts == 0 and shared_expert_scoring_func == "":
        _topk_softmax(topk_weights, topk_indices, token_expert_indices, gating_output, need_renorm)
        return
    check_strided("topk_indices", topk_indices)
    check_strided("token_expert_indices", token_expert_indices)
    if topk_indices.dim() != 2:
        raise ValueError(
            f"topk_indices: expected a tensor of rank 2, got shape {list(topk_indices.shape)}"
        )
    if token_expert_indices.shape != topk_indices.shape:
        raise ValueError(
            f"token_expert_indices: expected shape {list(topk_indices.shape)}, as topk_indices, got"
            f" {list(token_expert_indices.shape)}"
        )
    if token_expert_indices.device != topk_indices.device:
        raise ValueError(
            f"token_expert_indices: expected it on {topk_indices.device}, as topk_indices, got"
            f" {token_expert_indices.device}"
        )
    if token_expert_indices.dtype != torch.int32:
        raise ValueError(
            f"token_expert_indices: expected dtype int32, got {token_expert_indices.dtype}"
        )
    rule = _rule(
        "softmax", need_renorm, num_shared_experts=num_shared_experts,
        shared_expert_scoring_func=shared_expert_scoring_func,
    )  # fmt: skip
    topk_routing(topk_weights, topk_indices, gating_output, rule=rule)
    rows, slots = topk_indices.shape
    source = torch.arange(rows * slots, dtype=torch.int32, device=topk_indices.device)
    token_expert_indices.copy_(source.view(slots, rows).t())
