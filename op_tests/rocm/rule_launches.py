"""Kernels by rules, launched on the interpreter: mirrors csrc/include/rule_launch.h and launchers."""

from __future__ import annotations

import ctypes

import torch
from amdgcn.memory import GlobalMemory
from choices import RowChoice
from launches import (
    Counting,
    Device,
    RowsOfBlock,
    _i32,
    _ptr,
    _u32,
    map_tensor,
    select_launch,
    sort_params,
    sort_shape,
)
from torch import Tensor

from aiter.ops.rule import NEGLIGIBLE_EPS, NEGLIGIBLE_MIN, RoutingRule

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
        ("is_common", _u32), ("shares_none", _u32),
    ]  # fmt: skip


class TopkRoutingArguments(ctypes.Structure):
    """All arguments of the kernel in topk_routing.h."""

    _fields_ = [
        ("gating", _ptr), ("row_bytes", ctypes.c_int64), ("num_tokens", _i32), ("unused", _i32),
        ("rule", RowRule), ("topk_weights", _ptr), ("weights_stride", ctypes.c_int64),
        ("topk_ids", _ptr), ("ids_stride", ctypes.c_int64), ("block", RowsOfBlock),
    ]  # fmt: skip


class FusedRule(ctypes.Structure):
    """fused_topk_moe_sorting_rules.h"""

    _fields_ = [
        ("row", RowRule), ("topk_weights", _ptr), ("topk_ids", _ptr),
        ("weights_stride", ctypes.c_int64), ("ids_stride", ctypes.c_int64),
    ]  # fmt: skip


def topk_routing(
    device: Device,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gating_output: Tensor,
    rule: RoutingRule,
    correction_bias: Tensor | None = None,
    counting: Counting | None = None,
) -> None:
    """`aiter.topk_routing`, or with `counting` the chain's."""
    memory = GlobalMemory()
    row = _row_rule(memory, rule, gating_output, correction_bias, topk_ids.shape[1])
    params = TopkRoutingArguments(
        rule=row,
        gating=map_tensor(memory, "gating_output", gating_output, writable=False),
        row_bytes=gating_output.stride(0) * gating_output.element_size(),
        num_tokens=gating_output.shape[0],
        topk_weights=map_tensor(memory, "topk_weights", topk_weights),
        weights_stride=topk_weights.stride(0),
        topk_ids=map_tensor(memory, "topk_ids", topk_ids),
        ids_stride=topk_ids.stride(0),
    )
    rows = _choose_rows(row, device.wave_size)
    params.block, *shape = select_launch(
        memory, gating_output.shape[0], rows, device.wave_size, counting
    )
    device.launch("module_topk_routing", f"topk_routing<{rows.name}>", memory, params, *shape)


def fused_topk_moe_sorting_fwd(
    device: Device,
    gating_output: Tensor,
    sorted_ids: Tensor,
    sorted_weights: Tensor,
    sorted_expert_ids: Tensor,
    num_valid_ids: Tensor,
    moe_buf: Tensor,
    num_experts: int,
    topk: int,
    unit_size: int,
    need_renorm: bool,
    *,
    rule: RoutingRule,
    local_expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    handover_size: int | None = None,
    correction_bias: Tensor | None = None,
    topk_out: tuple[Tensor, Tensor] | None = None,
    id_format: str = "slot",
) -> None:
    """`aiter.fused_topk_moe_sorting_fwd` with a rule."""
    memory = GlobalMemory()
    outputs = (sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf)
    sort = sort_params(memory, outputs, local_expert_mask, num_local_tokens)
    num_slots = topk + rule.num_shared_experts
    row = _row_rule(memory, rule, gating_output, correction_bias, num_slots)
    fused_rule = FusedRule(row)
    if topk_out is not None:
        weights, ids = topk_out
        fused_rule.topk_weights = map_tensor(memory, "topk_weights", weights)
        fused_rule.topk_ids = map_tensor(memory, "topk_ids", ids)
        fused_rule.weights_stride, fused_rule.ids_stride = weights.stride(0), ids.stride(0)
    zero = rule.num_zero_experts
    flat = id_format == "flat"
    shape = sort_shape(
        gating_output.shape[0], num_experts + zero, num_slots, unit_size, sort, flat,
        zero,
    )  # fmt: skip
    rows = _choose_rows(row, device.wave_size)
    device.launch_fused(
        f"fused_topk_moe_sorting_rules<{rows.name}>", memory, gating_output, shape, sort, rows,
        handover_size, need_renorm, fused_rule,
    )  # fmt: skip


def rows_of(
    rule: RoutingRule, gating_output: Tensor, correction_bias: Tensor | None, num_slots: int
) -> str:
    """The class of rows that the kernel of such a call is an instance for."""
    row = _row_rule(GlobalMemory(), rule, gating_output, correction_bias, num_slots)
    return _choose_rows(row, 32).name


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
    wide_logits = whole and gating.data_ptr() % 16 == 0 and row_bytes % 16 == 0
    wide_bias = whole and (bias is None or bias.data_ptr() % 16 == 0)
    is_common = (
        scalars.scoring_func == SIGMOID
        and not key_is_logit
        and unscaled
        and wide_logits
        and gating.dtype != torch.float16
        and (bias is None or (wide_bias and bias.dtype == torch.float32))
    )
    return RowRule(
        rule=scalars,
        bias=map_tensor(memory, "correction_bias", bias, writable=False) if bias is not None else 0,
        logit_kind=KINDS.index(gating.dtype),
        bias_kind=KINDS.index(None if bias is None else bias.dtype),
        wide_logits=wide_logits,
        wide_bias=wide_bias,
        num_candidates=candidates,
        num_experts=candidates - rule.num_zero_experts,
        topk=num_slots - rule.num_shared_experts,
        group_width=width,
        log2_group_places=(max(width, KEYS_PER_CHUNK) - 1).bit_length(),
        in_memory=False,
        top2=has_bias if scalars.group_score == BY_BIAS else scalars.group_score == TOP2,
        key_is_logit=key_is_logit,
        shares_chosen=is_plain and rule.need_renorm and negligible,
        is_common=is_common,
        shares_none=is_plain,
    )


_NUMBERS = (int, int, int, int, int, float, float, float, int, float, float, int, int, float, int)


def _choose_rows(row: RowRule, wave_size: int) -> RowChoice:
    """`rule_row_choice()` of rule_launch.h."""
    groups = row.rule.num_expert_group
    group_places = 1 << row.log2_group_places if groups > 1 else row.num_candidates
    places = groups * group_places
    too_wide = groups > 1 and group_places > MAX_GROUP_PLACES
    if places > MAX_PLACES or row.topk > MAX_TOPK or too_wide:
        return RowChoice("MemoryRuleRow", 0, item_bytes=1)
    values, best = 32, 32
    if row.topk <= 16:
        best = 16
        values = 8 if places <= 8 * LANES_PER_ROW else 16 if places <= 16 * LANES_PER_ROW else 32
    return RowChoice(
        f"RuleRows<{values}, {best}, {int(row.is_common)}>",
        values,
        wave_size // LANES_PER_ROW,
        item_bytes=1,
        lds_bytes=wave_size * LDS_BYTES_PER_LANE,
        max_threads=256 if values > 16 else 512,
        places=LANES_PER_ROW * values,
    )
