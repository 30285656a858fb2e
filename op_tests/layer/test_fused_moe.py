"""Is `fused_moe` the layer that its formula says, on every backend, for every kind of argument?

`moe_layers` says how a case is run and what its output is compared with.
"""

from __future__ import annotations

from dataclasses import replace

import _checkout  # noqa: F401
import pytest
import torch
from moe_layers import (
    BASE,
    DTYPES,
    GPT_OSS,
    HAS_GROUPED_MM,
    LayerInputs,
    check_close,
    make_layer,
    needs_grouped_mm,
    run_layer,
)
from targets import Target
from torch import Tensor

from aiter import ActivationType
from aiter import fused_moe as layer
from aiter.layer.experts import BACKENDS
from aiter.layer.graph import CHUNK_BYTES
from aiter.layer.triton_experts import why_not
from aiter.reference.layer import moe_layer

CASES = {
    "silu": BASE,
    "gelu": replace(BASE, activation=ActivationType.Gelu),
    "swiglu clamped": replace(BASE, activation=ActivationType.Swiglu, scale=6.0),
    "gpt-oss layout": GPT_OSS,
    "no up projection": replace(BASE, gated=False),
    "gelu, no up projection": replace(BASE, gated=False, activation=ActivationType.Gelu),
    "bias": replace(BASE, bias=True),
    "weight first": replace(BASE, weight_first=True, bias=True),
    "softmax over all": replace(BASE, renorm=False),
    "transposed": replace(BASE, transposed=True),
    "one token": replace(BASE, num_tokens=1, num_experts=32, topk=4),
    "no token": replace(BASE, num_tokens=0),
    "every expert": replace(BASE, topk=8, num_tokens=70),
    "one expert": replace(BASE, num_experts=1, topk=1),
    "more slots than a sign bit": replace(BASE, num_experts=140, topk=130, num_tokens=2),
    "some local tokens": replace(BASE, num_local=4, bias=True),
    "no local token": replace(BASE, num_local=0),
    "mask": replace(BASE, mask=(0, 1, 1, 0, 0, 1, 0, 0), bias=True),
    "mask and local tokens": replace(GPT_OSS, mask=(1, 0, 0, 0, 0, 1, 1, 1), num_local=5),
    "block of 4": replace(BASE, block_size=4, bias=True),
    "block of 32, mask": replace(BASE, block_size=32, mask=(0, 0, 0, 0, 1, 1, 1, 1), bias=True),
    "oneshot": replace(BASE, policy=1),
    "multi-phase": replace(BASE, policy=2),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_layer(target: Target, name: str, backend: str) -> None:
    skip_unless_it_runs(target, backend, torch.float32)
    run_layer(CASES[name], target, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(target: Target, dtype: torch.dtype, backend: str) -> None:
    skip_unless_it_runs(target, backend, dtype)
    for case in (BASE, GPT_OSS, replace(BASE, mask=(1, 1, 0, 0, 0, 0, 0, 1), num_local=7)):
        run_layer(replace(case, dtype=dtype), target, backend)


def skip_unless_it_runs(target: Target, backend: str, dtype: torch.dtype) -> None:
    """A GPU's grouped product waits for the host with other dtypes; the CPU's takes them all."""
    if backend == "triton" and (reason := why_not(torch.device(target.device))):
        pytest.skip(reason)
    if backend == "grouped_mm" and not HAS_GROUPED_MM:
        pytest.skip("this PyTorch has no grouped_mm")
    if target.device != "cpu" and backend == "grouped_mm" and dtype is not torch.bfloat16:
        pytest.skip(f"grouped_mm of {dtype} is not for GPUs")


def test_odd_sizes(target: Target) -> None:
    """Sizes that the grouped product does not take run on the other backend by themselves."""
    case = replace(BASE, model_dim=37, inter=11, bias=True)
    inputs = make_layer(case, target.device)
    by_default = "block_bmm" if why_not(torch.device(target.device)) else "triton"
    assert target.device == "cpu" or layer.expert_backend(inputs.w1, inputs.w2) == by_default
    assert layer.expert_backend(inputs.w1.cpu(), inputs.w2.cpu()) == "block_bmm"
    run_layer(case, target, None)


def test_weights_in_chunks(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the weights that is cut into chunks gives the same result."""
    whole = run_layer(BASE, target, "block_bmm")
    inputs = make_layer(BASE, target.device)
    monkeypatch.setattr("aiter.layer.graph.CHUNK_BYTES", 2 * inputs.w1[0].numel() * 4)
    assert CHUNK_BYTES > inputs.w1.numel() * 4
    torch.testing.assert_close(run_layer(BASE, target, "block_bmm"), whole, rtol=1e-6, atol=1e-6)


@needs_grouped_mm
def test_backend_follows_from_the_weights() -> None:
    def choose(*shape: int, dtype: torch.dtype = torch.bfloat16, inter: int = 64) -> str:
        return layer.expert_backend(
            torch.empty(shape, dtype=dtype), torch.empty(shape[0], shape[2], inter, dtype=dtype)
        )

    assert choose(4, 128, 64) == "grouped_mm"
    assert choose(4, 128, 64, dtype=torch.float32) == "grouped_mm"
    assert choose(4, 128, 60) == "block_bmm"  # 120 bytes per row
    assert choose(4, 120, 64, inter=60) == "block_bmm"
    w1, w2 = torch.empty(4, 64, 128), torch.empty(4, 64, 64)
    assert layer.expert_backend(w1.transpose(1, 2), w2) == "grouped_mm"
    assert layer.expert_backend(w1[:, :, ::2].transpose(1, 2), w2) == "block_bmm"
    shifted = torch.empty(4 * 128 * 64 + 1, dtype=torch.bfloat16)[1:].view(4, 128, 64)
    assert layer.expert_backend(shifted, torch.empty(4, 64, 64)) == "block_bmm"


def test_same_bits_every_time(target: Target) -> None:
    """No float is added in an order that changes from call to call."""
    case = replace(BASE, num_tokens=64, topk=8, dtype=torch.bfloat16, bias=True)
    first = run_layer(case, target, None)
    for _ in range(3):
        assert torch.equal(run_layer(case, target, None), first)


def row_by_row(rows: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """`grouped_mm` that adds every row's products in one order; refuses groups that are not of fours."""
    out = rows.new_empty(rows.shape[0], weights.shape[2])
    first = 0
    for weight, end in zip(weights.mT, offs.tolist(), strict=True):
        assert (end - first) % 4 == 0, f"expected rows in fours, got {end - first}"
        for i in range(first, end):
            out[i] = (weight * rows[i]).sum(1)
        first = end
    return out


@pytest.mark.parametrize("product", ["row by row", "PyTorch's"])
def test_a_row_on_the_cpu_does_not_depend_on_others(
    monkeypatch: pytest.MonkeyPatch, product: str
) -> None:
    """In float32 as well: to the bit but for PyTorch's product, which rounds as its library does."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped product")
    if product == "row by row":
        monkeypatch.setattr(torch.nn.functional, "grouped_mm", row_by_row)
    generator = torch.Generator().manual_seed(7)
    x, w1, w2 = (torch.randn(s, generator=generator) for s in ((40, 96), (8, 128, 96), (8, 96, 64)))
    logits = torch.randn(40, 8, generator=generator)
    whole = layer.fused_moe_from_logits(x, w1, w2, logits, 4)
    for rows in (slice(0, 1), slice(3, 6), slice(0, 20)):
        got = layer.fused_moe_from_logits(x[rows], w1, w2, logits[rows], 4)
        if product == "row by row":
            assert torch.equal(got, whole[rows])
        else:
            check_close(got, whole[rows].double())


def test_ids_outside_are_left_out(target: Target) -> None:
    inputs = make_layer(BASE, target.device)
    with target.active():
        weights, ids = layer.fused_topk(inputs.hidden, inputs.logits, 3, True)
        ids[:, 1] = torch.tensor([BASE.num_experts, -1, 7000] * 3)
        output = layer.fused_moe(inputs.hidden, inputs.w1, inputs.w2, weights, ids)
    expected = moe_layer(*(t.cpu() for t in (inputs.hidden, inputs.w1, inputs.w2, weights, ids)))
    check_close(output, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_dtype(target: Target, dtype: torch.dtype) -> None:
    inputs = make_layer(BASE, target.device)
    with target.active():
        whole = layer.fused_moe_from_logits(inputs.hidden, inputs.w1, inputs.w2, inputs.logits, 3)
        other = layer.fused_moe_from_logits(
            inputs.hidden, inputs.w1, inputs.w2, inputs.logits, 3, dtype=dtype
        )
    assert torch.equal(other, whole.to(dtype))


def test_ranks_add_up(target: Target) -> None:
    """The layers of two masks that share out the experts add up to the layer without a mask."""
    case = replace(BASE, num_experts=12, topk=5, bias=True)
    inputs = make_layer(case, target.device)
    mask = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1], dtype=torch.int32)
    total = torch.zeros_like(inputs.hidden)
    with target.active():
        arguments = (inputs.hidden, inputs.w1, inputs.w2, inputs.logits, 5)
        whole = layer.fused_moe_from_logits(*arguments, bias1=inputs.bias1, bias2=inputs.bias2)
        for part in (mask, 1 - mask):
            here = part.bool().to(target.device)
            assert inputs.bias1 is not None and inputs.bias2 is not None
            total += layer.fused_moe_from_logits(
                inputs.hidden, inputs.w1[here], inputs.w2[here], inputs.logits, 5,
                expert_mask=part.to(target.device),
                bias1=inputs.bias1[here], bias2=inputs.bias2[here],
            )  # fmt: skip
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_comparison_can_fail(target: Target, interleaved: bool) -> None:
    """The other layout of gate and up is noticed."""
    case = replace(BASE, interleaved=interleaved)
    inputs = make_layer(case, target.device)
    with target.active():
        weights, ids = layer.fused_topk(inputs.hidden, inputs.logits, 3, True)
        output = layer.fused_moe(
            inputs.hidden, inputs.w1, inputs.w2, weights, ids, gate_up_interleaved=not interleaved
        )
    expected = moe_layer(
        *(t.cpu() for t in (inputs.hidden, inputs.w1, inputs.w2, weights, ids)),
        gate_up_interleaved=interleaved,
    )
    with pytest.raises(AssertionError, match="error"):
        check_close(output, expected)


def test_graph_replay(target: Target) -> None:
    """One capture of the layer serves new tokens, logits and local token counts."""
    if not target.device.startswith("cuda"):
        pytest.skip("CUDA graphs need a GPU")
    for backend, dtype in (("block_bmm", torch.float16), (None, torch.bfloat16)):
        case = replace(BASE, dtype=dtype, num_tokens=16, num_local=16, bias=True)
        static = make_layer(case, target.device)

        def call(static: LayerInputs = static, backend: str | None = backend) -> Tensor:
            return layer.fused_moe_from_logits(
                static.hidden, static.w1, static.w2, static.logits, 3, backend=backend,
                num_local_tokens=static.num_local, bias1=static.bias1, bias2=static.bias2,
            )  # fmt: skip

        call()
        target.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
        for count in (16, 3, 0, 9):
            fresh = make_layer(replace(case, num_local=count), target.device)
            static.hidden.copy_(fresh.hidden.roll(count, 1))
            assert static.num_local is not None
            static.num_local.fill_(count)
            output.fill_(float("nan"))
            graph.replay()
            target.synchronize()
            assert torch.equal(output, call())
