"""Which routing rules are tested, and when is what they chose right? Used by the tests of rules.

The reference (`aiter.reference.rules`) computes exp, log1p and tanh by PyTorch, so its keys may differ
from ours in their last bits. `check_routing` therefore asks of ids only what a key that is off by
KEY_ERROR allows, and compares exactly where scores are exact (`exact_logits`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from buffers import require
from hypothesis import strategies as st
from torch import Tensor

from aiter.ops.rule import RoutingRule
from aiter.reference import rules as reference

WEIGHT_RTOL = 2e-6
"""Two scores and their sum, each off by a few roundings of exp, log1p or tanh."""

SOFTCAP_RTOL = 4e-7
"""More for each unit of a soft cap: exp turns an error of x, here of tanh's, into a relative one."""

WEIGHT_ATOL = 2.0**-126
"""The smallest normal float32: subnormal scores are off by whole units."""

KEY_ERROR = 2.0**-21
"""Relative to the larger of score and bias: an error of 2e-7 in s, and the rounding of the sum."""

NAN = float("nan")
INF = float("inf")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A rule with experts, K, kinds of logits and bias, a dtype and a seed.
Problem = tuple[RoutingRule, int, int, str, str, torch.dtype, int]
Answer = tuple[list[float], list[float] | None, RoutingRule, list[int], list[float]]


def _sigmoid(**scalars: object) -> RoutingRule:
    return RoutingRule(scoring_func="sigmoid", **scalars)  # type: ignore[arg-type]


# The contract's table: logits, bias, rule, ids, weights.
ANSWERS: tuple[Answer, ...] = (
    ([1, 1, -4, -4, 1.2, 0.5, -4, -4], [0] * 8, _sigmoid(num_expert_group=2), [0, 1], [0.5, 0.5]),
    ([0, 1, 2, 3, -9, -9, -9, -9], [-2] * 8,
     _sigmoid(num_expert_group=2, routed_scaling_factor=2.5), [3, 2], [1.29893792, 1.20106208]),
    ([-18, -18, -18, -17, -18, -18, -18, -18], None, _sigmoid(), [3, 0], [0.731058538, 0.268941432]),
    ([-100] * 8, None, _sigmoid(), [0, 1, 2], [0, 0, 0]),
    ([-50] * 8, None, _sigmoid(), [0, 1, 2, 3], [0.0179060474] * 4),
    ([-50] * 8, None, _sigmoid(renorm_eps=0.0), [0, 1, 2, 3], [0.25] * 4),
    ([0, 1, 2, 3, 4, 5, 6, 7], [-INF, -INF, 0, -INF, -INF, 0, -INF, -INF], _sigmoid(), [5, 2, 0, 1],
     [0.530017018, 0.469982952, 0, 0]),
    ([NAN, 0, 1, 2], [100, 0, 0, 0], _sigmoid(), [3, 2], [0.546449065, 0.453550905]),
    ([NAN] * 4, [0] * 4, _sigmoid(), [0, 1], [0, 0]),
    ([-20, -18, -30, -25], [0] * 4,
     RoutingRule(scoring_func="sqrtsoftplus", routed_scaling_factor=1.5), [1, 0],
     [1.0965879, 0.403412163]),
    ([2, 1, 0, -1], [0, 0.5, 0, 0.7], RoutingRule(), [1, 3], [0.880797088, 0.119202912]),
    ([3, 1, 2, 0], None, _sigmoid(num_expert_group=4, topk_group=2), [0, 2],
     [0.519575179, 0.480424821]),
    ([0, 1, 2, 3], [-3] * 4, _sigmoid(), [3, 2], [0.519575179, 0.480424821]),
)  # fmt: skip

# Of models: (rule, E, K, whether there is a bias).
MODELS: dict[str, tuple[RoutingRule, int, int, bool]] = {
    "deepseek-v3": (_sigmoid(num_expert_group=8, topk_group=4, routed_scaling_factor=2.5), 256, 8, True),
    "kimi-k2": (_sigmoid(routed_scaling_factor=2.827), 384, 8, True),
    "kimi-k3": (_sigmoid(), 896, 16, True),
    "glm-4.5": (_sigmoid(), 160, 8, True),
    "nemotron-3": (_sigmoid(routed_scaling_factor=2.5), 512, 22, True),
    "ling-2.5": (_sigmoid(num_expert_group=8, topk_group=4, routed_scaling_factor=2.5), 512, 8, True),
    "ax-k1": (_sigmoid(num_expert_group=8, topk_group=4, routed_scaling_factor=2.5), 192, 8, True),
    "deepseek-v2": (RoutingRule(num_expert_group=8, topk_group=3, need_renorm=False,
                                routed_scaling_factor=16.0), 160, 6, False),
    "deepseek-v4": (RoutingRule("sqrtsoftplus", routed_scaling_factor=1.5), 256, 6, True),
    "ernie-4.5": (RoutingRule(renorm_min=1e-12), 64, 6, True),
    "longcat": (RoutingRule(need_renorm=False, routed_scaling_factor=6.0, num_zero_experts=256),
                512, 12, True),
    "llama-4": (_sigmoid(need_renorm=False, select_on="logit"), 16, 1, False),
    "grok": (RoutingRule(softcap=30.0), 8, 2, False),
    "granite": (RoutingRule(logit_scale=0.25), 40, 8, False),
    "qwen2+shared": (RoutingRule(need_renorm=False, num_shared_experts=1,
                                 shared_expert_scoring_func="sigmoid"), 60, 4, False),
    "glm+shared": (_sigmoid(num_shared_experts=2, shared_expert_weight=0.5), 160, 8, True),
}  # fmt: skip

# Sigmoid: 0, 1/2 and 1 with their logits.
EXACT = torch.tensor([-200.0, 0.0, 20.0])


def exact_logits(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Logits whose sigmoid is 0, 1/2 or 1 in every arithmetic, with many ties."""
    return EXACT[torch.randint(len(EXACT), shape, generator=generator)]


def exact_bias(size: int, generator: torch.Generator) -> Tensor:
    """Multiples of 1/4, some of them -inf or +inf."""
    bias = torch.randint(-4, 5, (size,), generator=generator) / 4.0
    bias[torch.rand(size, generator=generator) < 0.1] = -INF
    bias[torch.rand(size, generator=generator) < 0.02] = INF
    return bias


def random_bias(size: int, generator: torch.Generator) -> Tensor:
    """What training leaves: small numbers around 0."""
    return torch.randn(size, generator=generator) * 0.1


def _special(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    values = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 30.0, -30.0, -88.8, 89.0])
    return values[torch.randint(len(values), shape, generator=generator)]


LOGITS: dict[str, Callable[[tuple[int, int], torch.Generator], Tensor]] = {
    "normal": lambda shape, generator: torch.randn(shape, generator=generator) * 2,
    "low": lambda shape, generator: torch.randn(shape, generator=generator) - 20,
    "special": _special,
    "exact": exact_logits,
}
BIASES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "random": random_bias,
    "large": lambda size, generator: (torch.rand(size, generator=generator) - 0.5) * 40_000,
    "exact": exact_bias,
    "nan": lambda size, generator: torch.where(
        torch.rand(size, generator=generator) < 0.3, NAN, 0.25
    ),
}


@st.composite
def problems(draw: st.DrawFn, most_experts: int = 1 << 14) -> Problem:
    """A rule with experts, K, kinds of logits and bias, a dtype and a seed."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 4, 8, 12, 33]))
    width = draw(st.sampled_from([1, 2, 3, 7, 8, 16, 20, 24, 33, 64, 260]))
    shared = draw(st.sampled_from([0, 0, 1, 3]))
    select_on = draw(st.sampled_from(["score", "score", "score", "logit"]))
    rule = RoutingRule(
        scoring_func=draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
        num_expert_group=groups,
        topk_group=draw(st.integers(1, groups)),
        group_score=draw(st.sampled_from([None, "top2", "max"])),
        need_renorm=draw(st.booleans()),
        renorm_eps=draw(st.sampled_from([None, 0.0, 1e-20, 1e-3])),
        renorm_min=draw(st.sampled_from([0.0, 1e-12, 0.5])),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5, -0.3])),
        select_on=select_on,
        logit_scale=draw(st.sampled_from([1.0, 1.0, 0.25, -1.5])),
        softcap=draw(st.sampled_from([0.0, 0.0, 30.0])),
        num_shared_experts=shared,
        shared_expert_scoring_func=draw(st.sampled_from(["", "sigmoid"])),
        shared_expert_weight=0.75,
        num_zero_experts=draw(st.sampled_from([0, 1, 9])) if groups == 1 and not shared else 0,
    )
    num_experts = groups * min(width, max(1, most_experts // groups))
    topk = min(draw(st.sampled_from([1, 2, 6, 8, 16, 22, 32, 33, 70])), num_experts)
    bias = "none" if select_on == "logit" else draw(st.sampled_from(["none", *BIASES]))
    return (
        rule, num_experts, topk, draw(st.sampled_from(list(LOGITS))), bias,
        draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**20)),
    )  # fmt: skip


def num_logits(rule: RoutingRule, num_experts: int) -> int:
    """The width of the logits for E routed experts."""
    return rule.num_logits(num_experts + rule.num_shared_experts)


def check_exact(
    got: tuple[Tensor, Tensor], gating: Tensor, rule: RoutingRule, bias: Tensor | None
) -> None:
    """(weights, ids) of logits whose scores are exact: ids equal, weights within the tolerance."""
    topk = got[1].shape[1] - rule.num_shared_experts
    weights, ids = reference.topk_routing(gating, topk, rule=rule, correction_bias=bias)
    wrong = (got[1] != ids).any(1).nonzero().flatten()
    if wrong.numel():
        row = int(wrong[0])
        require(
            False,
            f"ids of row {row}: expected {ids[row].tolist()}, got {got[1][row].tolist()};"
            f" {len(wrong)} rows differ",
        )
    _check_weights(got[0], weights, rule)


def check_routing(
    got: tuple[Tensor, Tensor], gating: Tensor, rule: RoutingRule, bias: Tensor | None
) -> None:
    """(weights, ids) as `check_exact`, but in rows where keys are closer than KEY_ERROR."""
    topk = got[1].shape[1] - rule.num_shared_experts
    weights, ids = reference.topk_routing(gating, topk, rule=rule, correction_bias=bias)
    for row in got[1].tolist():
        require(len(set(row)) == len(row), f"ids: expected distinct ones in a row, got {row}")
    same = (got[1] == ids).all(1)
    for row in (~same).nonzero().flatten().tolist():
        require(
            _is_close_call(gating[row : row + 1], rule, bias, topk),
            f"ids of row {row}: expected {ids[row].tolist()}, got {got[1][row].tolist()}",
        )
    require(bool(same.float().mean() > 0.7) or len(same) < 8, "expected most rows to be clear")
    _check_weights(got[0][same], weights[same], rule)


def _check_weights(got: Tensor, expected: Tensor, rule: RoutingRule) -> None:
    rtol = WEIGHT_RTOL + SOFTCAP_RTOL * rule.softcap
    error = (got.double() - expected.double()).abs()
    wrong = ~(error <= rtol * expected.double().abs() + WEIGHT_ATOL)
    if wrong.any():
        row, slot = wrong.nonzero()[0].tolist()
        require(
            False,
            f"weight [{row}, {slot}]: expected {expected[row, slot].item()!r}, got"
            f" {got[row, slot].item()!r}; {int(wrong.sum())} differ",
        )


def _is_close_call(
    gating: Tensor, rule: RoutingRule, bias: Tensor | None, topk: int, tries: int = 24
) -> bool:
    """Whether keys that are off by KEY_ERROR change the choice of the one row."""
    generator = torch.Generator().manual_seed(0)
    size = gating.shape[1] - (rule.num_shared_experts if rule.shared_expert_scoring_func else 0)
    base = torch.zeros(size) if bias is None else bias.float()
    if rule.select_on == "logit" or bias is None:
        # NOTE: a bias would change the kind of the rule; logits are moved instead.
        shaken = [
            gating.float()
            * (1 + KEY_ERROR * (2 * torch.rand(gating.shape, generator=generator) - 1))
            for _ in range(tries)
        ]
        chosen = [
            reference.topk_routing(x, topk, rule=rule, correction_bias=bias)[1] for x in shaken
        ]
    else:
        reach = KEY_ERROR * base.abs().clamp(min=1.0)
        chosen = [
            reference.topk_routing(
                gating,
                topk,
                rule=rule,
                correction_bias=base + reach * (2 * torch.rand(size, generator=generator) - 1),
            )[1]
            for _ in range(tries)
        ]
    return len({tuple(ids[0].tolist()) for ids in chosen}) > 1
