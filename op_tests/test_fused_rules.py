"""Does the fused launch route by any rule, in either id format, as the chain and the reference do?

Top-k, which the launch writes as well, is compared as in test_topk_routing.py, and the sorted buffers to
the bit with the reference's sort of it; every path and number of workgroups has to give the same bits.
"""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import _checkout  # noqa: F401
import pytest
import torch
from buffers import GuardedBuffer
from checks import check_equal
from hypothesis import given, settings
from route_calls import has_clusters
from rule_cases import BIASES, LOGITS, MODELS, Problem, check_routing, num_logits, problems
from runners import can_hand_over, hands_over_unasked
from targets import Target
from torch import Tensor

import aiter
import aiter.fused_moe
from aiter.ops.rule import RoutingRule
from aiter.ops.topk_routing import topk_routing
from aiter.reference import rules as reference
from aiter.routing.buffers import Buffers
from aiter.routing.calls import topk_routing_sorting

FORMATS = ("slot", "flat")
MODEL_DIM = 5
PLAIN = RoutingRule()

Outputs = tuple[Tensor, ...]  # the five sorted buffers


def expected_sort(
    weights: Tensor, ids: Tensor, gating: Tensor, rule: RoutingRule, **options: Any
) -> Outputs:
    """The reference's sort of this top-k."""
    topk = ids.shape[1] - rule.num_shared_experts
    routed = gating.shape[1] - rule.num_zero_experts
    if rule.shared_expert_scoring_func:
        routed -= rule.num_shared_experts
    num_experts = routed + rule.num_shared_experts
    with mock.patch.object(reference, "topk_routing", lambda *_, **__: (weights, ids)):
        return reference.topk_routing_sorting(
            gating, topk, num_experts, MODEL_DIM, torch.bfloat16, rule=rule, **options
        )


class Call:
    """One problem on one target, and the ways to route it."""

    def __init__(
        self,
        target: Target,
        gating: Tensor,
        topk: int,
        rule: RoutingRule,
        bias: Tensor | None,
        *,
        block_size: int = 4,
        mask: Tensor | None = None,
        num_local: int | None = None,
        id_format: str = "slot",
    ) -> None:
        self.target, self.gating, self.topk, self.rule = target, gating, topk, rule
        self.bias, self.block_size, self.id_format = bias, block_size, id_format
        self.mask = mask
        self.rows = len(gating) if num_local is None else num_local
        self.slots = topk + rule.num_shared_experts
        shared_logits = rule.num_shared_experts if rule.shared_expert_scoring_func else 0
        self.num_experts = (
            gating.shape[1] - shared_logits - rule.num_zero_experts + rule.num_shared_experts
        )
        self.num_local = None if num_local is None else torch.tensor([num_local]).int()
        device = target.device
        self.on_device = [
            None if t is None else t.to(device) for t in (gating, bias, mask, self.num_local)
        ]

    def buffers(self) -> list[GuardedBuffer]:
        """The five outputs, and those of top-k."""
        zero = self.rule.num_zero_experts if self.id_format == "flat" else 0
        sizes = Buffers.of(
            len(self.gating), self.slots, self.num_experts + zero, MODEL_DIM, torch.bfloat16,
            self.block_size,
        )  # fmt: skip
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((sizes.slots,), torch.int32), ((sizes.slots,), torch.float32),
            ((sizes.blocks,), torch.int32), ((2,), torch.int32), (sizes.moe_buf, torch.bfloat16),
            ((len(self.gating), self.slots + 1), torch.float32),
            ((len(self.gating), self.slots + 2), torch.int32),
        ]  # fmt: skip
        device = self.target.device
        return [GuardedBuffer(f"output {i}", *s, device) for i, s in enumerate(shapes)]

    def route(
        self, policy: int, cluster_size: int | None = None, handover_size: int | None = None
    ) -> tuple[Outputs, Tensor, Tensor]:
        """(sorted buffers, weights, ids) on the CPU; a size calls the op itself."""
        buffers = self.buffers()
        five = tuple(buffer.tensor for buffer in buffers[:5])
        topk_out = tuple(buffer.tensor[:, : self.slots] for buffer in buffers[5:])
        gating, bias, mask, num_local = self.on_device
        options: dict[str, Any] = {
            "rule": self.rule, "correction_bias": bias, "topk_out": topk_out,
            "num_local_tokens": num_local, "id_format": self.id_format,
        }  # fmt: skip
        with self.target.active():
            if cluster_size is None and handover_size is None:
                topk_routing_sorting(
                    gating, self.topk, self.num_experts, MODEL_DIM, torch.bfloat16,  # type: ignore[arg-type]
                    block_size=self.block_size, expert_mask=mask, dispatch_policy=policy,
                    out=five, **options,  # type: ignore[arg-type]
                )  # fmt: skip
                path = ("fused", "oneshot", "multiphase")[policy]
                assert policy == 0 or aiter.fused_moe.last_path() == path
            else:
                aiter.fused_topk_moe_sorting_fwd(
                    gating, *five, self.num_experts, self.topk, self.block_size,  # type: ignore[arg-type]
                    self.rule.need_renorm, local_expert_mask=mask, cluster_size=cluster_size,
                    handover_size=handover_size, **options,
                )  # fmt: skip
        self.target.synchronize()
        for buffer in buffers:
            buffer.check_guards()
        self.check_rest(buffers, handover_size is not None)
        weights, ids = (t[: self.rows].cpu().contiguous() for t in topk_out)
        return tuple(t.cpu() for t in five), weights, ids

    def check_rest(self, buffers: list[GuardedBuffer], hands_over: bool) -> None:
        """Nothing is written behind the slots in use, or those that a hand-over needs."""
        num_valid = used = int(buffers[3].tensor[0])
        if hands_over or hands_over_unasked(self.target):
            used = max(num_valid, len(self.gating) * self.slots)
        for index, first in ((0, used), (1, used), (2, num_valid // self.block_size)):
            buffers[index].check_untouched_from(first)
        buffers[4].check_zero_then_untouched(self.rows)

    def has_slots_for_handover(self) -> bool:
        """Whether `sorted_ids` has one for every winner of a row, which zero experts need not have."""
        zero = self.rule.num_zero_experts if self.id_format == "flat" else 0
        return (self.num_experts + zero) * self.block_size >= self.slots

    def check(self) -> None:
        """Every way against the reference."""
        sizes: list[int | None] = [None, 1]
        if has_clusters(self.target):
            sizes += [2, 8]
        ways = [(0, size, None) for size in sizes] + [(1, None, None), (2, None, None)]
        if can_hand_over(self.target) and self.has_slots_for_handover():
            ways += [(0, None, size) for size in (2, 5)]
        first: tuple[Outputs, Tensor, Tensor] | None = None
        for way in ways:
            sorted_buffers, weights, ids = got = self.route(*way)
            if first is None:
                first = got
                check_routing((weights, ids), self.gating[: self.rows], self.rule, self.bias)
            assert torch.equal(weights.view(torch.int32), first[1].view(torch.int32))
            assert torch.equal(ids, first[2])
            self.check_sorted(sorted_buffers, weights, ids)

    def check_sorted(self, got: Outputs, weights: Tensor, ids: Tensor) -> None:
        rest = len(self.gating) - self.rows
        whole = (torch.cat((t, t.new_zeros(rest, t.shape[1]))) for t in (weights, ids))
        expected = expected_sort(
            *whole, self.gating, self.rule, block_size=self.block_size, expert_mask=self.mask,
            num_local_tokens=self.num_local, id_format=self.id_format,
        )  # fmt: skip
        num_valid = int(expected[3][0])
        check_equal("num_valid_ids", got[3], expected[3])
        check_equal("sorted_ids", got[0][:num_valid], expected[0][:num_valid])
        check_equal(
            "sorted_weights",
            got[1][:num_valid].view(torch.int32),
            expected[1][:num_valid].view(torch.int32),
        )
        blocks = num_valid // self.block_size
        check_equal("sorted_expert_ids", got[2][:blocks], expected[2][:blocks])


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
        ((128, 4), (300, 9)), (1, 9), (torch.bfloat16, torch.float32)
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
