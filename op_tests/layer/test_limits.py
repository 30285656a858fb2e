"""What comes of odd inputs of the layer: sizes, no experts, autocast, meta tensors, transforms?"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from moe_layers import HAS_GROUPED_MM
from torch import Tensor

import aiter
from aiter import fused_moe as layer
from aiter._pytorch import VERSION
from aiter.layer.experts import BACKENDS
from aiter.layer.triton_experts import INSTALLED, why_not
from aiter.reference.layer import moe_layer

M, E, K, D, INTER = 5, 8, 2, 32, 16
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HERE = {"grouped_mm": HAS_GROUPED_MM, "triton": why_not(torch.device("cpu")) is None}
ON_CPU = [None, *(backend for backend in BACKENDS if HERE.get(backend, True))]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def tensors(dim: int = D, inter: int = INTER, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    w1, w2 = draw(E, 2 * inter, dim, dtype=dtype) / 4, draw(E, dim, inter, dtype=dtype) / 4
    return [draw(M, dim, dtype=dtype), w1, w2, draw(M, E)]


def expected(hidden: Tensor, w1: Tensor, w2: Tensor, logits: Tensor) -> Tensor:
    return moe_layer(hidden, w1, w2, *layer.fused_topk(hidden, logits, K, True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(("dim", "inter"), [(33, 17), (33, 16), (32, 17), (1, 1), (7, 3), (40, 24)])
def test_every_size_has_a_result_or_a_sentence(
    dim: int, inter: int, backend: str | None, dtype: torch.dtype
) -> None:
    made = tensors(dim, inter, dtype)
    aligned = all(size * dtype.itemsize % 16 == 0 for size in (dim, inter))
    if backend == "grouped_mm" and not aligned:
        words = r"backend: expected 'block_bmm' or None, as w\d \[8, .*16 bytes, got 'grouped_mm'"
        with pytest.raises(ValueError, match=words):
            layer.fused_moe_from_logits(*made, K, backend=backend)
        return
    got = layer.fused_moe_from_logits(*made, K, backend=backend)
    tolerance = 1e-4 if dtype is torch.float32 else 5e-2
    torch.testing.assert_close(got.double(), expected(*made), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("tokens", [0, 1, M])
def test_a_rank_without_experts(backend: str | None, tokens: int) -> None:
    hidden, w1, w2, logits = tensors()
    mask = torch.zeros(E, dtype=torch.int32)
    got = layer.fused_moe_from_logits(
        hidden[:tokens], w1[:0], w2[:0], logits[:tokens], K, expert_mask=mask, backend=backend,
        bias1=draw(0, 2 * INTER), bias2=draw(0, D),
    )  # fmt: skip
    assert torch.equal(got, torch.zeros(tokens, D))
    chosen = layer.fused_topk(hidden[:tokens], logits[:tokens], K, True)
    given = layer.fused_moe(
        hidden[:tokens], w1[:0], w2[:0], *chosen, expert_mask=mask, backend=backend
    )
    assert torch.equal(given, got)


def test_no_experts_at_all() -> None:
    hidden, w1, w2, logits = tensors()
    chosen = layer.fused_topk(hidden, logits, K, True)
    with pytest.raises(ValueError, match=r"w1: expected at least one expert without expert_mask"):
        layer.fused_moe(hidden, w1[:0], w2[:0], *chosen)


@pytest.mark.parametrize("backend", [None, "block_bmm"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_reach_inside(cast: torch.dtype, backend: str | None) -> None:
    """Every pair of dtypes is computed, or refused, as without autocast."""
    for dtype, of_weights, of_output in itertools.product(FLOATS, FLOATS, (None, torch.float32)):
        hidden, w1, w2, logits = tensors(dtype=dtype)
        w1, w2 = w1.to(of_weights), w2.to(of_weights)

        def call(h: Any = (hidden, w1, w2, logits), o: Any = of_output) -> Tensor:
            return layer.fused_moe_from_logits(*h, K, dtype=o, backend=backend)

        if dtype is not of_weights:
            with torch.autocast("cpu", cast), pytest.raises(ValueError, match="w1: expected"):
                call()
            continue
        plain = call()
        with torch.autocast("cpu", cast):
            assert torch.equal(call(), plain) and call().dtype == (of_output or dtype)
            assert torch.is_autocast_enabled("cpu")
            torch._dynamo.reset()
            compiled = torch.compile(call, backend="aot_eager")()
        torch.testing.assert_close(compiled, plain, rtol=2e-2, atol=2e-2)


def test_autocast_does_not_reach_the_routing() -> None:
    logits = draw(M, E)
    plain = layer.fused_topk(logits, logits, K, True)
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip(layer.fused_topk(logits, logits, K, True), plain, strict=True):
            assert torch.equal(got, want)


SORT = (K, E, D, torch.bfloat16)


def test_meta_tensors() -> None:
    """The Python functions say what the registered ops say, and so does the layer."""
    made = [tensor.to("meta") for tensor in tensors()]
    for ours, registered in (
        (layer.topk_softmax_sorting, torch.ops.aiter.topk_softmax_sorting),
        (lambda logits, *rest: layer.fused_topk(logits, logits, K, True),
         lambda logits, *rest: torch.ops.aiter.fused_topk(logits, logits, K, True)),
    ):  # fmt: skip
        real = ours(tensors()[3], *SORT)
        for got, op, size in zip(
            ours(made[3], *SORT), registered(made[3], *SORT), real, strict=True
        ):
            assert got.device.type == op.device.type == "meta"
            assert got.shape == op.shape == size.shape and got.dtype == op.dtype == size.dtype
    weights, ids = layer.fused_topk(made[0], made[3], K, True)
    assert layer.moe_sorting(ids, weights, *SORT[1:])[4].shape == (M, D)
    assert aiter.topk_softmax(weights, ids, torch.empty_like(ids), made[3], True) is None
    for output in (
        layer.fused_moe_from_logits(*made, K),
        layer.fused_moe(*made[:3], weights, ids),
        layer.fused_moe_from_logits(*made, K, expert_mask=torch.ones(E, device="meta").int()),
        *(layer.fused_moe_from_logits(*made, K, backend="triton") for _ in range(INSTALLED)),
        *(layer.fused_moe(*made[:3], weights, ids, backend="triton") for _ in range(INSTALLED)),
    ):
        assert output.shape == (M, D) and output.device.type == "meta"
    with pytest.raises(
        ValueError, match="gating_output: expected it on cpu, as hidden_states, got meta"
    ):
        layer.fused_moe_from_logits(*tensors()[:3], made[3], K)


def test_meta_tensors_beside_others() -> None:
    """Nothing would be written to the others: every function refuses, as for any two devices."""
    logits, meta = tensors()[3], tensors()[3].to("meta")
    weights, ids = layer.fused_topk(logits, logits, K, True)
    out = layer.empty_sorted_buffers(M, *SORT, device="cpu")
    calls: tuple[Callable[[], Any], ...] = (
        lambda: layer.topk_routing_sorting(meta, *SORT, topk_out=(weights, ids)),
        lambda: layer.topk_routing_sorting(meta, *SORT, correction_bias=logits[0]),
        lambda: layer.topk_softmax_sorting(meta, *SORT, out=out),
        lambda: layer.moe_sorting(ids.to("meta"), weights, *SORT[1:]),
        lambda: layer.moe_sorting(ids.to("meta"), weights.to("meta"), *SORT[1:], out=out),
        lambda: aiter.moe_sorting_fwd(ids.to("meta"), weights.to("meta"), *out, E, 32),
        lambda: aiter.topk_softmax(weights.to("meta"), ids, ids.clone(), logits, True),
    )
    for call in calls:
        with pytest.raises(
            ValueError, match=r"\w+: expected a tensor on cpu, as the others, got one"
        ):
            call()


@pytest.mark.skipif(VERSION < (2, 8), reason="2.6 maps no gather by int32; 2.7 was not tried")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("argument", range(4))
@pytest.mark.parametrize("bias", [False, True])
def test_vmap(argument: int, bias: bool) -> None:
    """Over hidden states, weights or logits: what a loop over them gives."""
    made = tensors()
    biases = {"bias1": draw(E, 2 * INTER), "bias2": draw(E, D)} if bias else {}
    several = torch.stack([made[argument], made[argument].flip(0), made[argument] * 0.5])

    def call(one: Tensor) -> Tensor:
        given = [*made[:argument], one, *made[argument + 1 :]]
        return layer.fused_moe_from_logits(*given, K, **biases)

    looped = torch.stack([call(one) for one in several])
    torch.testing.assert_close(torch.func.vmap(call)(several), looped, rtol=1e-4, atol=1e-4)


def test_vmap_of_what_writes() -> None:
    """Every slice has outputs of its own, or the one that it has not is named."""
    hidden, logits = draw(3, M, D), draw(3, M, E)
    chosen = [layer.fused_topk(h, x, K, True) for h, x in zip(hidden, logits, strict=True)]
    weights, ids = (torch.stack(each) for each in zip(*chosen, strict=True))
    got_weights, got_ids, source = weights * 0, ids * 0, ids * 0

    def softmax(*slices: Tensor) -> Tensor:
        aiter.topk_softmax(*slices, True)
        return slices[0]

    torch.func.vmap(softmax)(got_weights, got_ids, source, logits)
    assert torch.equal(got_weights, weights) and torch.equal(got_ids, ids)
    with pytest.raises(
        ValueError, match="topk_indices: expected a tensor that torch.func.vmap maps"
    ):
        torch.func.vmap(softmax, in_dims=(0, None, 0, 0))(got_weights, ids[0], source, logits)

    def routed(slice_of: Tensor) -> tuple[Tensor, ...]:
        chosen = slice_of.new_empty(M, K), slice_of.new_empty(M, K, dtype=torch.int32)
        five = layer.topk_routing_sorting(slice_of, *SORT, topk_out=chosen)
        return *chosen, five[3]

    def sorted_again(ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        *_, reverse = layer.moe_sorting(ids, weights, *SORT[1:], output_aux=True)
        return layer.moe_sorting(ids, weights, *SORT[1:])[3], reverse

    for function, given in ((routed, (logits,)), (sorted_again, (ids, weights))):
        one_by_one = [function(*slices) for slices in zip(*given, strict=True)]
        looped = [torch.stack(each) for each in zip(*one_by_one, strict=True)]
        for got, want in zip(torch.func.vmap(function)(*given), looped, strict=True):
            assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_transforms() -> None:
    made = tensors()

    def routed(logits: Tensor) -> Tensor:
        return layer.fused_topk(logits, logits, K, True)[0]

    batch = torch.func.vmap(routed)(torch.stack([made[3], -made[3]]))
    assert torch.equal(batch, torch.stack([routed(made[3]), routed(-made[3])]))
    assert torch.equal(torch.func.functionalize(routed)(made[3]), routed(made[3]))
    words = "gating_output: expected a tensor that needs no gradient"
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(ValueError, match=words):
            transform(lambda logits: routed(logits).sum())(made[3])
    with pytest.raises(ValueError, match="hidden_states: expected a tensor that needs no gradient"):
        torch.func.grad(lambda h: layer.fused_moe_from_logits(h, *made[1:], K).sum())(made[0])

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = torch.nn.Parameter(made[1], requires_grad=False)

        def forward(self, hidden: Tensor, logits: Tensor) -> Tensor:
            return layer.fused_moe_from_logits(hidden, self.w1, made[2], logits, K)

    module = Layer()
    got = torch.func.functional_call(module, {"w1": made[1] * 2}, (made[0], made[3]))
    want = layer.fused_moe_from_logits(made[0], made[1] * 2, made[2], made[3], K)
    assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("known", [False, True])
def test_jit_trace(known: bool) -> None:
    """A traced function routes anew, also where the call is known, and for other numbers of tokens."""
    made = tensors()

    def routed(logits: Tensor) -> tuple[Tensor, Tensor]:
        return layer.fused_topk(logits, logits, K, True)

    def counted(logits: Tensor) -> Tensor:
        return layer.topk_softmax_sorting(logits, K, E, D, torch.float32)[3]

    def whole(hidden: Tensor, logits: Tensor) -> Tensor:
        return layer.fused_moe_from_logits(hidden, made[1], made[2], logits, K, backend="block_bmm")

    if known:
        for _ in range(3):
            counted(made[3])
            whole(made[0], made[3])
    topk, counts, layers = (
        torch.jit.trace(function, example, check_trace=False)
        for function, example in ((routed, (made[3],)), (counted, (made[3],)),
                                  (whole, (made[0], made[3])))
    )  # fmt: skip
    for logits in (made[3], -made[3]):
        for got, want in zip(topk(logits), routed(logits), strict=True):
            assert torch.equal(got, want)
        assert torch.equal(counts(logits), counted(logits))
        torch.testing.assert_close(layers(made[0], logits), whole(made[0], logits))
