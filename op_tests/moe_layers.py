"""How is a whole MoE layer run and judged? Cases, random inputs, both entries, the tolerance.

The expected output is `aiter.reference.layer.moe_layer`, a float64 loop over (token, slot) pairs. Both
entries run on every case: `fused_moe` with ready ids and `fused_moe_from_logits` with logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from buffers import FrozenInputs
from targets import Target
from torch import Tensor

from aiter import ActivationType
from aiter import fused_moe as layer
from aiter.reference.layer import moe_layer

HAS_GROUPED_MM = hasattr(torch.nn.functional, "grouped_mm")
needs_grouped_mm = pytest.mark.skipif(not HAS_GROUPED_MM, reason="this PyTorch has no grouped_mm")

# Largest error over the largest value of the output. float32: sums of some hundred terms in another
# order. 16-bit: the two products, the activation's steps and the output are rounded once each.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DTYPES = tuple(TOLERANCE)


@dataclass(frozen=True)
class LayerCase:
    """One layer's shape and options; sizes in the names of the contract."""

    num_tokens: int = 9
    num_experts: int = 8
    topk: int = 3
    model_dim: int = 64
    inter: int = 48
    dtype: torch.dtype = torch.float32
    activation: ActivationType = ActivationType.Silu
    gated: bool = True
    interleaved: bool = False
    bias: bool = False
    weight_first: bool = False
    renorm: bool = True
    mask: tuple[int, ...] | None = None
    num_local: int | None = None
    transposed: bool = False
    scale: float = 1.0
    block_size: int | None = None
    policy: int = 0


@dataclass
class LayerInputs:
    """The tensors of a case, all on the target's device."""

    hidden: Tensor
    logits: Tensor
    w1: Tensor
    w2: Tensor
    bias1: Tensor | None
    bias2: Tensor | None
    mask: Tensor | None
    num_local: Tensor | None

    def named(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}


def make_layer(case: LayerCase, device: str) -> LayerInputs:
    """Random inputs; rows from `num_local` on hold NaN."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    local = sum(case.mask) if case.mask else case.num_experts
    rows = case.inter * (2 if case.gated else 1)
    w1 = random(local, rows, case.model_dim) * case.scale / case.model_dim**0.5
    w2 = random(local, case.model_dim, case.inter) / case.inter**0.5
    if case.transposed:
        w1, w2 = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (w1, w2))
    hidden = random(case.num_tokens, case.model_dim)
    logits = random(case.num_tokens, case.num_experts)
    if case.num_local is not None:
        hidden[case.num_local :] = float("nan")
    biases = (random(local, rows), random(local, case.model_dim)) if case.bias else (None, None)
    count = None if case.num_local is None else torch.tensor([case.num_local], dtype=torch.int32)
    mask = None if case.mask is None else torch.tensor(case.mask, dtype=torch.int32)

    def placed(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        return None if tensor is None else tensor.to(device=device, dtype=dtype or tensor.dtype)

    floats = [placed(t, case.dtype) for t in (hidden, logits, w1, w2, *biases)]
    return LayerInputs(*floats, placed(mask), placed(count))  # type: ignore[arg-type]


def options_of(case: LayerCase, inputs: LayerInputs) -> dict[str, Any]:
    """The keyword arguments that both entries share."""
    return {
        "expert_mask": inputs.mask,
        "activation": case.activation,
        "doweight_stage1": case.weight_first,
        "block_size_M": case.block_size,
        "num_local_tokens": inputs.num_local,
        "moe_sorting_dispatch_policy": case.policy,
        "bias1": inputs.bias1,
        "bias2": inputs.bias2,
        "gate_up_interleaved": case.interleaved,
    }


def run_layer(case: LayerCase, target: Target, backend: str | None) -> Tensor:
    """Runs both entries and checks them; returns the output."""
    inputs = make_layer(case, target.device)
    frozen = FrozenInputs(inputs.named())
    options = options_of(case, inputs) | {"backend": backend}
    with target.active():
        weights, ids = layer.fused_topk(inputs.hidden, inputs.logits, case.topk, case.renorm)
        from_ids = layer.fused_moe(inputs.hidden, inputs.w1, inputs.w2, weights, ids, **options)
        from_logits = layer.fused_moe_from_logits(
            inputs.hidden, inputs.w1, inputs.w2, inputs.logits, case.topk, case.renorm, **options
        )
    target.synchronize()
    frozen.check()
    assert from_logits.shape == inputs.hidden.shape and from_logits.dtype == case.dtype
    # NOTE: a weight may differ in its last bit between the launches (the contract says 1e-6).
    torch.testing.assert_close(from_logits, from_ids, rtol=1e-6, atol=TOLERANCE[case.dtype] / 10)
    expected = moe_layer(
        inputs.hidden.cpu(),
        inputs.w1.cpu(),
        inputs.w2.cpu(),
        weights.cpu(),
        ids.cpu(),
        expert_mask=None if inputs.mask is None else inputs.mask.cpu(),
        activation=case.activation.name.lower(),
        doweight_stage1=case.weight_first,
        num_local_tokens=case.num_local,
        bias1=None if inputs.bias1 is None else inputs.bias1.cpu(),
        bias2=None if inputs.bias2 is None else inputs.bias2.cpu(),
        gate_up_interleaved=case.interleaved,
    )
    check_close(from_ids, expected)
    check_close(from_logits, expected)
    return from_logits


def check_close(output: Tensor, expected: Tensor) -> None:
    """Within the dtype's tolerance of the float64 output; NaN is never."""
    if not expected.numel():
        return
    error = (output.cpu().double() - expected).abs().max().item()
    scale = expected.abs().max().item()
    assert error <= TOLERANCE[output.dtype] * max(scale, 1e-30), f"error {error:.2e} of {scale:.2e}"


BASE = LayerCase()
GPT_OSS = replace(
    BASE, activation=ActivationType.Swiglu, bias=True, interleaved=True, transposed=True, scale=6.0
)
