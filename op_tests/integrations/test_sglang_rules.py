"""Does a configuration of SGLang get the rule that it chooses by, or a reason why there is none?"""

from __future__ import annotations

import dataclasses
from typing import Any

import _checkout  # noqa: F401
import pytest
import sglang_standin as standin
import torch
from sglang_in_place import BIAS, config, runner_config

from aiter import RoutingRule
from aiter.integrations.sglang_rules import activation_of, check_experts, rule_of
from aiter.layer.types import ActivationType


@pytest.mark.parametrize(
    ("fields", "scale_in_choice", "rule"),
    [
        ({}, False, RoutingRule()),
        ({"renormalize": False}, False, RoutingRule(need_renorm=False)),
        ({"scoring_func": "sigmoid"}, False, RoutingRule("sigmoid", renorm_eps=1e-20)),
        (
            {"scoring_func": "sqrtsoftplus", "correction_bias": BIAS, "routed_scaling_factor": 1.5},
            True,
            RoutingRule("sqrtsoftplus", renorm_eps=1e-20, routed_scaling_factor=1.5),
        ),
        (
            {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2},
            False,
            RoutingRule("softmax", 4, 2, "max", renorm_eps=1e-20),
        ),
        ({"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1}, False, RoutingRule()),
        (
            # NOTE: grouped with a bias is sigmoid, whatever the configuration's score is.
            {
                "use_grouped_topk": True,
                "num_expert_group": 4,
                "topk_group": 2,
                "correction_bias": BIAS,
            },
            False,
            RoutingRule("sigmoid", 4, 2, "top2", renorm_eps=1e-20),
        ),
    ],
)
def test_a_rule_is_what_sglang_chooses_by(
    fields: Any, scale_in_choice: bool, rule: RoutingRule
) -> None:
    assert rule_of(config(**fields), scale_in_choice) == rule


def test_the_scale_is_in_the_rule_only_where_the_choice_applies_it() -> None:
    scaled = config(routed_scaling_factor=2.5, scoring_func="sigmoid")
    assert rule_of(scaled, True).routed_scaling_factor == 2.5
    assert rule_of(scaled, False).routed_scaling_factor == 1.0
    assert rule_of(config(scoring_func="sigmoid"), True).routed_scaling_factor == 1.0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"custom_routing_function": max}, "a function of its own"),
        ({"shared_experts": 1}, "slots of the choice"),
        ({"correction_bias": torch.zeros(3, 8)}, "rank 2, one per token"),
        ({"correction_bias": BIAS}, "softmax with a bias and no groups"),
        ({"scoring_func": "sparsemixer"}, "scoring_func: expected one of"),
    ],
)
def test_a_choice_without_a_rule_is_refused(fields: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rule_of(config(**fields), False)


def test_a_field_of_a_later_sglang_counts_unless_at_its_default() -> None:
    later = dataclasses.make_dataclass(
        "Later", [("logit_cap", float, dataclasses.field(default=0.0))], bases=(standin.TopKConfig,)
    )
    assert rule_of(later(top_k=2), False) == RoutingRule()
    with pytest.raises(ValueError, match="logit_cap=30.0, which is not known here"):
        rule_of(later(top_k=2, logit_cap=30.0), False)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_fused_shared_experts": 1}, "shared experts"),
        ({"no_combine": True}, "no_combine=True"),
        ({"apply_router_weight_on_input": True}, "apply_router_weight_on_input"),
        ({"swiglu_limit": 10.0}, "swiglu_limit=10.0"),
    ],
)
def test_experts_that_only_sglang_applies_are_refused(fields: Any, reason: str) -> None:
    check_experts(runner_config())
    with pytest.raises(ValueError, match=reason):
        check_experts(runner_config(**fields))


def test_activations_of_our_own_experts() -> None:
    assert activation_of(runner_config()) == (ActivationType.Silu, False)
    oai = {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}
    assert activation_of(runner_config(**oai)) == (ActivationType.Swiglu, True)
    for other in (
        {"activation": "gelu"}, {"is_gated": False}, {"gemm1_clamp_limit": 7.0},
        oai | {"gemm1_clamp_limit": 5.0}, oai | {"gemm1_alpha": 1.5}, oai | {"gemm1_beta": 2.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="activation="):
            activation_of(runner_config(**other))
