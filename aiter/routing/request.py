"""What does a routing call ask for, beside its tensors?

One tuple says it, from the function that a user calls to the binding, which reads it by position
(`RoutingField` in csrc/include/pybind_routing.h) and knows a repeated call by it. An
option is added here, there and in the kernel. On the way of a known call it is a plain tuple, which
takes 0.04 us to make; a `Request` takes 0.3 us.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.rule import Packed, RoutingRule, check_rule, plain_rule, rule_of
from .buffers import SortedBuffers, TopkOut, check_size

ID_FORMATS = ("slot", "flat")


class Request(NamedTuple):
    """What a routing call asks for.

    Attributes:
        topk: K, the routed slots of a row.
        num_experts: E, the experts in the sort, shared ones among them.
        model_dim: D, the width of `moe_buf`.
        moebuf_dtype: dtype of `moe_buf`.
        rule: a bool for plain softmax, renormalised or not; else a `RoutingRule.packed`.
        block_size: B, slots per block.
        dispatch_policy: 0, 1 or 2.
        id_format: "slot" or "flat".
        cpu_wave: the override of the cpu target's wave width, which compiled functions are bound to.
    """

    topk: int
    num_experts: int
    model_dim: int
    moebuf_dtype: torch.dtype
    rule: bool | Packed
    block_size: int
    dispatch_policy: int
    id_format: str
    cpu_wave: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is softmax and top-k alone, but for a correction bias."""
        return isinstance(self.rule, bool)

    @property
    def full_rule(self) -> RoutingRule:
        """The rule, also of a plain call."""
        return plain_rule(self.rule) if isinstance(self.rule, bool) else rule_of(self.rule)

    @property
    def num_slots(self) -> int:
        """The slots of a row, those of shared experts among them."""
        return self.topk + self.full_rule.num_shared_experts

    @property
    def num_sorted_experts(self) -> int:
        """The experts that may have blocks."""
        zero = self.full_rule.num_zero_experts if self.id_format == "flat" else 0
        return self.num_experts + zero

    def check(self, tokens: int, width: int, name: str = "gating_output") -> None:
        """Raises TypeError or ValueError for what no op checks.

        The logits are [tokens, width]; or `name` is a router's weight, which has `width` rows.
        """
        if not isinstance(self.rule, (bool, tuple)):
            raise TypeError(f"need_renorm: expected a bool, got {type(self.rule).__name__}")
        if self.id_format not in ID_FORMATS:
            raise ValueError(f"id_format: expected 'slot' or 'flat', got {self.id_format!r}")
        check_size("topk", self.topk)
        check_size("num_experts", self.num_experts)
        rule = self.full_rule
        others = ""
        if rule.num_shared_experts or rule.num_zero_experts:
            others = f" with {rule.num_shared_experts} shared and {rule.num_zero_experts} zero ones"
        expected = rule.num_logits(self.num_experts)
        if width != expected:
            shape, got = f"[any, {expected}]", str([tokens, width])
            if name != "gating_output":
                shape, got = f"[{expected}, any]", f"{width} rows"
            raise ValueError(
                f"{name}: expected shape {shape}, for num_experts ="
                f" {self.num_experts}{others}, got {got}"
            )
        # NOTE: buffers have M*K + E*B - K slots, so that K may not exceed the experts that have entries.
        choices = self.num_sorted_experts - rule.num_shared_experts
        if self.topk > choices:
            by = f" and {self.id_format} ids" if rule.num_zero_experts else ""
            raise ValueError(
                f"topk: expected at most {choices}, for num_experts = {self.num_experts}{others}{by},"
                f" got {self.topk}"
            )


class Tensors(NamedTuple):
    """The tensors of a routing of logits; None for those that the caller does not give.

    Attributes:
        gating_output, expert_mask, num_local_tokens, correction_bias: inputs.
        topk_out, out: outputs.
    """

    gating_output: Tensor
    expert_mask: Tensor | None
    num_local_tokens: Tensor | None
    correction_bias: Tensor | None
    topk_out: TopkOut | None
    out: SortedBuffers | None


def rule_numbers(rule: bool | Packed) -> list[float]:
    """What a registered op is given for a rule as a `Request` holds it.

    A function, as torch.compile up to PyTorch 2.8 does not look into a property of a named tuple.
    """
    packed = plain_rule(rule).packed if isinstance(rule, bool) else rule
    return [float(number) for number in packed]


CPU_WAVE = Request._fields.index("cpu_wave")  # all before it is what a caller asks for


def rule_key(rule: RoutingRule | None) -> bool | Packed:
    """What a `Request` holds of a rule: a bool for a plain one."""
    if rule is None:
        return True
    check_rule(rule)
    return rule.need_renorm if rule.is_plain else rule.packed
