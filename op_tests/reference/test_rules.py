"""Is the reference of routing rules right? The contract's cases, a loop over exact scores, and routers.

The routers are those of transformers, with the identity for a weight, so that the hidden states are
the logits. On ties torch.topk takes any expert, so there the weights are compared and not the ids.

Long because the contract's cases and the routers of a dozen models are tables.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from cases import INF, NAN
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aiter import reference
from aiter.ops.rule import RoutingRule

# exp, log1p and tanh are good to a unit in the last place or two, in PyTorch and in routers.
WEIGHTS = 4e-7

SIGMOID = {"scoring_func": "sigmoid"}
NINES = [-9.0] * 4
# rule, bias (a number is every expert's), logits, K, ids, weights
TABLE: list[tuple[dict[str, Any], Any, list[float], int, list[int], list[float]]] = [
    ({**SIGMOID, "num_expert_group": 2}, 0, [1, 1, -4, -4, 1.2, 0.5, -4, -4], 2, [0, 1], [0.5, 0.5]),
    ({**SIGMOID, "num_expert_group": 2, "routed_scaling_factor": 2.5}, -2, [0, 1, 2, 3, *NINES], 2,
     [3, 2], [1.29893792, 1.20106208]),
    (SIGMOID, None, [-18, -18, -18, -17, -18, -18, -18, -18], 2, [3, 0], [0.731058538, 0.268941432]),
    (SIGMOID, None, [-100] * 8, 4, [0, 1, 2, 3], [0] * 4),
    (SIGMOID, None, [-50] * 8, 4, [0, 1, 2, 3], [0.0179060474] * 4),
    ({**SIGMOID, "renorm_eps": 0.0}, None, [-50] * 8, 4, [0, 1, 2, 3], [0.25] * 4),
    (SIGMOID, [-INF, -INF, 0, -INF, -INF, 0, -INF, -INF], [0, 1, 2, 3, 4, 5, 6, 7], 4, [5, 2, 0, 1],
     [0.530017018, 0.469982952, 0, 0]),
    (SIGMOID, [100, 0, 0, 0], [NAN, 0, 1, 2], 2, [3, 2], [0.546449065, 0.453550905]),
    (SIGMOID, [100, 0, 0, 0], [NAN] * 4, 2, [0, 1], [0, 0]),
    ({"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5}, 0, [-20, -18, -30, -25], 2, [1, 0],
     [1.0965879, 0.403412163]),
    ({}, [0, 0.5, 0, 0.7], [2, 1, 0, -1], 2, [1, 3], [0.880797088, 0.119202912]),
    ({**SIGMOID, "num_expert_group": 4, "topk_group": 2}, None, [3, 1, 2, 0], 2, [0, 2],
     [0.519575179, 0.480424821]),
    (SIGMOID, -3, [0, 1, 2, 3], 2, [3, 2], [0.519575179, 0.480424821]),
    # A logit of -inf stays eligible, a bias of +inf forces, and -0 counts as +0.
    (SIGMOID, [0, 2, 0, 0], [5, -INF, 1, 0], 2, [1, 0], [0, 1]),
    (SIGMOID, [0, 0, 0, INF], [5, 4, 3, -20], 1, [3], [1.0]),
    ({**SIGMOID, "need_renorm": False}, [-0.5, -0.5, -0.5], [0, -0.0, 0], 2, [0, 1], [0.5, 0.5]),
    # +inf: the largest score that there is.
    ({"scoring_func": "sqrtsoftplus", "need_renorm": False}, None, [1, INF], 1, [1],
     [math.sqrt(torch.finfo(torch.float32).max)]),
    ({**SIGMOID, "need_renorm": False}, None, [1, INF], 1, [1], [1.0]),
    # Softmax: a row without a logit above -inf, with a bias and without one.
    ({}, None, [NAN, -INF, -INF], 2, [0, 1], [0.5, 0.5]),
    ({"need_renorm": False, "routed_scaling_factor": 2.0}, None, [NAN, -INF], 2, [0, 1], [1.0, 1.0]),
    ({"need_renorm": False}, [0, 1, 2], [NAN, -INF, -INF], 2, [2, 1], [0.0, 0.0]),
    ({"need_renorm": False}, [0, 0, 1], [INF, 3, INF], 2, [2, 0], [0.5, 0.5]),
    # Keys: of the logits, scaled and soft-capped; of the group's largest although there is a bias.
    ({**SIGMOID, "select_on": "logit"}, None, [30, 40, 50], 1, [2], [1.0]),
    (SIGMOID, None, [30, 40, 50], 1, [0], [1.0]),
    ({**SIGMOID, "select_on": "logit", "logit_scale": -1.0, "need_renorm": False}, None, [3, 0, 1], 1,
     [1], [0.5]),
    ({**SIGMOID, "softcap": 30.0, "need_renorm": False}, None, [0, 60], 2, [1, 0], [1.0, 0.5]),
    ({**SIGMOID, "num_expert_group": 2, "group_score": "max"}, 0, [1, 1, -4, -4, 1.2, 0.5, -4, -4], 1,
     [4], [1.0]),
    # Two +inf and -inf in a group: its value is NaN, which is the least.
    ({**SIGMOID, "num_expert_group": 2}, [INF, -INF, 0, 0], [9, 9, -9, -9], 1, [2], [1.0]),
    ({**SIGMOID, "renorm_min": 2.0, "renorm_eps": 0.0}, None, [0, 0, -200], 2, [0, 1], [0.25, 0.25]),
]  # fmt: skip


@pytest.mark.parametrize("case", TABLE, ids=[str(i) for i in range(len(TABLE))])
def test_the_contracts_cases(case: tuple[Any, ...]) -> None:
    options, bias, row, topk, ids, weights = case
    logits = torch.tensor([row, row], dtype=torch.float32)
    if isinstance(bias, int):
        bias = [bias] * len(row)
    got, got_ids = reference.topk_routing(
        logits,
        topk,
        rule=RoutingRule(**options),
        correction_bias=None if bias is None else torch.tensor(bias, dtype=torch.float32),
    )
    assert got.dtype == torch.float32 and got_ids.dtype == torch.int32
    assert got_ids.tolist() == [ids, ids]
    torch.testing.assert_close(
        got, torch.tensor([weights] * 2, dtype=torch.float32), rtol=WEIGHTS, atol=0
    )


@pytest.mark.parametrize("renorm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_case_is_topk_softmax(renorm: bool, dtype: torch.dtype) -> None:
    logits = (torch.randn(300, 129, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    logits[::7, ::3] = -INF
    logits[5], logits[6, :], logits[7, 3], logits[8, :128] = NAN, -INF, INF, -INF
    got = reference.topk_routing(logits, 9, rule=RoutingRule(need_renorm=renorm))
    for mine, plain in zip(got, reference.topk_softmax(logits, 9, renorm), strict=True):
        assert torch.equal(mine, plain)


# Logits of exact scores, by scoring function.
EXACT = {
    "sigmoid": {0.0: 0.5, 20.0: 1.0, -100.0: 0.0, -INF: 0.0, INF: 1.0},
    "sqrtsoftplus": {25.0: 5.0, 36.0: 6.0, 49.0: 7.0, 64.0: 8.0, -200.0: 0.0},
}
BIASES = (0.0, -0.0, 0.25, -2.0, 3.0, -20000.0, INF, -INF, NAN)


@st.composite
def exact_problems(draw: st.DrawFn) -> tuple[RoutingRule, list[float], list[float] | None, int]:
    groups, width = draw(st.sampled_from([(1, 7), (2, 3), (4, 1), (3, 4), (8, 2)]))
    experts = groups * width
    scoring = draw(st.sampled_from(sorted(EXACT)))
    logit = st.sampled_from([*EXACT[scoring], NAN])
    rule = RoutingRule(
        scoring_func=scoring,
        num_expert_group=groups,
        topk_group=draw(st.integers(1, groups)),
        group_score=draw(st.sampled_from(["top2", "max", None])),
        need_renorm=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        renorm_min=draw(st.sampled_from([0.0, 4.0])),
        renorm_eps=draw(st.sampled_from([None, 0.0, 0.5])),
    )
    row = draw(st.lists(logit, min_size=experts, max_size=experts))
    bias = draw(st.lists(st.sampled_from(BIASES), min_size=experts, max_size=experts))
    return rule, row, draw(st.sampled_from([bias, None])), draw(st.integers(1, experts))


def by_loop(
    rule: RoutingRule, row: list[float], bias: list[float] | None, topk: int
) -> tuple[list[int], list[float]]:
    """One row, expert by expert, in Python's floats, which hold all of these scores and keys."""
    scores = [EXACT[rule.scoring_func].get(x, NAN) for x in row]
    keys = [s + (bias[e] if bias else 0.0) for e, s in enumerate(scores)]
    keys = [-INF if key != key else key for key in keys]
    width = len(row) // rule.num_expert_group
    values = []
    for group in range(rule.num_expert_group):
        best = sorted(keys[group * width : (group + 1) * width], reverse=True)
        two = (rule.group_score or ("top2" if bias else "max")) == "top2" and width > 1
        value = best[0] + best[1] if two else best[0]
        values.append(-INF if value != value else value)
    ranked = sorted(range(rule.num_expert_group), key=lambda g: (-values[g], g))
    stay = ranked[: rule.topk_group]
    eligible = [e for e, key in enumerate(keys) if key > -INF and e // width in stay]
    best_first = sorted(eligible, key=lambda e: (-keys[e], e))[:topk]
    unused = [e for e in range(len(row)) if e not in best_first]
    ids = best_first + unused[: topk - len(best_first)]
    weights = [scores[e] for e in best_first] + [0.0] * (topk - len(best_first))
    if rule.need_renorm:
        eps = 1e-20 if rule.renorm_eps is None else rule.renorm_eps
        total = max(sum(weights), rule.renorm_min) + eps
        weights = [w / total if total else 0.0 for w in weights]
    return ids, [w * rule.routed_scaling_factor for w in weights]


@given(exact_problems())
@settings(max_examples=300, deadline=None)
def test_a_loop_over_exact_scores_agrees(problem: Any) -> None:
    rule, row, bias, topk = problem
    ids, weights = by_loop(*problem)
    got, got_ids = reference.topk_routing(
        torch.tensor([row]),
        topk,
        rule=rule,
        correction_bias=None if bias is None else torch.tensor(bias),
    )
    assert got_ids[0].tolist() == ids
    torch.testing.assert_close(got[0], torch.tensor(weights), rtol=2e-7, atol=1e-38)


def test_the_bias_keeps_its_dtype_and_f32_logits_their_bits() -> None:
    """Rounded to bf16, a bias of 11.2 or a key would choose others."""
    logits = torch.full((1, 8), -18.0)
    bias = torch.full((8,), 11.2)
    bias[6] = torch.nextafter(bias[6], torch.tensor(INF))
    rule = RoutingRule(scoring_func="sigmoid")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ids = reference.topk_routing(logits.to(dtype), 1, rule=rule, correction_bias=bias)[1]
        assert ids.tolist() == [[6]]
    ids = reference.topk_routing(logits, 1, rule=rule, correction_bias=bias.bfloat16())[1]
    assert ids.tolist() == [[0]]


def test_shared_experts() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0, -20.0], [0.0, 0.0, 0.0, NAN, 30.0]])
    fixed = RoutingRule(num_shared_experts=2, shared_expert_weight=0.25, routed_scaling_factor=2.0)
    weights, ids = reference.topk_routing(logits[:, :3], 1, rule=fixed)
    assert ids.tolist() == [[1, 3, 4], [0, 3, 4]]
    assert weights.tolist() == [[2.0, 0.25, 0.25]] * 2
    scored = RoutingRule(num_shared_experts=2, shared_expert_scoring_func="sigmoid")
    weights, ids = reference.topk_routing(logits, 2, rule=scored)
    assert ids.tolist() == [[1, 2, 3, 4], [0, 1, 3, 4]]
    want = torch.tensor([0.5, 2.06115369e-9])
    torch.testing.assert_close(weights[0, 2:], want, rtol=WEIGHTS, atol=0)
    assert weights[1, 2:].tolist() == [0.0, 1.0]
    alone, alone_ids = reference.topk_routing(logits[:, :3], 2)
    assert torch.equal(weights[:, :2], alone) and torch.equal(ids[:, :2], alone_ids)


def test_zero_experts_take_part_in_choice_and_sum() -> None:
    rule = RoutingRule(num_zero_experts=2, need_renorm=False, routed_scaling_factor=6.0)
    logits = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    weights, ids = reference.topk_routing(logits, 3, rule=rule)
    assert ids.tolist() == [[3, 2, 1]]
    want = 6 * torch.softmax(logits, 1)[:, [3, 2, 1]]
    torch.testing.assert_close(weights, want, rtol=WEIGHTS, atol=0)


def test_sorting_of_shared_experts() -> None:
    """Rows choose expert 0 and 1, and both get the shared expert 2."""
    rule = RoutingRule(num_shared_experts=1, shared_expert_weight=0.5)
    logits = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    got = reference.topk_routing_sorting(logits, 1, 3, 5, torch.bfloat16, rule=rule, block_size=2)
    sorted_ids, sorted_weights, experts, counts, moe_buf = got
    pad = (2 << 24) | 2
    assert sorted_ids.shape == (2 * 2 + 3 * 2 - 2,) and experts.shape == (4,)
    assert sorted_ids[:6].tolist() == [0, pad, 1, pad, 1 << 24, (1 << 24) | 1]
    assert experts[:3].tolist() == [0, 1, 2] and counts.tolist() == [6, 2]
    assert sorted_weights[:6].tolist() == [1.0, 0.0, 1.0, 0.0, 0.5, 0.5]
    assert not moe_buf.view(torch.uint8).any()


def test_sorting_of_zero_experts() -> None:
    """2 experts, 2 zero; rows choose [zero 2, 0] and [1, zero 3]."""
    arguments: dict[str, Any] = {"rule": RoutingRule(num_zero_experts=2), "block_size": 2}
    logits = torch.tensor([[1.0, 0.0, 9.0, -9.0], [0.0, 5.0, -9.0, 4.0]])
    got = reference.topk_routing_sorting(logits, 2, 2, 5, torch.bfloat16, **arguments)
    assert got[0].shape == (2 * 2 + 2 * 2 - 2,) and got[2].shape == (3,)
    assert got[0][:4].tolist() == [1 << 24, (2 << 24) | 2, 1, (2 << 24) | 2]
    assert got[2][:2].tolist() == [0, 1] and got[3].tolist() == [4, 2]
    flat = reference.topk_routing_sorting(
        logits, 2, 2, 5, torch.bfloat16, id_format="flat",
        expert_mask=torch.tensor([0, 1], dtype=torch.int32), **arguments,
    )  # fmt: skip
    assert flat[0].shape == (2 * 2 + 4 * 2 - 2,)
    assert flat[0][:8].tolist() == [1, 4, 2, 4, 0, 4, 3, 4]
    assert flat[2][:4].tolist() == [-1, 0, -1, -1] and flat[3].tolist() == [8, 2]


def test_the_plain_sort_is_topk_softmax_sorting() -> None:
    logits = torch.randn(9, 8, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1], dtype=torch.int32)
    count = torch.tensor([7], dtype=torch.int32)
    plain = reference.topk_softmax_sorting(
        logits, 3, 8, 4, torch.float32, False, 4, mask, num_local_tokens=count
    )
    got = reference.topk_routing_sorting(
        logits, 3, 8, 4, torch.float32, rule=RoutingRule(need_renorm=False), block_size=4,
        expert_mask=mask, num_local_tokens=count,
    )  # fmt: skip
    valid = int(plain[3][0])
    for mine, want, defined in zip(got, plain, (valid, valid, valid // 4, 2, 7), strict=True):
        assert mine.shape == want.shape and torch.equal(mine[:defined], want[:defined])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rule": RoutingRule(num_expert_group=3)}, "3 groups of equal size, got 8"),
        ({"correction_bias": torch.zeros(7)}, r"correction_bias: expected shape \[8\].*got \[7\]"),
        ({"correction_bias": torch.zeros(8).double()}, "correction_bias: .*float64"),
        ({"rule": RoutingRule(num_zero_experts=8)}, "more columns than the rule's 8 zero"),
        ({"topk": 9}, "topk: expected 1 to 8"),
        ({"gating_output": torch.zeros(2, 8).long()}, "gating_output: .*int64"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reference.topk_routing(**{"gating_output": torch.zeros(2, 8), "topk": 2, **arguments})
    for name, value in (("rule", "softmax"), ("topk", 2.0), ("correction_bias", [0.0])):
        with pytest.raises(TypeError, match=f"{name}: expected"):
            reference.topk_routing(torch.zeros(2, 8), **{"topk": 2, name: value})
    with pytest.raises(ValueError, match="8 columns for num_experts = 8, got 7"):
        reference.topk_routing_sorting(torch.zeros(2, 7), 2, 8, 4, torch.float32)
    with pytest.raises(ValueError, match="id_format: expected 'slot' or 'flat', got 'page'"):
        reference.topk_routing_sorting(torch.zeros(2, 8), 2, 8, 4, torch.float32, id_format="page")


E, K = 48, 5
GROUPED = {"n_group": 4, "topk_group": 2}
# Module and class of the router; its config's values; the rule, that of the values.
ROUTERS: dict[str, tuple[dict[str, Any], RoutingRule]] = {
    "deepseek_v3.DeepseekV3TopkRouter": (
        {"n_routed_experts": E, **GROUPED, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        RoutingRule("sigmoid", 4, 2, routed_scaling_factor=2.5),
    ),
    "glm4_moe.Glm4MoeTopkRouter": (
        {"n_routed_experts": E, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5},
        RoutingRule("sigmoid", routed_scaling_factor=1.5),
    ),
    "deepseek_v2.DeepseekV2TopkRouter": (
        {
            "n_routed_experts": E, **GROUPED, "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
        },
        RoutingRule("softmax", 4, 2, need_renorm=False, routed_scaling_factor=16.0),
    ),
    "deepseek_v4.DeepseekV4TopKRouter": (
        {"n_routed_experts": E, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5},
        RoutingRule("sqrtsoftplus", routed_scaling_factor=1.5),
    ),
    "minimax_m2.MiniMaxM2TopKRouter": ({"num_local_experts": E}, RoutingRule("sigmoid", renorm_eps=0.0)),
    "ernie4_5_moe.Ernie4_5_MoeTopKRouter": (
        {"moe_num_experts": E, "moe_k": K}, RoutingRule(renorm_min=1e-12),
    ),
    "longcat_flash.LongcatFlashTopkRouter": (
        {"n_routed_experts": E - 16, "zero_expert_num": 16, "moe_topk": K, "routed_scaling_factor": 6.0},
        RoutingRule(need_renorm=False, num_zero_experts=16, routed_scaling_factor=6.0),
    ),
    "lfm2_moe.Lfm2MoeTopKRouter": (
        {"num_experts": E, "use_expert_bias": True, "norm_topk_prob": True},
        RoutingRule("sigmoid", renorm_eps=1e-6),
    ),
    "laguna.LagunaTopKRouter": (
        {"num_experts": E, "moe_router_logit_softcapping": 3.0},
        RoutingRule("sigmoid", softcap=3.0, renorm_eps=0.0),
    ),
    "qwen3_moe.Qwen3MoeTopKRouter": (
        {"num_experts": E, "norm_topk_prob": False}, RoutingRule(need_renorm=False),
    ),
    "gpt_oss.GptOssTopKRouter": ({"num_local_experts": E}, RoutingRule()),
}  # fmt: skip


def make_router(name: str, options: dict[str, Any]) -> Any:
    """A router whose logits are its hidden states, and its correction bias."""
    pytest.importorskip("transformers")
    module, kind = name.split(".")
    try:
        found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        configs = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    except ImportError:
        pytest.skip(f"transformers has no {module}")
    prefix = kind.removesuffix("TopkRouter").removesuffix("TopKRouter")
    config = getattr(configs, f"{prefix}Config")(
        **{"hidden_size": E, "num_attention_heads": 4, "num_experts_per_tok": K, **options}
    )
    router = getattr(found, kind)(config)
    with torch.no_grad():
        weight = router.classifier.weight if hasattr(router, "classifier") else router.weight
        weight.copy_(torch.eye(E))
        if getattr(router, "bias", None) is not None:
            router.bias.zero_()
    return router


def weights_and_ids(returned: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Of what a router returns: with logits or without, in the order of its version of transformers."""
    (ids,) = (part for part in returned if not part.is_floating_point())
    (weights,) = (part for part in returned if part is not ids and part.shape == ids.shape)
    return weights, ids


def test_what_a_router_returns_is_told_apart() -> None:
    logits, weights, ids = torch.rand(3, E), torch.rand(3, K), torch.zeros(3, K, dtype=torch.int64)
    for returned in (
        (logits, weights, ids),
        (ids, weights, logits),
        (weights, ids),
        (ids, weights),
    ):
        found = weights_and_ids(returned)
        assert found[0] is weights and found[1] is ids


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("rounded", [False, True])
def test_routers_of_transformers_agree(name: str, rounded: bool) -> None:
    options, rule = ROUTERS[name]
    router = make_router(name, options)
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(400, E, generator=generator) * 3
    bias: Tensor | None = None
    if rounded:  # many ties
        logits = logits.bfloat16().float()
    arguments: tuple[Tensor, ...] = ()
    if name.split(".")[0] not in ("qwen3_moe", "gpt_oss", "deepseek_v2"):
        bias = torch.zeros(E) if rounded else torch.randn(E, generator=generator) / 10
        if hasattr(router, "moe_statics"):
            router.moe_statics.e_score_correction_bias.data.copy_(bias.view(1, E))
        elif hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias.data.copy_(bias)
        else:
            arguments = (bias,)
    with torch.no_grad():
        want, want_ids = weights_and_ids(router(logits, *arguments))
    got, ids = reference.topk_routing(logits, K, rule=rule, correction_bias=bias)
    if rounded and rule.num_expert_group > 1:  # equal groups: any of them
        rows = (ids.sort(dim=1).values == want_ids.sort(dim=1).values).all(dim=1)
        assert rows.float().mean() > 0.9
        got, ids, want, want_ids = (tensor[rows] for tensor in (got, ids, want, want_ids))
    if not rounded:
        assert torch.equal(ids.sort(dim=1).values.long(), want_ids.sort(dim=1).values)
    torch.testing.assert_close(
        got.sort(dim=1).values, want.sort(dim=1).values, rtol=WEIGHTS, atol=0
    )


def test_llama4_chooses_by_the_logit() -> None:
    """Its experts are weighed by their input; the ids and the sigmoids are the rule's."""
    transformers = pytest.importorskip("transformers")
    found = importlib.import_module("transformers.models.llama4.modeling_llama4")
    sizes = {"hidden_size": E, "num_local_experts": E, "num_experts_per_tok": 2}
    router = found.Llama4Router(transformers.Llama4TextConfig(**sizes))
    logits = torch.randn(200, E, generator=torch.Generator().manual_seed(2)) * 20
    by_logit = RoutingRule("sigmoid", select_on="logit", need_renorm=False)
    weights, ids = reference.topk_routing(logits, 2, rule=by_logit)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
        scores, _ = router(logits)
    got = torch.zeros_like(logits).scatter(1, ids.long(), weights)
    torch.testing.assert_close(got, scores, rtol=WEIGHTS, atol=0)
