"""Which rule does a transformers configuration mean?

`RULES` is the answer as data, a row per `model_type`: fields of `RoutingRule`, each a value or the name
of the configuration's attribute (`Of`). What no rule computes is in `REFUSED`, with the reason. Only
attributes are read, so that a configuration without transformers, as a SimpleNamespace of its JSON,
does as well. Configurations of several models (text, images) are asked for their `text_config`.

The rows are those of the models' own code: transformers 5.23, and the repositories of models that come
with code of their own. A rule says nothing of the correction bias, which is a tensor of the router.
Shared experts are modules of their own in these models, and no part of the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Rule = TypeVar("Rule")


@dataclass(frozen=True)
class Of:
    """The configuration's attribute `name`, or 1 over it; `otherwise` where it is None or missing."""

    name: str
    otherwise: Any = None
    inverse: bool = False


_RENORM = Of("norm_topk_prob", True)
_SCALE = Of("routed_scaling_factor", 1.0)
_GROUPS = {"num_expert_group": Of("n_group", 1), "topk_group": Of("topk_group", 1)}

PLAIN: dict[str, Any] = {}
RENORM_ASKED: dict[str, Any] = {"need_renorm": Of("norm_topk_prob", False)}
SIGMOID: dict[str, Any] = {"scoring_func": "sigmoid"}
SIGMOID_NO_EPS: dict[str, Any] = {**SIGMOID, "renorm_eps": 0.0}
SIGMOID_GROUPS: dict[str, Any] = {
    **SIGMOID, **_GROUPS, "group_score": "top2", "need_renorm": _RENORM,
    "routed_scaling_factor": _SCALE,
}  # fmt: skip
SOFTMAX_TOP2_GROUPS: dict[str, Any] = {
    **_GROUPS, "group_score": "top2", "renorm_eps": 1e-20, "routed_scaling_factor": _SCALE,
}  # fmt: skip
SOFTMAX_MAX_GROUPS: dict[str, Any] = {
    "num_expert_group": Of("n_group", 1), "topk_group": Of("topk_group", 1), "group_score": "max",
    "need_renorm": False, "routed_scaling_factor": _SCALE,
}  # fmt: skip
SCORED: dict[str, Any] = {"scoring_func": Of("scoring_func"), "routed_scaling_factor": _SCALE}
SOFTMAX_MIN: dict[str, Any] = {"renorm_min": Of("moe_norm_min", 1e-12)}

RULES: dict[str, dict[str, Any]] = {
    "afmoe": {**SIGMOID, "routed_scaling_factor": Of("route_scale", 1.0)},
    "aria_text": PLAIN,
    "axk1": SIGMOID_GROUPS,
    "axk2": SIGMOID_GROUPS,
    "bailing_hybrid": {
        **SIGMOID_GROUPS, "num_expert_group": Of("num_expert_group", 1),
        "need_renorm": Of("moe_renormalize", True),
    },
    "bailing_moe_v2": SIGMOID_GROUPS,
    "beam": {**SIGMOID_GROUPS, "routed_scaling_factor": 1.0},  # the block scales
    "cohere2_moe": {
        "scoring_func": Of("expert_selection_fn"), "select_on": "logit", "renorm_eps": 0.0,
        "need_renorm": _RENORM,
    },
    "deepseek_ocr2_text": SOFTMAX_MAX_GROUPS,
    "deepseek_v2": SOFTMAX_MAX_GROUPS,
    "deepseek_v3": SIGMOID_GROUPS,
    "deepseek_v32": SIGMOID_GROUPS,
    "deepseek_v4": SCORED,
    "dots1": SIGMOID_GROUPS,
    "dots3_note_text": SIGMOID_GROUPS,
    "ernie4_5_moe": SOFTMAX_MIN,
    "ernie4_5_vl_moe_text": SOFTMAX_MIN,
    "exaone_moe": SIGMOID_GROUPS,
    "flex_olmo": RENORM_ASKED,
    "flint": {**SIGMOID_NO_EPS, "need_renorm": _RENORM},
    "glm4_moe": SIGMOID_GROUPS,
    "glm4_moe_lite": SIGMOID_GROUPS,
    "glm4v_moe_text": SIGMOID_GROUPS,
    "glm5_next_text": SIGMOID_GROUPS,
    "glm_moe_dsa": SIGMOID_GROUPS,
    "gpt_oss": PLAIN,
    "granitemoe": PLAIN,
    "granitemoe_swa": PLAIN,
    "granitemoehybrid": PLAIN,
    "granitemoeshared": PLAIN,
    "hunyuan_v1_moe": PLAIN,
    "hy_v3": {**SIGMOID, "routed_scaling_factor": Of("router_scaling_factor", 1.0)},
    "hy_v4": SIGMOID_GROUPS,
    "inkling2_text": {
        "scoring_func": Of("scoring_func"), "routed_scaling_factor": Of("route_scale", 1.0),
    },
    "jamba": {"need_renorm": False},
    "kimi_k2": SIGMOID_GROUPS,
    "kimi_linear": {
        **SIGMOID_GROUPS, "num_expert_group": Of("num_expert_group", 1),
        "need_renorm": Of("moe_renormalize", True),
    },
    "laguna": {**SIGMOID_NO_EPS, "softcap": Of("moe_router_logit_softcapping", 0.0)},
    "lfm2_moe": {
        **SIGMOID, "renorm_eps": 1e-6, "need_renorm": _RENORM, "routed_scaling_factor": _SCALE,
    },
    "llama4_text": {**SIGMOID, "select_on": "logit", "need_renorm": False},
    "longcat_flash": {
        "need_renorm": False, "routed_scaling_factor": _SCALE,
        "num_zero_experts": Of("zero_expert_num", 0),
    },
    "mellum": RENORM_ASKED,
    "mimo_v2_flash": SIGMOID_GROUPS,
    "minimax": PLAIN,
    "minimax_m2": SIGMOID_NO_EPS,
    "minimax_m3_vl_text": SIGMOID_NO_EPS,
    "mistral4": {**SOFTMAX_TOP2_GROUPS, "need_renorm": _RENORM},
    "mistral_large4_text": SOFTMAX_TOP2_GROUPS,
    "mixtral": PLAIN,
    "muse_spark_text": {
        **SIGMOID, "renorm_eps": 1e-15, "logit_scale": Of("output_multiplier", 1.0),
        "routed_scaling_factor": _SCALE,
    },
    "nemotron_h": SIGMOID_GROUPS,
    "olmoe": RENORM_ASKED,
    "openai_privacy_filter": {
        "routed_scaling_factor": Of("num_experts_per_tok", inverse=True)  # the block multiplies
    },
    "qwen2_moe": RENORM_ASKED,
    "qwen3_5_moe_text": PLAIN,
    "qwen3_moe": RENORM_ASKED,
    "qwen3_next": RENORM_ASKED,
    "qwen3_omni_moe_talker_text": RENORM_ASKED,
    "qwen3_omni_moe_text": RENORM_ASKED,
    "qwen3_vl_moe_text": PLAIN,
    "qwen4_exp_text": RENORM_ASKED,
    "solar_open": SIGMOID_GROUPS,
    "step3p5": SIGMOID_NO_EPS,
    "unlimited_ocr_text": SOFTMAX_MAX_GROUPS,
}  # fmt: skip
"""The fields of the rule of a `model_type`; what is not named keeps its default."""

REFUSED: dict[str, str] = {
    "dbrx": "its weights are divided by a norm of any order",
    "diffusion_gemma_text": "its weights are multiplied by a learned scale per expert",
    "doge": "its experts are the pairs of two top-k of keys",
    "gemma4_text": "its weights are multiplied by a learned scale per expert",
    "inkling_text": "its routed and shared experts are renormalised together",
    "interns1_pro": "its groups each give a fixed number of experts",
    "jetmoe": "its attention routes as well",
    "kolibri1": "its correction bias is added to the logits",
    "nllb-moe": "its experts have a capacity, by which tokens are dropped",
    "phimoe": "it routes by sparsemixer",
    "switch_transformers": "its experts have a capacity, by which tokens are dropped",
    "vitpose_backbone": "its expert is given by the data set",
    "zaya": "its router is an MLP with a state from layer to layer, and may skip every expert",
}
"""Why the router of a `model_type` has no rule."""


def rule_from_config(config: Any, make: Callable[..., Rule]) -> Rule:
    """The rule by which the routers of a model with this configuration choose and weigh.

    Args:
        config: of transformers, or anything with its attributes, `model_type` among them.
        make: `RoutingRule`, which imports this module, not the other way round.

    Raises:
        ValueError: the model type has no rule, with the reason; or a value of the configuration is none
            that a rule can have.
    """
    config, model_type = _with_rule(config)
    if model_type in REFUSED:
        raise ValueError(
            f"config: expected a router that a RoutingRule can express, got model type"
            f" {model_type!r}: {REFUSED[model_type]}"
        )
    if model_type not in RULES:
        raise ValueError(
            f"config: expected one of {', '.join(RULES)}, got model type {model_type!r}, whose router is"
            " not known here"
        )
    fields = read_fields(RULES[model_type], config)
    method = getattr(config, "topk_method", "greedy")
    if RULES[model_type] is SOFTMAX_MAX_GROUPS and method != "group_limited_greedy":
        if method != "greedy":
            raise ValueError(
                f"config.topk_method: expected 'greedy' or 'group_limited_greedy', got {method!r}"
            )
        fields |= {"num_expert_group": 1, "topk_group": 1, "group_score": None}
    if model_type == "axk2" and fields["num_expert_group"] > 1:
        raise ValueError(
            "config.n_group: expected None or 1 for model type 'axk2', whose router keeps the experts of"
            f" the other groups with a key of 0, got {fields['num_expert_group']}"
        )
    if model_type == "cohere2_moe" and fields["scoring_func"] == "softmax":
        fields = {}  # over the chosen experts alone
    try:
        return make(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config: the router of model type {model_type!r}: {error}") from error


def _with_rule(config: Any) -> tuple[Any, str]:
    """The configuration of the text model where there is one, and its type."""
    for each in (config, getattr(config, "text_config", None)):
        model_type = getattr(each, "model_type", None)
        if model_type in RULES or model_type in REFUSED:
            return each, model_type
    model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str):
        raise TypeError(
            f"config: expected a transformers configuration, got {type(config).__name__} without a"
            " model_type"
        )
    return config, model_type


def read_fields(row: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """The fields of a rule, with `Of` of a row replaced by what `source` has now."""
    return {name: _value(source, of) for name, of in row.items()}


def _value(source: Any, of: Any) -> Any:
    if not isinstance(of, Of):
        return of
    value = getattr(source, of.name, None)
    if value is None:
        return of.otherwise
    return 1 / value if of.inverse else value
