"""`topk_routing`, launched on the interpreter: mirrors csrc/include/rule_launch.h and its launcher."""

from __future__ import annotations

import ctypes

import torch
from amdgcn.memory import GlobalMemory
from launches import Device, _i32, _map, _ptr, _u32
from torch import Tensor

from aiter.ops.rule import NEGLIGIBLE_EPS, NEGLIGIBLE_MIN, RoutingRule

WAVES_PER_BLOCK = 4
LANES_PER_ROW = 32
KEYS_PER_CHUNK = 8
MAX_PLACES, MAX_TOPK, MAX_GROUP_PLACES = 1024, 32, 256
LDS_BYTES_PER_LANE = 24
KINDS = (torch.float32, torch.float16, torch.bfloat16, None)  # FloatKind
SIGMOID, TOP2, BY_BIAS, LOGIT = 1, 1, -1, 1  # of routing_rule.h
_f32 = ctypes.c_float


class Rule(ctypes.Structure):
    """routing_rule.h"""

    _fields_ = [
        ("scoring_func", _i32), ("num_expert_group", _i32), ("topk_group", _i32),
        ("group_score", _i32), ("need_renorm", _u32), ("renorm_eps", _f32), ("renorm_min", _f32),
        ("routed_scaling_factor", _f32), ("select_on", _i32), ("logit_scale", _f32),
        ("softcap", _f32), ("num_shared_experts", _i32), ("shared_expert_scoring_func", _i32),
        ("shared_expert_weight", _f32), ("num_zero_experts", _i32),
    ]  # fmt: skip


class RowRule(ctypes.Structure):
    """row_rule.h"""

    _fields_ = [
        ("rule", Rule), ("bias", _ptr), ("logit_kind", _i32), ("bias_kind", _i32),
        ("wide_logits", _u32), ("wide_bias", _u32), ("num_candidates", _i32),
        ("num_experts", _i32), ("topk", _i32), ("group_width", _i32), ("log2_group_places", _i32),
        ("in_memory", _u32), ("top2", _u32), ("key_is_logit", _u32), ("shares_chosen", _u32),
        ("is_sigmoid", _u32), ("shares_none", _u32),
    ]  # fmt: skip


class TopkRoutingParams(ctypes.Structure):
    """topk_routing.h"""

    _fields_ = [
        ("rule", RowRule), ("gating", _ptr), ("row_bytes", ctypes.c_int64), ("num_tokens", _i32),
        ("topk_weights", _ptr), ("weights_stride", ctypes.c_int64), ("topk_ids", _ptr),
        ("ids_stride", ctypes.c_int64),
    ]  # fmt: skip


def topk_routing(
    device: Device,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gating_output: Tensor,
    rule: RoutingRule,
    correction_bias: Tensor | None = None,
) -> None:
    """`aiter.topk_routing`."""
    memory = GlobalMemory()
    row = _row_rule(memory, rule, gating_output, correction_bias, topk_ids.shape[1])
    params = TopkRoutingParams(
        rule=row,
        gating=_map(memory, "gating_output", gating_output, writable=False),
        row_bytes=gating_output.stride(0) * gating_output.element_size(),
        num_tokens=gating_output.shape[0],
        topk_weights=_map(memory, "topk_weights", topk_weights),
        weights_stride=topk_weights.stride(0),
        topk_ids=_map(memory, "topk_ids", topk_ids),
        ids_stride=topk_ids.stride(0),
    )
    name = _kernel_of(row)
    in_memory = "MemoryRuleRow" in name
    rows_per_block = WAVES_PER_BLOCK * (1 if in_memory else device.wave_size // LANES_PER_ROW)
    blocks = -(-gating_output.shape[0] // rows_per_block)
    threads = WAVES_PER_BLOCK * device.wave_size
    lds_bytes = 0 if in_memory else threads * LDS_BYTES_PER_LANE
    device._launch("module_topk_routing", name, memory, params, blocks, threads, lds_bytes)


def kernel_of(
    rule: RoutingRule, gating_output: Tensor, correction_bias: Tensor | None, num_slots: int
) -> str:
    """The name of the kernel instance that such a call launches."""
    return _kernel_of(_row_rule(GlobalMemory(), rule, gating_output, correction_bias, num_slots))


def _row_rule(
    memory: GlobalMemory, rule: RoutingRule, gating: Tensor, bias: Tensor | None, num_slots: int
) -> RowRule:
    """`row_rule()` of rule_launch.h."""
    scalars = Rule(*(kind(number) for kind, number in zip(_NUMBERS, rule.packed, strict=True)))
    has_bias = bias is not None
    shared_logits = rule.num_shared_experts if rule.shared_expert_scoring_func else 0
    candidates = gating.shape[1] - shared_logits
    width = candidates // rule.num_expert_group
    is_plain = scalars.scoring_func == 0 and not has_bias and rule.num_expert_group == 1
    key_is_logit = is_plain or scalars.select_on == LOGIT
    row_bytes = gating.stride(0) * gating.element_size()
    whole = width % KEYS_PER_CHUNK == 0
    unscaled = rule.logit_scale == 1.0 and rule.softcap == 0.0
    negligible = scalars.renorm_eps <= NEGLIGIBLE_EPS and scalars.renorm_min <= NEGLIGIBLE_MIN
    return RowRule(
        rule=scalars,
        bias=_map(memory, "correction_bias", bias, writable=False) if bias is not None else 0,
        logit_kind=KINDS.index(gating.dtype),
        bias_kind=KINDS.index(None if bias is None else bias.dtype),
        wide_logits=whole and gating.data_ptr() % 16 == 0 and row_bytes % 16 == 0,
        wide_bias=whole and (bias is None or bias.data_ptr() % 16 == 0),
        num_candidates=candidates,
        num_experts=candidates - rule.num_zero_experts,
        topk=num_slots - rule.num_shared_experts,
        group_width=width,
        log2_group_places=(max(width, KEYS_PER_CHUNK) - 1).bit_length(),
        in_memory=False,
        top2=has_bias if scalars.group_score == BY_BIAS else scalars.group_score == TOP2,
        key_is_logit=key_is_logit,
        shares_chosen=is_plain and rule.need_renorm and negligible,
        is_sigmoid=scalars.scoring_func == SIGMOID and not key_is_logit and unscaled,
        shares_none=is_plain,
    )


_NUMBERS = (int, int, int, int, int, float, float, float, int, float, float, int, int, float, int)


def _kernel_of(row: RowRule) -> str:
    """`dispatch_rule_rows()` of rule_launch.h."""
    groups = row.rule.num_expert_group
    group_places = 1 << row.log2_group_places if groups > 1 else row.num_candidates
    places = groups * group_places
    too_wide = groups > 1 and group_places > MAX_GROUP_PLACES
    if places > MAX_PLACES or row.topk > MAX_TOPK or too_wide:
        return "topk_routing<MemoryRuleRow>"
    values, best = 32, 32
    if row.topk <= 16:
        best = 16
        values = 8 if places <= 8 * LANES_PER_ROW else 16 if places <= 16 * LANES_PER_ROW else 32
    return f"topk_routing<RuleRows<{values}, {best}, {int(row.is_sigmoid)}>>"
