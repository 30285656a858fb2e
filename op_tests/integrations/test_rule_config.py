"""Does a configuration's rule say what its model computes? Beside what test_models.py compares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import _checkout  # noqa: F401
import pytest

from aiter import RoutingRule
from aiter.ops.rule_config import REFUSED, RULES, rule_from_config


def rule(model_type: str, **values: Any) -> RoutingRule:
    return RoutingRule.from_config(SimpleNamespace(model_type=model_type, **values))


def test_values_of_the_configuration_count() -> None:
    deepseek = {"n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    want = RoutingRule("sigmoid", 8, 4, "top2", routed_scaling_factor=2.5)
    assert rule("deepseek_v3", **deepseek) == rule("kimi_k2", **deepseek) == want
    assert rule("axk2", n_group=None, topk_group=None).num_expert_group == 1
    assert rule("qwen3_moe", norm_topk_prob=True) == RoutingRule()
    assert rule("qwen3_moe", norm_topk_prob=False) == RoutingRule(need_renorm=False)
    grouped = rule("deepseek_v2", topk_method="group_limited_greedy", n_group=8, topk_group=3)
    assert (grouped.num_expert_group, grouped.topk_group, grouped.group_score) == (8, 3, "max")
    assert rule("deepseek_v2", topk_method="greedy", n_group=8, topk_group=3).num_expert_group == 1
    assert rule("longcat_flash", zero_expert_num=256).num_zero_experts == 256
    assert rule("laguna", moe_router_logit_softcapping=30.0).softcap == 30.0
    assert rule("muse_spark_text", output_multiplier=0.5).logit_scale == 0.5
    assert rule("openai_privacy_filter", num_experts_per_tok=4).routed_scaling_factor == 0.25
    sigmoid = rule("cohere2_moe", expert_selection_fn="sigmoid", norm_topk_prob=False)
    assert sigmoid == RoutingRule("sigmoid", select_on="logit", renorm_eps=0.0, need_renorm=False)
    assert rule("cohere2_moe", expert_selection_fn="softmax") == RoutingRule()


def test_the_text_model_of_several_is_asked() -> None:
    text = SimpleNamespace(model_type="qwen3_vl_moe_text")
    whole = SimpleNamespace(model_type="qwen3_vl_moe", text_config=text)
    assert rule_from_config(whole, RoutingRule) == RoutingRule()


@pytest.mark.parametrize("model_type", REFUSED)
def test_refusals_name_the_model_type_and_the_reason(model_type: str) -> None:
    assert model_type not in RULES
    with pytest.raises(ValueError, match=f"got model type '{model_type}': ") as error:
        rule(model_type)
    assert str(error.value).endswith(REFUSED[model_type])


def test_what_is_not_known_or_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of afmoe, .*got model type 'llama', whose"):
        rule("llama")
    with pytest.raises(TypeError, match="config: expected a transformers configuration, got int"):
        rule_from_config(3, RoutingRule)
    with pytest.raises(ValueError, match="'deepseek_v3': topk_group: .* from 1 to 8, got 9"):
        rule("deepseek_v3", n_group=8, topk_group=9)
    with pytest.raises(ValueError, match="topk_method: expected 'greedy' or .*got 'noaux_tc'"):
        rule("deepseek_v2", topk_method="noaux_tc")
    with pytest.raises(ValueError, match="n_group: expected None or 1 .*got 8"):
        rule("axk2", n_group=8, topk_group=4)
    with pytest.raises(ValueError, match="'deepseek_v4': scoring_func: expected one of"):
        rule("deepseek_v4", scoring_func="tanh")
