"""Is `fused_moe` the layer that its formula says, on every backend, for every kind of argument?

The expected output is `aiter.reference_moe.moe_layer`, a float64 loop over (token, slot) pairs. Both
entries run on every case: `fused_moe` with ready ids and `fused_moe_from_logits` with logits; they
share the sorted entries' values, so their results are compared bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from buffers import FrozenInputs
from targets import Target
from torch import Tensor

from aiter import ActivationType, QuantType
from aiter import fused_moe as layer
from aiter.moe_experts import BACKENDS, CHUNK_BYTES
from aiter.reference_moe import moe_layer

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
    if target.device != "cpu" and backend == "grouped_mm" and dtype is not torch.bfloat16:
        pytest.skip(f"grouped_mm of {dtype} is not for GPUs")


def test_odd_sizes(target: Target) -> None:
    """Sizes that the grouped product does not take run on the other backend by themselves."""
    case = replace(BASE, model_dim=37, inter=11, bias=True)
    inputs = make_layer(case, target.device)
    assert layer.expert_backend(inputs.w1, inputs.w2) == "block_bmm"
    run_layer(case, target, None)


def test_weights_in_chunks(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the weights that is cut into chunks gives the same result."""
    whole = run_layer(BASE, target, "block_bmm")
    inputs = make_layer(BASE, target.device)
    monkeypatch.setattr("aiter.moe_experts.CHUNK_BYTES", 2 * inputs.w1[0].numel() * 4)
    assert CHUNK_BYTES > inputs.w1.numel() * 4
    torch.testing.assert_close(run_layer(BASE, target, "block_bmm"), whole, rtol=1e-6, atol=1e-6)


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


def test_same_bits_every_time(target: Target) -> None:
    """No float is added in an order that changes from call to call."""
    case = replace(BASE, num_tokens=64, topk=8, dtype=torch.bfloat16, bias=True)
    first = run_layer(case, target, None)
    for _ in range(3):
        assert torch.equal(run_layer(case, target, None), first)


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


def refused(words: str, kind: type[Exception] = ValueError, **changes: Any) -> None:
    inputs = make_layer(BASE, "cpu")
    weights, ids = torch.ones(9, 3), torch.arange(3, dtype=torch.int32).repeat(9, 1)
    arguments: dict[str, Any] = {
        "hidden_states": inputs.hidden,
        "w1": inputs.w1,
        "w2": inputs.w2,
        "topk_weight": weights,
        "topk_ids": ids,
    }
    with pytest.raises(kind, match=words):
        layer.fused_moe(**(arguments | changes))


UNSUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "quant_type": (r"expected QuantType.No.*got.*4", {"quant_type": QuantType.per_1x128}),
    "w1_scale": (r"expected None.*got a tensor of shape \[1\]", {"w1_scale": torch.ones(1)}),
    "w2_scale": (r"expected None", {"w2_scale": torch.ones(1)}),
    "a1_scale": (r"expected None", {"a1_scale": torch.ones(1)}),
    "a2_scale": (r"expected None", {"a2_scale": torch.ones(1)}),
    "hidden_pad": (r"expected 0.*got 64", {"hidden_pad": 64}),
    "intermediate_pad": (r"expected 0.*got 192", {"intermediate_pad": 192}),
    "activation": (r"expected Silu, Gelu or Swiglu, got No", {"activation": ActivationType.No}),
    "dtype": (r"expected float32.*got torch.int8", {"dtype": torch.int8}),
    "block_size_M": (r"expected at least 1.*got -1", {"block_size_M": -1}),
    "backend": (r"expected one of.*got 'cutlass'", {"backend": "cutlass"}),
    "moe_sorting_dispatch_policy": ("got 3", {"moe_sorting_dispatch_policy": 3}),
}


@pytest.mark.parametrize("argument", UNSUPPORTED)
def test_what_is_not_supported_is_refused(argument: str) -> None:
    words, changes = UNSUPPORTED[argument]
    name = argument.removeprefix("moe_sorting_")
    refused(f"{name}: {words}" if name == argument else f"{name}.*{words}", **changes)


def test_tensors_that_do_not_fit_are_refused() -> None:
    inputs = make_layer(BASE, "cpu")
    refused(r"hidden_states: expected 64 columns.*\[9, 60\]", hidden_states=torch.ones(9, 60))
    refused(r"hidden_states: expected dtype", hidden_states=torch.ones(9, 64, dtype=torch.int8))
    refused(r"w1: expected torch.float32.*float8", w1=inputs.w1.to(torch.float8_e4m3fn))
    refused(r"w1: expected a tensor of rank 3, got shape \[96, 64\]", w1=inputs.w1[0])
    refused(r"w1: expected 96 rows.*or 48", w1=torch.ones(8, 64, 64))
    refused(r"w2: expected shape \[8, 64, inter\].*\[7, 64, 48\]", w2=inputs.w2[1:])
    refused(r"w2: expected torch.float32", w2=inputs.w2.half())
    refused(r"bias1: expected shape \[8, 96\], got \[8, 64\]", bias1=torch.ones(8, 64))
    refused(r"bias2: expected dtype", bias2=torch.ones(8, 64, dtype=torch.int32))
    refused(r"topk_ids: expected a tensor of rank 2 with 9 rows", topk_ids=torch.ones(8, 3))
    refused(r"topk_ids", topk_ids=torch.ones(9, 3, dtype=torch.int64))
    refused("w1: expected a tensor, got list", TypeError, w1=[])
    refused("expert_mask: expected a tensor, got list", TypeError, expert_mask=[1] * 8)
    refused("activation: expected an ActivationType, got str", TypeError, activation="silu")
    refused("quant_type: expected a QuantType", TypeError, quant_type=0)
    refused("block_size_M: expected an int", TypeError, block_size_M=1.5)
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.int32)
    refused("w1: expected 4 experts, the ones in expert_mask, got 8", expert_mask=mask)
    flat = {"w1": inputs.w1[:, :48]}
    refused("activation: expected Silu or Gelu", activation=ActivationType.Swiglu, **flat)
    refused("gate_up_interleaved: expected False", gate_up_interleaved=True, **flat)


def test_logits_that_do_not_fit_are_refused() -> None:
    inputs = make_layer(BASE, "cpu")
    arguments = (inputs.hidden, inputs.w1, inputs.w2)
    with pytest.raises(ValueError, match="w1: expected 9 experts, the width of gating_output"):
        layer.fused_moe_from_logits(*arguments, torch.ones(9, 9), 3)
    with pytest.raises(ValueError, match=r"gating_output: expected .* 9 rows.*\[4, 8\]"):
        layer.fused_moe_from_logits(*arguments, torch.ones(4, 8), 3)
    with pytest.raises(ValueError, match="topk"):
        layer.fused_moe_from_logits(*arguments, inputs.logits, 9)


def test_gradients_are_refused() -> None:
    inputs = make_layer(BASE, "cpu")
    inputs.w1.requires_grad_()
    arguments = (inputs.hidden, inputs.w1, inputs.w2, inputs.logits, 3)
    with pytest.raises(ValueError, match="w1: expected a tensor that needs no gradient"):
        layer.fused_moe_from_logits(*arguments)
    with torch.no_grad():
        plain = layer.fused_moe_from_logits(*arguments)
    with torch.inference_mode():
        assert torch.equal(layer.fused_moe_from_logits(*arguments), plain)
