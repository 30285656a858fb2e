"""A stand-in for ROCm's `aiter.fused_moe`: its interfaces, a plain sort and plain loops for products.

It is loaded afresh for every test (`load`), as the tests replace its attributes. As in ROCm's, a call
chooses a block size, asks the module's own `moe_sorting`, and multiplies. The products read the sorted
buffers, or with `READS = "ids"` the ids and weights, and leave what they were given in `seen`. What
moves a call off the usual way: `FLAT`, `OUTPUT_AUX`, `LOCAL_IDS` and `ACCUMULATE` are how the sort is
asked, `GFX` the device, `SORTS = False` a version that goes past its sort.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from aiter import reference

BLOCK = 16
GFX = "gfx942"
READS = "sorted"
SORTS = True
FLAT = OUTPUT_AUX = LOCAL_IDS = False
ACCUMULATE = True

seen: list[dict[str, Any]] = []
own_sorts: list[Tensor] = []  # the ids of the calls of the module's own sort
own_policies: list[int] = []  # and their dispatch_policy


class ActivationType(enum.Enum):
    Silu = 0
    Gelu = 1


class QuantType(enum.Enum):
    No = 0
    per_Token = 2


def load() -> ModuleType:
    """A new copy of this module."""
    spec = importlib.util.spec_from_file_location("rocm_stand_in_copy", __file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # NOTE: torch.compile looks for globals by the module's name.
    spec.loader.exec_module(module)
    return module


def get_gfx() -> str:
    return GFX


def moe_sorting(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int = 32,
    expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    dispatch_policy: int = 0,
    return_local_topk_ids: bool = False,
    accumulate: bool = True,
    flat: bool = False,
    output_aux: bool = False,
    output: Tensor | None = None,
) -> Any:
    own_sorts.append(topk_ids.clone())
    own_policies.append(dispatch_policy)
    ids, weights, experts, counts, moe_buf = reference.moe_sorting(
        topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype, block_size, expert_mask,
        num_local_tokens,
    )  # fmt: skip
    if output is not None:
        moe_buf = output.zero_()
    if not accumulate and expert_mask is None:
        moe_buf = moe_buf.new_empty((0, 0))
    five = (ids, weights, experts, counts, moe_buf)
    if output_aux:
        return (*five, ids & 0xFFFFFF, torch.zeros_like(topk_ids).flatten())
    return (*five, topk_ids) if return_local_topk_ids else five


def fused_moe(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weight: Tensor,
    topk_ids: Tensor,
    expert_mask: Tensor | None = None,
    activation: ActivationType = ActivationType.Silu,
    quant_type: QuantType = QuantType.No,
    doweight_stage1: bool = False,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    block_size_M: int | None = None,  # noqa: N803
    num_local_tokens: Tensor | None = None,
    moe_sorting_dispatch_policy: int = 0,
    dtype: torch.dtype | None = None,
    hidden_pad: int = 0,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    swiglu_limit: float | None = None,
    gate_mode: str | None = "separated",
    shared_w1: Tensor | None = None,
    newer_than_we: float | None = None,
    output: Tensor | None = None,
) -> Tensor:
    assert isinstance(activation, ActivationType) and isinstance(quant_type, QuantType)
    assert bias1 is None and bias2 is None
    if not SORTS:
        return torch.zeros_like(hidden_states)
    num_experts = w1.shape[0] if expert_mask is None else expert_mask.shape[0]
    filled = {"ids before": topk_ids.clone(), "weights before": topk_weight.clone()}
    buffers = moe_sorting(
        topk_ids, topk_weight, num_experts, w2.shape[1], dtype or hidden_states.dtype,
        block_size_M or BLOCK, expert_mask, num_local_tokens, moe_sorting_dispatch_policy,
        return_local_topk_ids=LOCAL_IDS, accumulate=ACCUMULATE, flat=FLAT, output_aux=OUTPUT_AUX,
        output=output,
    )  # fmt: skip
    names = ("sorted_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids", "moe_buf")
    found = {name: tensor.clone() for name, tensor in zip(names, buffers, strict=False)}
    seen.append({**filled, **found, "ids": topk_ids.clone(), "weights": topk_weight.clone()})
    out = buffers[4] if buffers[4].numel() else hidden_states.new_zeros(hidden_states.shape)
    layer = Layer(hidden_states, w1, w2, activation, swiglu_limit)
    if READS == "ids":
        return layer.by_ids(out, topk_weight, topk_ids)
    return layer.by_blocks(out, *buffers[:4], topk_ids.shape[1], block_size_M or BLOCK)


class Layer:
    """The products, a token and an expert at a time, in float32."""

    def __init__(
        self, hidden: Tensor, w1: Tensor, w2: Tensor, kind: ActivationType, limit: float | None
    ) -> None:
        self.hidden, self.w1, self.w2 = hidden.float(), w1.float(), w2.float()
        self.kind, self.limit = kind, limit

    def expert(self, token: int, expert: int) -> Tensor:
        gate, up = (self.w1[expert] @ self.hidden[token]).chunk(2)
        function = torch.nn.functional.silu if self.kind.value == 0 else torch.nn.functional.gelu
        inner = function(gate if self.limit is None else gate.clamp(max=self.limit)) * up
        return self.w2[expert] @ inner

    def by_blocks(
        self, out: Tensor, ids: Tensor, weights: Tensor, experts: Tensor, counts: Tensor,
        topk: int, block: int,
    ) -> Tensor:  # fmt: skip
        total = out.float()
        for slot in range(int(counts[0])):
            token, k = int(ids[slot]) & 0xFFFFFF, int(ids[slot]) >> 24 & 0xFF
            if k < topk:
                total[token] += weights[slot] * self.expert(token, int(experts[slot // block]))
        return out.copy_(total)

    def by_ids(self, out: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        total = out.float()
        for token in range(ids.shape[0]):
            for weight, expert in zip(weights[token], ids[token], strict=True):
                total[token] += weight * self.expert(token, int(expert))
        return out.copy_(total)
