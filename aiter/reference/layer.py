"""What does a MoE layer compute? A loop over tokens and slots, on any device.

:func:`moe_layer` states the rule of `aiter.fused_moe.fused_moe` one (token, slot) pair at a time,
in float64 and with no sorting, grouping or batching, so that it shares nothing with what it checks.
It is for tests and for readers: a call costs milliseconds per pair.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SWIGLU_LIMIT = 7.0
SWIGLU_ALPHA = 1.702


def moe_layer(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weight: Tensor,
    topk_ids: Tensor,
    *,
    expert_mask: Tensor | None = None,
    activation: str = "silu",
    doweight_stage1: bool = False,
    num_local_tokens: int | None = None,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    gate_up_interleaved: bool = False,
) -> Tensor:
    """The layer's output [M, D] in float64.

    Args:
        hidden_states: [M, D].
        w1: [E', 2*inter, D] or [E', inter, D]; w2: [E', D, inter].
        topk_weight, topk_ids: [M, K]; ids outside [0, E) contribute nothing.
        expert_mask: [E] of 0 and 1: which experts the rows of w1 are; None for all.
        activation: "silu", "gelu" or "swiglu".
        doweight_stage1: the weight multiplies the first product instead of the output.
        num_local_tokens: rows from there on are zero; None for all rows.
        bias1, bias2: [E', rows of w1], [E', D], or None.
        gate_up_interleaved: gate and up take turns along the rows of w1.

    Raises:
        ValueError: the activation is none of the three.
    """
    num_experts = w1.shape[0] if expert_mask is None else expert_mask.numel()
    here = [True] * num_experts if expert_mask is None else expert_mask.bool().tolist()
    local = {e: sum(here[:e]) for e in range(num_experts) if here[e]}
    tokens = hidden_states.shape[0] if num_local_tokens is None else num_local_tokens
    out = torch.zeros(
        (hidden_states.shape[0], w2.shape[1]), dtype=torch.float64, device=hidden_states.device
    )
    for token in range(tokens):
        for weight, expert in zip(
            topk_weight[token].tolist(), topk_ids[token].tolist(), strict=True
        ):
            if expert not in local:
                continue
            row = local[expert]
            hidden = w1[row].double() @ hidden_states[token].double()
            if doweight_stage1:
                hidden = hidden * weight
            if bias1 is not None:
                hidden = hidden + bias1[row].double()
            gated = w1.shape[1] == 2 * w2.shape[2]
            result = w2[row].double() @ _activate(hidden, activation, gated, gate_up_interleaved)
            if bias2 is not None:
                result = result + bias2[row].double()
            out[token] += result if doweight_stage1 else result * weight
    return out


def _activate(hidden: Tensor, activation: str, gated: bool, interleaved: bool) -> Tensor:
    """The activation of one row."""
    up = torch.ones(())
    if gated:
        half = hidden.numel() // 2
        pairs = hidden.view(half, 2).T if interleaved else hidden.view(2, half)
        hidden, up = pairs[0], pairs[1]
    if activation == "silu":
        return hidden / (1 + torch.exp(-hidden)) * up.to(hidden)
    if activation == "gelu":
        return hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))) * up.to(hidden)
    if activation == "swiglu":
        gate = torch.minimum(hidden, torch.full_like(hidden, SWIGLU_LIMIT))
        clipped = up.minimum(torch.full_like(up, SWIGLU_LIMIT))
        clipped = clipped.maximum(torch.full_like(up, -SWIGLU_LIMIT))
        return gate / (1 + torch.exp(-SWIGLU_ALPHA * gate)) * (clipped + 1)
    raise ValueError(f"activation: expected silu, gelu or swiglu, got {activation!r}")
