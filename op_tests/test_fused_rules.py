"""Does the fused launch route by any rule, in either id format, as the chain and the reference do?"""

from __future__ import annotations

import itertools
import re
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from hypothesis import given, settings
from rule_calls import MODEL_DIM, Call
from rule_cases import BIASES, LOGITS, MODELS, Problem, num_logits, problems
from runners import can_hand_over
from targets import Target
from torch import Tensor

import aiter
import aiter.fused_moe
from aiter.ops.rule import RoutingRule
from aiter.ops.topk_routing import topk_routing
from aiter.routing.calls import empty_sorted_buffers, topk_routing_sorting

FORMATS = ("slot", "flat")
PLAIN = RoutingRule()


def random_mask(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (size,), generator=generator, dtype=torch.int32)


@pytest.mark.parametrize("id_format", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_models(target: Target, model: str, id_format: str) -> None:
    """One token in registers, a few in single blocks, with a mask and rows that do not count, and
    more than a block has slots."""
    rule, num_experts, topk, has_bias = MODELS[model]
    generator = torch.Generator().manual_seed(len(model))
    num_routed = num_experts + rule.num_zero_experts
    bias = torch.randn(num_routed, generator=generator) * 0.1 if has_bias else None
    mask = random_mask(num_experts + rule.num_shared_experts, generator)
    for count, chosen, num_local in ((1, None, None), (7, None, 5), (7, mask, None), (11, mask, 9)):
        logits = torch.randn(count, num_logits(rule, num_experts), generator=generator) * 2
        Call(
            target, logits, topk, rule, bias, block_size=8 if count < 9 else 4, mask=chosen,
            num_local=num_local, id_format=id_format,
        ).check()  # fmt: skip


@settings(max_examples=13, deadline=None)
@given(problem=problems(most_experts=400))
def test_random_rules(target: Target, problem: Problem) -> None:
    rule, num_experts, topk, kind, bias_kind, dtype, seed = problem
    generator = torch.Generator().manual_seed(seed)
    logits = LOGITS[kind]((6, num_logits(rule, num_experts)), generator).to(dtype)
    bias = None
    if bias_kind != "none":
        bias = BIASES[bias_kind](num_experts + rule.num_zero_experts, generator)
    mask = random_mask(num_experts + rule.num_shared_experts, generator) if seed % 2 else None
    Call(
        target, logits, topk, rule, bias, block_size=1 + seed % 9, mask=mask,
        num_local=seed % 7 if seed % 3 == 0 else None, id_format=FORMATS[seed % 5 % 2],
    ).check()  # fmt: skip


@pytest.mark.parametrize("renorm", [True, False], ids=["renorm", "softmax"])
def test_plain_softmax_with_topk_and_flat_ids(target: Target, renorm: bool) -> None:
    """Weights are those of the kernels without a rule, to the bit."""
    generator = torch.Generator().manual_seed(1)
    rule = RoutingRule(need_renorm=renorm)
    for (num_experts, topk), count, dtype in itertools.product(
        ((128, 4), (300, 9), (200, 33)), (1, 9), (torch.bfloat16, torch.float32)
    ):
        logits = torch.randn(count, num_experts, generator=generator).to(dtype)
        for id_format in FORMATS:
            call = Call(target, logits, topk, rule, None, id_format=id_format)
            call.check()
        _, weights, ids = call.route(0)
        plain_weights = torch.empty(count, topk, device=target.device)
        plain_ids, source = (torch.empty_like(plain_weights, dtype=torch.int32) for _ in range(2))
        with target.active():
            aiter.topk_softmax(plain_weights, plain_ids, source, logits.to(target.device), renorm)
        assert torch.equal(weights.view(torch.int32), plain_weights.cpu().view(torch.int32))
        assert torch.equal(ids, plain_ids.cpu())


def test_same_bits_at_any_number_of_rows(target: Target) -> None:
    """The same row at M = 1, 300 and 1025, where other kernels and workgroups route."""
    rule, num_experts, topk, _ = MODELS["deepseek-v3"]
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1025, num_experts, generator=generator)
    bias = torch.randn(num_experts, generator=generator) * 0.1
    results = []
    for count in (1, 300, 1025):
        weights = torch.empty(count, topk, device=target.device)
        ids = torch.empty_like(weights, dtype=torch.int32)
        with target.active():
            topk_routing_sorting(
                logits[:count].to(target.device), topk, num_experts, 0, torch.bfloat16, rule=rule,
                correction_bias=bias.to(target.device), topk_out=(weights, ids),
            )  # fmt: skip
        results.append((weights[0].cpu(), ids[0].cpu()))
    alone = torch.empty(1, topk, device=target.device)
    alone_ids = torch.empty_like(alone, dtype=torch.int32)
    with target.active():
        topk_routing(
            alone, alone_ids, logits[:1].to(target.device), rule=rule,
            correction_bias=bias.to(target.device),
        )  # fmt: skip
    results.append((alone[0].cpu(), alone_ids[0].cpu()))
    for weights, ids in results[1:]:
        assert torch.equal(weights.view(torch.int32), results[0][0].view(torch.int32))
        assert torch.equal(ids, results[0][1])


def most_of_one_workgroup(target: Target, num_experts: int, topk: int, rule: RoutingRule) -> int:
    """The largest M that one workgroup of the fused launch has LDS for, as its refusal says."""
    many = torch.zeros(1, num_logits(rule, num_experts), device=target.device).expand(60_000, -1)
    buffers = empty_sorted_buffers(
        len(many), topk, num_experts, 0, torch.bfloat16, 1, device=target.device
    )
    with target.active(), pytest.raises(ValueError, match="rows, which is what fits in") as refusal:
        aiter.fused_topk_moe_sorting_fwd(
            many, *buffers, num_experts, topk, 1, rule.need_renorm, rule=rule, cluster_size=1
        )
    found = re.search(r"at most (\d+) rows", str(refusal.value))
    assert found is not None
    return int(found[1])


IN_MEMORY: dict[str, tuple[RoutingRule, int, bool]] = {
    "bias": (RoutingRule(need_renorm=False, num_zero_experts=256), 512, True),
    "groups of 24": (RoutingRule(num_expert_group=8, topk_group=4, need_renorm=False), 192, False),
    "plain": (RoutingRule(need_renorm=False), 300, False),
}


@pytest.mark.parametrize("name", IN_MEMORY)
def test_softmax_has_the_same_bits_where_lds_is_full(target: Target, name: str) -> None:
    """The fused launch then selects from memory, and sums a softmax in the same order."""
    rule, num_experts, has_bias = IN_MEMORY[name]
    topk = 32
    count = most_of_one_workgroup(target, num_experts, topk, rule)
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(count, num_logits(rule, num_experts), generator=generator)
    bias = torch.randn(logits.shape[1], generator=generator) * 0.001 if has_bias else None
    call = Call(target, logits, topk, rule, bias)
    _, weights, ids = call.route(0, cluster_size=1)
    expected = torch.empty(count, topk, device=target.device)
    expected_ids = torch.empty_like(expected, dtype=torch.int32)
    on_device = [None if t is None else t.to(target.device) for t in (logits, bias)]
    with target.active():
        topk_routing(expected, expected_ids, on_device[0], rule=rule, correction_bias=on_device[1])
    assert torch.equal(ids, expected_ids.cpu())
    assert torch.equal(weights.view(torch.int32), expected.cpu().view(torch.int32))


def test_more_slots_than_places_are_not_handed_over(target: Target) -> None:
    """Zero experts that may take most slots of a row leave no places for a hand-over."""
    if not can_hand_over(target):
        pytest.skip("GPUs with clusters hand nothing over")
    rule = RoutingRule(num_zero_experts=6)
    logits = torch.zeros(40, 8, device=target.device)

    def call(block_size: int) -> int:
        slots = 40 * 4 + 2 * block_size - 4
        ids = torch.empty(slots, dtype=torch.int32, device=target.device)
        num_valid = torch.empty(2, dtype=torch.int32, device=target.device)
        with target.active():
            aiter.fused_topk_moe_sorting_fwd(
                logits, ids, torch.empty_like(ids, dtype=torch.float32), torch.empty_like(ids),
                num_valid, torch.empty(40, 0, device=target.device), 2, 4, block_size, True,
                handover_size=2, rule=rule,
            )  # fmt: skip
        return int(num_valid[0])

    assert call(block_size=2) == 80
    with pytest.raises(ValueError, match="handover_size: expected 1 or None, as sorted_ids"):
        call(block_size=1)


def test_repeated_calls_are_known(target: Target) -> None:
    """A known call takes the new bias and the new outputs."""
    generator = torch.Generator().manual_seed(4)
    rule = RoutingRule("sigmoid", num_expert_group=4, topk_group=2)
    logits = torch.randn(5, 32, generator=generator)
    for _ in range(3):
        bias = torch.randn(32, generator=generator)
        Call(target, logits, 4, rule, bias).check()


def bad_calls() -> list[tuple[str, dict[str, Any], str]]:
    """(what is wrong, changed arguments of topk_routing_sorting, the error's text)."""
    weights, ids = torch.empty(2, 4), torch.empty(2, 4, dtype=torch.int32)
    return [
        ("groups", {"rule": RoutingRule(num_expert_group=3)}, "3 groups of equal size, got 16"),
        ("bias", {"correction_bias": torch.zeros(15)}, r"correction_bias: expected shape \[16\]"),
        ("shared", {"rule": RoutingRule(num_zero_experts=3)}, r"gating_output: expected shape .*19"),
        ("format", {"id_format": "round"}, "id_format: expected 'slot' or 'flat', got 'round'"),
        ("narrow", {"topk_out": (weights[:, :3], ids)}, r"topk_out\[0\]: expected .*\[2, 4\]"),
        ("long", {"topk_out": (weights, ids.long())}, r"topk_out\[1\]: expected .*int32"),
        ("shared memory", {"topk_out": (weights, weights.view(torch.int32))}, "memory of its own"),
        ("mask", {"expert_mask": torch.ones(15).int()}, r"local_expert_mask: expected shape \[16\]"),
    ]  # fmt: skip


@pytest.mark.parametrize("policy", [0, 1])
@pytest.mark.parametrize("bad", bad_calls(), ids=lambda bad: bad[0])
def test_bad_input(target: Target, bad: tuple[str, dict[str, Any], str], policy: int) -> None:
    _, changes, text = bad

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            if value[0].data_ptr() == value[1].data_ptr():
                first = value[0].to(target.device)
                return first, first.view(torch.int32)
            return tuple(moved(each) for each in value)
        return value.to(target.device) if isinstance(value, Tensor) else value

    options = {"rule": RoutingRule("sigmoid"), **{k: moved(v) for k, v in changes.items()}}
    gating = torch.zeros(2, 16, device=target.device)
    with target.active(), pytest.raises(ValueError, match=text):
        topk_routing_sorting(
            gating, 4, 16, MODEL_DIM, torch.bfloat16, dispatch_policy=policy, **options
        )
