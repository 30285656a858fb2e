"""Do AMD's names choose and weigh as the rules that they stand for, with its argument orders?"""

from __future__ import annotations

import _checkout  # noqa: F401
import pytest
import torch
from rule_cases import check_routing
from targets import Target
from torch import Tensor

from aiter.ops.rule import RoutingRule
from aiter.routing import upstream_topk as names

M, E, K = 7, 64, 6
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(M, E, generator=GENERATOR)
BIAS = torch.randn(E, generator=GENERATOR) * 0.1


class Outputs:
    """Weights and ids [M, slots] on a target."""

    def __init__(self, target: Target, slots: int = K) -> None:
        self.weights = torch.full((M, slots), 7.0, device=target.device)
        self.ids = torch.full((M, slots), -7, dtype=torch.int32, device=target.device)

    def check(self, rule: RoutingRule, bias: Tensor | None = None, logits: Tensor = LOGITS) -> None:
        check_routing((self.weights.cpu(), self.ids.cpu()), logits, rule, bias)


def test_biased_grouped_topk(target: Target) -> None:
    out = Outputs(target)
    x, bias = LOGITS.to(target.device), BIAS.to(target.device)
    with target.active():
        names.biased_grouped_topk(x, bias, out.weights, out.ids, 8, 4, True, 2.5)
    out.check(RoutingRule("sigmoid", 8, 4, "top2", routed_scaling_factor=2.5), BIAS)


@pytest.mark.parametrize("is_softmax", [True, False])
def test_grouped_topk(target: Target, is_softmax: bool) -> None:
    out = Outputs(target)
    with target.active():
        names.grouped_topk(
            LOGITS.to(target.device), out.weights, out.ids, 8, 3, False, is_softmax, 16.0
        )
    out.check(
        RoutingRule(
            "softmax" if is_softmax else "sigmoid", 8, 3, "max", False, routed_scaling_factor=16.0
        )
    )


@pytest.mark.parametrize("function", [names.topk_gating, names.topk_softplus])
def test_topk_gating(target: Target, function: object) -> None:
    out = Outputs(target)
    x, bias = LOGITS.to(target.device), BIAS.to(target.device)
    with target.active():
        names.topk_gating(out.weights, out.ids, x)
        out.check(RoutingRule("sqrtsoftplus"))
        function(out.weights, out.ids, x, bias, False, 1.5, "sigmoid")  # type: ignore[operator]
    out.check(RoutingRule("sigmoid", need_renorm=False, routed_scaling_factor=1.5), BIAS)


def test_topk_sigmoid(target: Target) -> None:
    out = Outputs(target)
    with target.active():
        names.topk_sigmoid(out.weights, out.ids, LOGITS.to(target.device))
    out.check(RoutingRule("sigmoid", need_renorm=False))


def test_moe_fused_gate(target: Target) -> None:
    out = Outputs(target, K + 2)
    x, bias = LOGITS.to(target.device), BIAS.to(target.device)
    with target.active():
        got = names.moe_fused_gate(x, bias, out.weights, out.ids, 8, 4, K + 2, 2, 2.5)
    assert got[0] is out.weights and got[1] is out.ids
    shared = RoutingRule(
        "sigmoid", 8, 4, "top2", num_shared_experts=2, shared_expert_weight=1 / 2.5
    )
    out.check(shared, BIAS)
    with pytest.raises(ValueError, match="topk: expected the width of topk_ids, got 6"):
        names.moe_fused_gate(x, bias, out.weights, out.ids, 8, 4, K, 0)


@pytest.mark.parametrize("shared", ["", "sigmoid"])
def test_topk_softmax(target: Target, shared: str) -> None:
    slots = K + 2
    out = Outputs(target, slots)
    source = torch.empty_like(out.ids)
    logits = LOGITS if shared == "" else torch.cat((LOGITS, LOGITS[:, :2]), 1)
    arguments = (out.weights, out.ids, source, logits.to(target.device), True)
    with target.active():
        names.topk_softmax(*arguments, 2, shared)
    out.check(
        RoutingRule(num_shared_experts=2, shared_expert_scoring_func=shared),  # type: ignore[arg-type]
        logits=logits,
    )
    expected = torch.arange(slots) * M + torch.arange(M)[:, None]
    assert torch.equal(source.cpu(), expected.int())
    with target.active():
        names.topk_softmax(*arguments)
    out.check(RoutingRule(), logits=logits)


def test_an_unknown_score_is_refused(target: Target) -> None:
    out = Outputs(target)
    with pytest.raises(ValueError, match="scoring_func: expected one of .*, got 'gauss'"):
        names.topk_gating(out.weights, out.ids, LOGITS, score_func="gauss")  # type: ignore[arg-type]


def test_a_refusal_does_not_depend_on_earlier_calls(target: Target) -> None:
    """1 is equal to True, and rules are kept by their numbers."""
    out = Outputs(target)
    logits, bias = LOGITS.to(target.device), BIAS.to(target.device)
    arguments = (logits, bias, out.weights, out.ids, 8, 4)
    with target.active():
        names.biased_grouped_topk(*arguments, True)
        names.biased_grouped_topk(*arguments[:4], 1, 1, True)
    with pytest.raises(TypeError, match="need_renorm: expected a bool, got int"):
        names.biased_grouped_topk(*arguments, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="num_expert_group: expected an int, got bool"):
        names.biased_grouped_topk(*arguments[:4], True, 1, True)
    with pytest.raises(TypeError, match="routed_scaling_factor: expected a float, got list"):
        names.biased_grouped_topk(*arguments, True, [2.5])  # type: ignore[arg-type]
