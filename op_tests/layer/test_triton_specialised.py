"""Do the products with loading warps compute the layer, and are they taken where they can be?

They run on GPUs of compute capability 9.0 alone; elsewhere they are compiled for one.
"""

from __future__ import annotations

from dataclasses import replace

import _checkout  # noqa: F401
import pytest
import torch
from moe_layers import BASE, GPT_OSS, LayerCase, check_close, make_layer
from targets import Target

from aiter import fused_moe as layer
from aiter.layer import triton_configs, triton_experts, triton_plan, triton_specialised
from aiter.layer.parts import Experts
from aiter.layer.triton_call import Call
from aiter.layer.triton_configs import Row, Tile
from aiter.layer.types import ActivationType
from aiter.reference.layer import moe_layer

pytest.importorskip("triton", reason="PyTorch's GPU builds bring Triton; here: pip install triton")

FIRST = Tile(128, 128, 64, 8, 4, group=2, desc=True, specialised=True, halves=True)
SECOND = Tile(128, 256, 64, 8, 3, group=4, specialised=True, halves=True)
SIZES = {"num_tokens": 300, "num_experts": 4, "topk": 2, "model_dim": 320, "inter": 192}
CASES = {
    "gpt-oss": replace(GPT_OSS, dtype=torch.bfloat16, **SIZES),
    "two halves": replace(BASE, dtype=torch.bfloat16, bias=True, **SIZES),
    "float16": replace(BASE, dtype=torch.float16, **SIZES),
    "rows in turns": replace(BASE, dtype=torch.bfloat16, interleaved=True, bias=True, **SIZES),
    "halves along columns": replace(BASE, dtype=torch.bfloat16, transposed=True, **SIZES),
    "masked": replace(BASE, dtype=torch.bfloat16, mask=(1, 0, 1, 1), **SIZES),
    "local tokens": replace(GPT_OSS, dtype=torch.bfloat16, num_local=170, **SIZES),
}
SHARED_MEMORY = 227 << 10  # of a workgroup


def call_of(columns: bool, dtype: torch.dtype = torch.bfloat16) -> Call:
    """A layer of 2,048 tokens with gpt-oss' sizes (columns) or Qwen3's; nothing is allocated."""
    experts, topk, width, inter = (32, 4, 2880, 2880) if columns else (128, 8, 2048, 768)
    rows = (2 * inter * width, inter * width)
    strides = ((rows[0], 1, 2 * inter), (rows[1], 1, width))
    if not columns:
        strides = ((rows[0], width, 1), (rows[1], inter, 1))
    return Call(
        torch.device("cuda:0"), dtype, dtype, 2048, topk, 2048 * topk + experts * 128 - topk, 128,
        (experts, 2 * inter, width), (experts, width, inter), (width, 1), *strides,
        (dtype, (2 * inter, 1)) if columns else None, (dtype, (width, 1)) if columns else None,
        2 if columns else 0, columns, 7.0, False, not columns, True,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_layer(target: Target, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (
        not target.device.startswith("cuda")
        or triton_plan._capability(torch.device(target.device)) != 9
    ):
        pytest.skip("needs compute capability 9.0")
    case: LayerCase = CASES[name]
    inputs = make_layer(case, target.device)
    made, making = [], triton_plan.make_launch

    def watched(kernel: object, *others: object) -> object:
        made.append(kernel.name)  # type: ignore[attr-defined]
        return making(kernel, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_plan, "make_launch", watched)
    triton_plan.make_plan.cache_clear()
    experts = Experts(
        inputs.w1, inputs.w2, inputs.bias1, inputs.bias2, case.activation, case.interleaved
    )
    family = triton_configs.family_of("sm_90", "inner")
    outputs = []
    with target.active():
        weights, ids = layer.fused_topk(inputs.hidden, inputs.logits, case.topk, True)
        for _ in range(2):
            buffers = layer.moe_sorting(
                ids, weights, case.num_experts, case.model_dim, case.dtype, 128, inputs.mask,
                inputs.num_local,
            )  # fmt: skip
            outputs.append(
                triton_experts.run_triton(
                    inputs.hidden, experts, buffers, case.topk, 128,
                    all_routed=False, weight_first=False,
                    choice=triton_plan.Choice(family, Row(0, FIRST, SECOND)),
                )
            )  # fmt: skip
    assert made == ["hopper_product", "hopper_product", "sum_over_slots"]
    assert torch.equal(outputs[0], outputs[1])
    expected = moe_layer(
        *(t.cpu() for t in (inputs.hidden, inputs.w1, inputs.w2, weights, ids)),
        activation=case.activation.name.lower(),
        expert_mask=None if inputs.mask is None else inputs.mask.cpu(),
        num_local_tokens=case.num_local,
        bias1=None if inputs.bias1 is None else inputs.bias1.cpu(),
        bias2=None if inputs.bias2 is None else inputs.bias2.cpu(),
        gate_up_interleaved=case.interleaved,
    )
    check_close(outputs[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [True, False])
def test_machine_code(columns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for compute capability 9.0: matrix units of it, shared memory within the limit."""
    if not triton_specialised._gluon():
        pytest.skip("this Triton has another Gluon")
    from triton.backends.compiler import GPUTarget

    from aiter.layer.triton_launch import compile_for, interpreted

    if interpreted():
        pytest.skip("TRITON_INTERPRET=1 compiles nothing")
    monkeypatch.setattr(triton_plan, "_capability", lambda device: 9)
    call = call_of(columns)
    for make, tile in ((triton_plan.first_kernel, FIRST), (triton_plan.second_kernel, SECOND)):
        for changed in (call, call._replace(dtype=torch.float16, complete=not call.complete)):
            kernel, _ = make(changed, tile)
            assert kernel.name == "hopper_product"
            compiled = compile_for(kernel, GPUTarget("cuda", 90, 32))
            assert compiled.metadata.shared <= SHARED_MEMORY
            assert "wgmma.mma_async" in compiled.asm["ptx"]
            assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
            assert ".local" not in compiled.asm["ptx"]


def test_where_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_specialised, "_gluon", lambda: True)
    taken = triton_specialised.allowed
    for columns in (True, False):
        call = call_of(columns)
        for tile, first in ((FIRST, True), (SECOND, False)):
            assert taken(call, tile, first, 9)
            assert not taken(call, tile, first, 10) and not taken(call, tile, first, 0)
            for other in (
                {"dtype": torch.float32}, {"block": 256}, {"weight_first": True},
                {"aligned": False}, {"activation": int(ActivationType.Gelu)},
                {"hidden_strides": (4, 2)},
                {"strides1": (1, 2, 3), "strides2": (1, 2, 3)},
            ):  # fmt: skip
                assert not taken(call._replace(**other), tile, first, 9), other
    plain = call_of(False)._replace(shape1=(128, 768, 2048))
    assert not taken(plain, FIRST, True, 9)
    monkeypatch.setattr(triton_specialised, "_gluon", lambda: False)
    assert not taken(call_of(True), FIRST, True, 9)
