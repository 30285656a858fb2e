"""How are the routing calls by a rule made and judged, on every way that there is to route them?

Top-k, which the launch writes as well, is compared as in test_topk_routing.py, and the sorted buffers to
the bit with the reference's sort of it; every path and number of workgroups has to give the same bits.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from buffers import GuardedBuffer
from checks import check_equal
from route_calls import has_clusters
from rule_cases import check_routing
from runners import can_hand_over, hands_over_unasked
from targets import Target
from torch import Tensor

import aiter
import aiter.fused_moe
from aiter.ops.rule import RoutingRule
from aiter.reference import rules as reference
from aiter.routing.buffers import Buffers
from aiter.routing.calls import topk_routing_sorting

MODEL_DIM = 5

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
