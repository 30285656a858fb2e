"""By which rule does a router choose its experts and weigh them?

A `RoutingRule` holds the scalars in which models differ; tensors, such as a correction bias, are
arguments of the call. It is checked when it is made, so that a call has nothing left to check but
what depends on its tensors. docs/contract.md ("any rule") says to the bit what a rule means.

Compiled functions get `packed`, a tuple of numbers. Equal rules share one such tuple, so that a call
is known again by its identity, however often a caller makes the rule anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from torch.compiler import is_dynamo_compiling

ScoringFunc = Literal["softmax", "sigmoid", "sqrtsoftplus"]
GroupScore = Literal["top2", "max"]
SelectOn = Literal["score", "logit"]

Packed = tuple[int | float, ...]

_LARGEST_F32 = float.fromhex("0x1.fffffep+127")
_MOST = 65535  # experts that a launch can tell apart
_MOST_SHARED = 254  # slots beside one routed slot

# What a name is to compiled functions: its place. NOTE: csrc/include/routing_rule.h has the same.
SCORING_FUNCS: tuple[ScoringFunc, ...] = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES: tuple[GroupScore, ...] = ("max", "top2")
SELECT_ON: tuple[SelectOn, ...] = ("score", "logit")
SHARED_SCORING_FUNCS: tuple[Literal["", "sigmoid"], ...] = ("", "sigmoid")

# Up to these, renorm_eps and renorm_min change no bit of a softmax that is renormalised over the
# chosen experts: its denominator is at least 1 there, and at most 65,535 times smaller over all.
NEGLIGIBLE_EPS = 2.0**-41
NEGLIGIBLE_MIN = 2.0**-16


@dataclass(frozen=True)
class RoutingRule:
    """How the logits of a row become experts and weights.

    With x = logit * logit_scale, soft-capped, and the score s = scoring_func(x): experts are
    chosen by s + correction_bias, first `topk_group` of `num_expert_group` groups, then the K best
    experts in these; slot k weighs s_k, divided by max(sum of the chosen s, renorm_min) + renorm_eps
    if `need_renorm`, times `routed_scaling_factor`.

    Attributes:
        scoring_func: "softmax", "sigmoid" or "sqrtsoftplus" (the square root of log(1 + e^x)).
        num_expert_group: G; the experts are G groups of neighbours, equally many in each.
        topk_group: how many groups stay, 1 to G.
        group_score: what a group is worth: "top2", the sum of its two largest keys; "max", its
            largest; None for "top2" where there is a correction bias and "max" where there is none.
        need_renorm: whether weights are divided by their sum over the chosen experts.
        renorm_eps: is added to that sum; None for 0 with softmax and 1e-20 else.
        renorm_min: the least that the sum counts as.
        routed_scaling_factor: multiplies the weights last.
        select_on: whether experts are chosen by their "score" or by their "logit".
        logit_scale: multiplies the logits first.
        softcap: c > 0 makes x c * tanh(x / c); 0 for none.
        num_shared_experts: S, experts E to E + S - 1, which every row gets in slots K to K + S - 1.
        shared_expert_scoring_func: "sigmoid" weighs them by the sigmoid of the S logits behind the
            E; "" by `shared_expert_weight`.
        shared_expert_weight: see above.
        num_zero_experts: Z, experts that compute nothing: chosen like others, by the Z logits behind
            the E, they get no entry in the sorted buffers.

    Raises:
        TypeError, ValueError: a value does not fit; named with what was expected.
    """

    scoring_func: ScoringFunc = "softmax"
    num_expert_group: int = 1
    topk_group: int = 1
    group_score: GroupScore | None = None
    need_renorm: bool = True
    renorm_eps: float | None = None
    renorm_min: float = 0.0
    routed_scaling_factor: float = 1.0
    select_on: SelectOn = "score"
    logit_scale: float = 1.0
    softcap: float = 0.0
    num_shared_experts: int = 0
    shared_expert_scoring_func: Literal["", "sigmoid"] = ""
    shared_expert_weight: float = 1.0
    num_zero_experts: int = 0

    @classmethod
    def from_config(cls, config: Any) -> RoutingRule:
        """The rule of a transformers configuration's model, by its `model_type`.

        Raises:
            ValueError: the model's router has no rule, or is not known; named with the reason.
        """
        from .rule_config import rule_from_config

        return rule_from_config(config, cls)

    def __post_init__(self) -> None:
        _check_name("scoring_func", self.scoring_func, SCORING_FUNCS)
        _check_int("num_expert_group", self.num_expert_group, 1, _MOST)
        _check_int("topk_group", self.topk_group, 1, self.num_expert_group)
        if self.group_score is not None:
            _check_name("group_score", self.group_score, GROUP_SCORES)
        if not isinstance(self.need_renorm, bool):
            raise TypeError(f"need_renorm: expected a bool, got {type(self.need_renorm).__name__}")
        if self.renorm_eps is not None:
            _check_float("renorm_eps", self.renorm_eps, low=0.0)
        _check_float("renorm_min", self.renorm_min, low=0.0)
        _check_float("routed_scaling_factor", self.routed_scaling_factor)
        _check_name("select_on", self.select_on, SELECT_ON)
        _check_float("logit_scale", self.logit_scale)
        _check_float("softcap", self.softcap, low=0.0)
        _check_int("num_shared_experts", self.num_shared_experts, 0, _MOST_SHARED)
        _check_name(
            "shared_expert_scoring_func", self.shared_expert_scoring_func, SHARED_SCORING_FUNCS
        )
        _check_float("shared_expert_weight", self.shared_expert_weight)
        _check_int("num_zero_experts", self.num_zero_experts, 0, _MOST)
        packed = self._pack()
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "is_plain", (*packed[:4], *packed[5:]) == _PLAIN_BUT_RENORM)

    packed: ClassVar[Packed]
    """The numbers that compiled functions get, set when the rule is made; equal rules have one tuple."""

    is_plain: ClassVar[bool]
    """Whether it is softmax and top-k alone, as long as there is no correction bias."""

    def _pack(self) -> Packed:
        eps = self.renorm_eps
        numbers = (
            SCORING_FUNCS.index(self.scoring_func),
            self.num_expert_group,
            self.topk_group,
            -1 if self.group_score is None else GROUP_SCORES.index(self.group_score),
            int(self.need_renorm),
            (0.0 if self.scoring_func == "softmax" else 1e-20) if eps is None else float(eps),
            float(self.renorm_min),
            float(self.routed_scaling_factor),
            SELECT_ON.index(self.select_on),
            float(self.logit_scale),
            float(self.softcap),
            self.num_shared_experts,
            SHARED_SCORING_FUNCS.index(self.shared_expert_scoring_func),
            float(self.shared_expert_weight),
            self.num_zero_experts,
        )
        if is_dynamo_compiling():
            return numbers  # NOTE: a graph would be guarded by the table, and be made anew as it grows.
        return _KNOWN.setdefault(numbers, (numbers, self))[0]

    def num_logits(self, num_experts: int) -> int:
        """The width of the logits for `num_experts` in the sort, the shared ones among them."""
        shared = self.num_shared_experts if self.shared_expert_scoring_func == "" else 0
        return num_experts - shared + self.num_zero_experts

    def num_experts(self, width: int) -> int:
        """The experts in the sort, the shared ones among them, for logits of that width."""
        return width - self.num_logits(0)

    def __reduce__(self) -> tuple[object, ...]:
        # NOTE: made anew where it is unpickled, as `packed` is known by its identity in a process.
        return (RoutingRule, tuple(getattr(self, field.name) for field in fields(self)))


def rule_of(packed: Sequence[float]) -> RoutingRule:
    """The rule that packs itself into these numbers; raises ValueError if none does."""
    numbers = tuple(packed)
    if not is_dynamo_compiling() and numbers in _KNOWN:
        return _KNOWN[numbers][1]
    if len(numbers) != len(_PLAIN_BUT_RENORM) + 1:
        raise ValueError(
            f"rule: expected the {len(_PLAIN_BUT_RENORM) + 1} numbers of RoutingRule.packed, got"
            f" {len(numbers)}"
        )
    score, groups, topk_group, group_score, renorm, eps, least, scale = numbers[:8]
    select, logit_scale, softcap, shared, shared_score, shared_weight, zero = numbers[8:]
    place = _whole("group_score", group_score, -1, len(GROUP_SCORES) - 1)
    return RoutingRule(
        SCORING_FUNCS[_whole("scoring_func", score, 0, len(SCORING_FUNCS) - 1)],
        _whole("num_expert_group", groups, 1, _MOST),
        _whole("topk_group", topk_group, 1, _MOST),
        None if place < 0 else GROUP_SCORES[place],
        bool(_whole("need_renorm", renorm, 0, 1)),
        eps,
        least,
        scale,
        SELECT_ON[_whole("select_on", select, 0, len(SELECT_ON) - 1)],
        logit_scale,
        softcap,
        _whole("num_shared_experts", shared, 0, _MOST_SHARED),
        SHARED_SCORING_FUNCS[
            _whole("shared_expert_scoring_func", shared_score, 0, len(SHARED_SCORING_FUNCS) - 1)
        ],
        shared_weight,
        _whole("num_zero_experts", zero, 0, _MOST),
    )


def _whole(name: str, number: float, low: int, high: int) -> int:
    """A number of a packed rule that is an int."""
    if not low <= number <= high or number != int(number):
        raise ValueError(
            f"rule: expected a whole number from {low} to {high} for {name}, got {number}"
        )
    return int(number)


def check_rule(rule: object) -> None:
    """Raises TypeError for what is neither a rule nor None."""
    if rule is not None and not isinstance(rule, RoutingRule):
        raise TypeError(f"rule: expected a RoutingRule or None, got {type(rule).__name__}")


def plain_rule(need_renorm: bool, name: str = "need_renorm") -> RoutingRule:
    """Softmax and top-k, renormalised or not; `name` is what the caller calls that."""
    if not isinstance(need_renorm, bool):
        raise TypeError(f"{name}: expected a bool, got {type(need_renorm).__name__}")
    return _PLAIN[need_renorm]


def _check_name(name: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
    if value not in known:
        listed = ", ".join(repr(each) for each in known)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a value from {low} to {high}, got {value}")


def _check_float(name: str, value: object, low: float = -math.inf) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not abs(value) <= _LARGEST_F32:  # NOTE: so is NaN.
        raise ValueError(f"{name}: expected a finite float32, got {value}")
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")


# What `packed` is of a rule with nothing but defaults, its fifth number aside.
_PLAIN_BUT_RENORM: Packed = (0, 1, 1, -1, 0.0, 0.0, 1.0, 0, 1.0, 0.0, 0, 0, 1.0, 0)
_KNOWN: dict[Packed, tuple[Packed, RoutingRule]] = {}  # every tuple of numbers, by its like
_PLAIN = {renorm: RoutingRule(need_renorm=renorm) for renorm in (False, True)}
