"""What does a router of any rule choose? A plain PyTorch answer, on any device.

:func:`topk_routing` states "any rule" of docs/contract.md step by step, in the order in which a
kernel has to round, and :func:`topk_routing_sorting` sorts what it chose. Like the functions of
`aiter.reference.routing` they wait for the device and allocate freely: they are not for serving.

Design. Selection is one stable descending sort of float32 keys in which whatever is not eligible is
-inf. So ties, and the unused experts that fill a row up, come in the order of their index, and no row
repeats an expert. Groups make the experts of the others ineligible, before that sort.

Each operation is one float32 operation of PyTorch, so each is rounded once, but exp, log1p and tanh,
which PyTorch computes to about one unit in the last place, another one per device. Ids are therefore
those of another path wherever keys differ by more than that, and exactly equal where scores are exact
(sigmoid at 0, from 17.4 up and from -89 down; sqrtsoftplus at n * n >= 25). Weights agree to 4e-7. The
sum of a softmax over all experts has no order that is specified, and is taken in float64.

Where the contract leaves a case open, this is what holds here: `select_on="logit"` takes x, scaled
and soft-capped, and adds a bias where there is one; a row of a softmax that has no logit above -inf has
scores of 0 where a bias or groups choose, and plain softmax's equal ones where nothing does; the logits
of shared experts are neither scaled nor soft-capped, and NaN among them weighs 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.rule import NEGLIGIBLE_EPS, NEGLIGIBLE_MIN, RoutingRule, check_rule
from ..routing.arguments import check_int
from ..routing.buffers import TOKEN_BITS, TOKEN_MASK
from .routing import MAX_TOPK, _expert_mask, _require_tensor, moe_sorting

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST = torch.finfo(torch.float32).max
_INF = float("inf")


def topk_routing(
    gating_output: Tensor,
    topk: int,
    *,
    rule: RoutingRule | None = None,
    correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose ``topk`` experts per token by a rule, and weigh them.

    Args:
        gating_output: logits [M, E + Z], or [M, E + Z + S] where shared experts have logits of
            their own; f32, f16 or bf16, any strides. Z and S are the rule's zero and shared experts.
        topk: K, routed experts per token, 1 <= topk <= E + Z.
        rule: None for plain softmax, renormalised.
        correction_bias: [E + Z] f32, f16 or bf16; is added to the scores for selection only.

    Returns:
        weights f32 [M, K + S] and ids i32 [M, K + S], both contiguous. The last S slots are the
        shared experts, ids E to E + S - 1; of zero experts, ids are E and up.

    Raises:
        TypeError: an argument has the wrong Python type.
        ValueError: a dtype, shape or value is not as above, or the groups do not divide E.
    """
    rule = RoutingRule() if rule is None else rule
    num_routed = _check(gating_output, topk, rule, correction_bias)
    logits = gating_output[:, :num_routed].float()
    x = _scaled(logits, rule)
    plain = (
        rule.scoring_func == "softmax" and correction_bias is None and rule.num_expert_group == 1
    )

    shifted = scores = None
    if rule.scoring_func == "softmax":
        shifted, total = _softmax(x, none_weighs=0.0 if not plain else 1.0)
        scores = shifted / total
    elif rule.scoring_func == "sigmoid":
        scores = _sigmoid(x)
    else:
        scores = (x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))).clamp(max=_LARGEST).sqrt()

    keys = x if plain or rule.select_on == "logit" else scores
    if correction_bias is not None:
        keys = keys + correction_bias.float()
    # NOTE: adding 0.0 turns -0.0 into +0.0, for sorts that order keys by their bits.
    keys = torch.where(logits.isnan() | keys.isnan(), -_INF, keys) + 0.0
    if rule.num_expert_group > 1:
        keys = _best_groups_only(keys, rule, has_bias=correction_bias is not None)
    order = torch.sort(keys, dim=1, descending=True, stable=True)
    ids = order.indices[:, :topk]

    negligible = _eps(rule) <= NEGLIGIBLE_EPS and rule.renorm_min <= NEGLIGIBLE_MIN
    if plain and shifted is not None and rule.need_renorm and negligible:
        chosen = shifted.gather(1, ids)
        weights = chosen / _slot_sum(chosen)
    else:
        chosen = scores.gather(1, ids)
        if not plain:
            chosen = torch.where(order.values[:, :topk] > -_INF, chosen, 0.0)
        weights = _renormalised(chosen, rule) if rule.need_renorm else chosen
    weights = weights * _f32(rule.routed_scaling_factor, x)
    return _with_shared(weights, ids, gating_output[:, num_routed:], num_routed, rule)


def topk_routing_sorting(
    gating_output: Tensor,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    *,
    rule: RoutingRule | None = None,
    correction_bias: Tensor | None = None,
    block_size: int = 32,
    expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    id_format: str = "slot",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Route tokens to experts by a rule: :func:`topk_routing`, then :func:`moe_sorting` of its result.

    A row has K + S slots, which is what stands for ``K`` in the sizes and the padding of
    :func:`moe_sorting`. Entries of zero experts are left out. With ``id_format="flat"``::

        entry   = token * (K + S) + slot
        padding = M * (K + S)

    and zero experts, and experts that the mask leaves out, keep their blocks, with -1 in
    ``sorted_expert_ids``; the sizes then count the zero experts too.

    Args:
        gating_output, topk, rule, correction_bias: as in :func:`topk_routing`.
        num_experts: E + S.
        model_dim, moebuf_dtype, block_size, expert_mask, num_local_tokens: as in
            :func:`moe_sorting`; the mask has E + S entries.
        id_format: "slot" or "flat".

    Returns:
        The five tensors of :func:`moe_sorting`.

    Raises:
        TypeError, ValueError: as the two functions say, or the width of ``gating_output`` is not
            that of ``num_experts``.
    """
    rule = RoutingRule() if rule is None else rule
    if id_format not in ("slot", "flat"):
        raise ValueError(f"id_format: expected 'slot' or 'flat', got {id_format!r}")
    weights, ids = topk_routing(gating_output, topk, rule=rule, correction_bias=correction_bias)
    check_int("num_experts", num_experts)
    if gating_output.shape[1] != rule.num_logits(num_experts):
        raise ValueError(
            f"gating_output: expected {rule.num_logits(num_experts)} columns for num_experts ="
            f" {num_experts}, got {gating_output.shape[1]}"
        )
    num_tokens, slots = ids.shape
    zeros = rule.num_zero_experts
    # NOTE: the sort knows zero experts as experts that a mask leaves out.
    mask = _expert_mask(expert_mask, num_experts, ids.device).int()
    mask = torch.cat((mask, mask.new_zeros(zeros)))
    sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf = moe_sorting(
        ids,
        weights,
        num_experts + zeros,
        model_dim,
        moebuf_dtype,
        block_size,
        mask if id_format == "slot" else None,
        num_local_tokens,
    )
    valid = int(num_valid_ids[0])
    blocks = valid // block_size
    if id_format == "slot":
        size = num_tokens * slots + num_experts * block_size - slots
        num_blocks = (size + block_size - 1) // block_size
        return (
            sorted_ids[:size].clone(),
            sorted_weights[:size].clone(),
            sorted_expert_ids[:num_blocks].clone(),
            num_valid_ids,
            moe_buf,
        )
    entries = sorted_ids[:valid].long() & 0xFFFFFFFF
    slot, token = entries >> TOKEN_BITS, entries & TOKEN_MASK
    flat = torch.where(slot == slots, num_tokens * slots, token * slots + slot)
    sorted_ids[:valid] = flat.to(torch.int32)
    experts = sorted_expert_ids[:blocks].long()
    local = torch.where(mask == 1, mask.cumsum(0) - mask, -1)
    sorted_expert_ids[:blocks] = local[experts].to(torch.int32)
    return sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf


def _eps(rule: RoutingRule) -> float:
    if rule.renorm_eps is None:
        return 0.0 if rule.scoring_func == "softmax" else 1e-20
    return rule.renorm_eps


def _f32(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def _scaled(logits: Tensor, rule: RoutingRule) -> Tensor:
    x = logits * _f32(rule.logit_scale, logits)
    if rule.softcap > 0:
        cap = _f32(rule.softcap, x)
        x = cap * torch.tanh(x / cap)
    return x


def _sigmoid(x: Tensor) -> Tensor:
    # NOTE: torch.sigmoid is not this expression on every device.
    return 1 / (1 + torch.exp(-x))


def _softmax(x: Tensor, none_weighs: float) -> tuple[Tensor, Tensor]:
    """exp(x - max) and its sum; `none_weighs` is each logit's where none is above -inf."""
    x = torch.where(x.isnan(), -_INF, x)
    row_max = x.amax(dim=1, keepdim=True)
    shifted = torch.where(x == row_max, 1.0, torch.exp(x - row_max))
    shifted = torch.where(row_max == -_INF, none_weighs, shifted)
    total = shifted.sum(dim=1, keepdim=True, dtype=torch.float64).float()
    return shifted, total.clamp(min=1)  # NOTE: below 1 only where every score is 0.


def _best_groups_only(keys: Tensor, rule: RoutingRule, has_bias: bool) -> Tensor:
    """The keys, -inf outside of the `topk_group` best groups."""
    rows, width = keys.shape
    groups = keys.view(rows, rule.num_expert_group, width // rule.num_expert_group)
    best = groups.sort(dim=2, descending=True).values
    value = best[..., 0]
    if (rule.group_score or ("top2" if has_bias else "max")) == "top2" and best.shape[2] > 1:
        value = value + best[..., 1]
        value = torch.where(value.isnan(), -_INF, value)
    stay = value.sort(dim=1, descending=True, stable=True).indices[:, : rule.topk_group]
    stays = torch.zeros_like(value, dtype=torch.bool).scatter(1, stay, True)
    return torch.where(stays.unsqueeze(2), groups, -_INF).view(rows, width)


def _slot_sum(chosen: Tensor) -> Tensor:
    """The sum [M, 1] over the slots, one after the other."""
    total = torch.zeros_like(chosen[:, :1])
    for slot in range(chosen.shape[1]):
        total = total + chosen[:, slot : slot + 1]
    return total


def _renormalised(chosen: Tensor, rule: RoutingRule) -> Tensor:
    eps = _f32(_eps(rule), chosen)
    below = torch.maximum(_slot_sum(chosen), _f32(rule.renorm_min, chosen)) + eps
    return torch.where(below == 0, 0.0, chosen / below)


def _with_shared(
    weights: Tensor, ids: Tensor, logits: Tensor, num_routed: int, rule: RoutingRule
) -> tuple[Tensor, Tensor]:
    """Appends the slots of the shared experts."""
    rows, shared = ids.shape[0], rule.num_shared_experts
    more_ids = torch.arange(num_routed, num_routed + shared, device=ids.device).expand(rows, shared)
    if rule.shared_expert_scoring_func == "sigmoid":
        more = torch.where(logits.isnan(), 0.0, _sigmoid(logits.float()))
    else:
        more = _f32(rule.shared_expert_weight, weights).expand(rows, shared)
    return (
        torch.cat((weights, more), dim=1).contiguous(),
        torch.cat((ids, more_ids), dim=1).to(torch.int32).contiguous(),
    )


def _check(gating_output: Tensor, topk: int, rule: RoutingRule, bias: Tensor | None) -> int:
    """Raises for what does not fit; returns the number of experts that are chosen from."""
    _require_tensor("gating_output", gating_output)
    check_int("topk", topk)
    check_rule(rule)
    if gating_output.dtype not in _FLOATS or gating_output.dim() != 2:
        raise ValueError(
            "gating_output: expected shape [tokens, experts] of float32, float16 or bfloat16, got"
            f" {list(gating_output.shape)} of {gating_output.dtype}"
        )
    shared = rule.num_shared_experts
    num_routed = gating_output.shape[1] - (shared if rule.shared_expert_scoring_func else 0)
    if num_routed <= rule.num_zero_experts:
        raise ValueError(
            f"gating_output: expected more columns than the rule's {rule.num_zero_experts} zero and"
            f" {shared} shared experts, got {gating_output.shape[1]}"
        )
    if not 1 <= topk <= min(num_routed, MAX_TOPK - shared):
        raise ValueError(
            f"topk: expected 1 to {min(num_routed, MAX_TOPK - shared)} for {num_routed} experts, "
            f"got {topk}"
        )
    if num_routed % rule.num_expert_group:
        raise ValueError(
            f"gating_output: expected experts in {rule.num_expert_group} groups of equal size, got"
            f" {num_routed}"
        )
    if bias is None:
        return num_routed
    _require_tensor("correction_bias", bias)
    if bias.dtype not in _FLOATS or list(bias.shape) != [num_routed]:
        raise ValueError(
            f"correction_bias: expected shape [{num_routed}] of float32, float16 or bfloat16, got"
            f" {list(bias.shape)} of {bias.dtype}"
        )
    if bias.device != gating_output.device:
        raise ValueError(
            f"correction_bias: expected it on {gating_output.device}, as gating_output, got"
            f" {bias.device}"
        )
    return num_routed
