"""By which rule does a layer of SGLang route, and which of its layers can our launch serve?

Reads SGLang's two configurations, `TopKConfig` (the choice) and `MoeRunnerConfig` (the experts), and
needs nothing of SGLang itself. What cannot be said in a `RoutingRule`, or in our experts' activations,
is a ValueError whose text is the reason, for the one line that a user reads. So is a field that this
file does not know and that is not at its default: a later SGLang may choose in a way that we would
miss in silence.

How SGLang 0.5.23 chooses, as `select_experts` does it, and the rule of each:

    grouped, with a bias       sigmoid, whatever `scoring_func` says; two best keys of a group
    grouped, without           the score; the best key of a group
    not grouped                the score, with a bias added for the choice (sigmoid, sqrtsoftplus)
    renormalised               s / (sum + 1e-20)

Softmax with a bias and no groups is refused: SGLang's GPU path leaves the bias out, its plain PyTorch
path does not. The scale belongs to the rule only where SGLang says that the choice has applied it;
elsewhere its experts or its model do, and a rule with the scale would apply it twice.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from ..layer.parts import SWIGLU_ALPHA, SWIGLU_LIMIT
from ..layer.types import ActivationType
from ..ops.rule import RoutingRule

RENORM_EPS = 1e-20  # what SGLang adds to the sum of the chosen scores

_TOPK_FIELDS = frozenset({
    "top_k", "use_grouped_topk", "topk_group", "num_expert_group", "renormalize", "shared_experts",
    "custom_routing_function", "correction_bias", "torch_native", "routed_scaling_factor",
    "apply_routed_scaling_factor_on_output", "fused_shared_experts_scaling_factor", "output_format",
    "runner_backend", "routing_method_type", "scoring_func", "sqrtsoftplus_log1p",
    "fused_gate_packed_ids", "allow_routed_experts_capture", "layer_id",
    "_correction_bias_dtype_cache", "_correction_bias_cache_key",
})  # fmt: skip

_RUNNER_FIELDS = frozenset({
    "num_experts", "num_local_experts", "hidden_size", "intermediate_size_per_partition", "layer_id",
    "top_k", "num_fused_shared_experts", "params_dtype", "routing_method_type", "runner_backend",
    "activation", "is_gated", "apply_router_weight_on_input", "inplace", "no_combine",
    "no_combine_keep_router_weight", "routed_scaling_factor", "gemm1_alpha", "gemm1_beta",
    "gemm1_clamp_limit", "swiglu_limit", "gate_up_interleaved", "layer",
    "use_tp_all_gather_activation", "silu_mul_keep_fp32",
})  # fmt: skip


def rule_of(config: Any, scale_in_choice: bool) -> RoutingRule:
    """The rule of a `TopKConfig`.

    Args:
        config: SGLang's `TopKConfig`.
        scale_in_choice: whether SGLang's choice applies `routed_scaling_factor`, as its own
            `is_routed_scaling_factor_fused_in_topk` says.

    Raises:
        ValueError: no rule says what this configuration does; the reason.
    """
    _refuse_unknown_fields(config, _TOPK_FIELDS)
    if config.custom_routing_function is not None:
        raise ValueError("the model chooses by a function of its own")
    if config.num_shared_topk_slots:
        raise ValueError("its shared experts have slots of the choice")
    bias, score = config.correction_bias, config.scoring_func
    if bias is not None and bias.dim() != 1:
        raise ValueError(f"its bias has rank {bias.dim()}, one per token")
    groups, best = 1, 1
    if config.use_grouped_topk:
        groups, best = config.num_expert_group, config.topk_group
        if bias is not None:
            score = "sigmoid"
    elif bias is not None and score == "softmax":
        raise ValueError(
            "softmax with a bias and no groups, which SGLang's paths treat differently"
        )
    scale = config.routed_scaling_factor if scale_in_choice else None
    plain = score == "softmax" and bias is None and groups == 1
    group_score: Any = None
    if groups > 1:
        group_score = "max" if bias is None else "top2"
    return RoutingRule(
        score,
        num_expert_group=groups,
        topk_group=best,
        group_score=group_score,
        need_renorm=bool(config.renormalize),
        renorm_eps=None if plain else RENORM_EPS,
        routed_scaling_factor=1.0 if scale is None else float(scale),
    )


def check_experts(config: Any) -> None:
    """Raises ValueError, with the reason, for experts that only SGLang's own runner applies."""
    _refuse_unknown_fields(config, _RUNNER_FIELDS)
    if config.num_fused_shared_experts:
        # NOTE: some models append these to SGLang's ids, and would lose them without a word.
        raise ValueError("shared experts are among its experts")
    for name in ("no_combine", "apply_router_weight_on_input", "swiglu_limit"):
        if getattr(config, name):
            raise ValueError(f"{name}={getattr(config, name)}")


def activation_of(config: Any) -> tuple[ActivationType, bool]:
    """The activation of a `MoeRunnerConfig` in our own experts, and whether gate and up take turns.

    Raises:
        ValueError: our experts have no such activation.
    """
    alpha, limit, beta = config.gemm1_alpha, config.gemm1_clamp_limit, config.gemm1_beta
    if config.activation == "silu" and config.is_gated:
        if alpha is None and limit is None:
            return ActivationType.Silu, False
        if alpha == SWIGLU_ALPHA and limit == SWIGLU_LIMIT and beta in (None, 1.0):
            return ActivationType.Swiglu, True
    raise ValueError(
        f"activation={config.activation!r} with is_gated={config.is_gated}, gemm1_alpha={alpha},"
        f" gemm1_beta={beta}, gemm1_clamp_limit={limit}"
    )


def _refuse_unknown_fields(config: Any, known: frozenset[str]) -> None:
    for field in fields(config):
        if field.name in known:
            continue
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        value = getattr(config, field.name)
        if value is not default and value != default:
            raise ValueError(f"{field.name}={value!r}, which is not known here")
