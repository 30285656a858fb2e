"""Does one graph of the layer serve every number of tokens, compiled and exported, on every backend?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from moe_layers import BASE, GPT_OSS, make_layer
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import aiter
from aiter import RoutingRule
from aiter import fused_moe as layer
from aiter._pytorch import VERSION

pytestmark = pytest.mark.skipif(
    VERSION < (2, 11), reason="2.8 finds no one graph of the layer; 2.9 and 2.10 were not tried"
)

SIZES = (5, 2, 3, 8, 16, 31, 33, 64, 100, 257)
BF16, F32 = torch.bfloat16, torch.float32
# (dtype, backend, other arguments): every backend that each dtype has under a tracer.
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (F32, {}),
    "float32, blocks of 4": (F32, {"block_size_M": 4}),
    "bfloat16": (BF16, {}),
    "bfloat16 grouped_mm": (BF16, {"backend": "grouped_mm"}),
    "bfloat16 grouped_mm, blocks of 8": (BF16, {"backend": "grouped_mm", "block_size_M": 8}),
    "bfloat16 block_bmm": (BF16, {"backend": "block_bmm"}),
    "float16 weight first": (torch.float16, {"doweight_stage1": True}),
    "local tokens": (F32, {"num_local_tokens": torch.tensor([2], dtype=torch.int32)}),
    "mask": (BF16, {"expert_mask": torch.tensor([0, 1] * 16, dtype=torch.int32)}),
    "one-workgroup sort": (F32, {"moe_sorting_dispatch_policy": 1}),
}
D, E, INTER, K = 16, 32, 16, 4


def weights(dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    here = 16 if "expert_mask" in options else E
    shapes = {"w1": (here, 2 * INTER, D), "w2": (here, D, INTER), "bias1": (here, 2 * INTER)}
    return {
        name: (torch.randn(shape, generator=generator) / 4).to(dtype)
        for name, shape in shapes.items()
    }


class FromLogits(torch.nn.Module):
    def __init__(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        for name, tensor in weights(dtype, options).items():
            self.register_buffer(name, tensor)

    def forward(self, hidden: Tensor, logits: Tensor) -> Tensor:
        tensors: dict[str, Any] = dict(self.named_buffers())
        w1, w2 = tensors.pop("w1"), tensors.pop("w2")
        return layer.fused_moe_from_logits(hidden, w1, w2, logits, K, **tensors, **self.options)


class FromIds(FromLogits):
    def forward(self, hidden: Tensor, logits: Tensor) -> Tensor:
        tensors: dict[str, Any] = dict(self.named_buffers())
        w1, w2 = tensors.pop("w1"), tensors.pop("w2")
        chosen = layer.fused_topk(hidden, logits, K, True)
        return layer.fused_moe(hidden, w1, w2, *chosen, **tensors, **self.options)


def inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, D, generator=generator).to(dtype)
    return hidden, torch.randn(tokens, E, generator=generator)


def same(got: Tensor, expected: Tensor) -> None:
    """Up to what another order of sums in bfloat16 makes."""
    torch.testing.assert_close(got.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("module", [FromLogits, FromIds])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_once(kind: str, module: type[FromLogits]) -> None:
    dtype, options = KINDS[kind]
    plain, graphs = module(dtype, options), 0

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(plain, backend=count, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for tokens in SIZES:
            hidden, logits = inputs(tokens, dtype)
            same(compiled(hidden, logits), plain(hidden, logits))
    assert graphs == 1


@pytest.mark.parametrize("module", [FromLogits, FromIds])
@pytest.mark.parametrize("kind", KINDS)
def test_exported_once(kind: str, module: type[FromLogits]) -> None:
    """Any range of sizes, and the program's sizes are not those that it was exported with."""
    dtype, options = KINDS[kind]
    plain = module(dtype, options)
    for low, high in ((1, 512), (2, 8)):
        dim = torch.export.Dim("M", min=low, max=high)
        program = torch.export.export(
            plain, inputs(5, dtype), dynamic_shapes=({0: dim}, {0: dim})
        ).module()
        for tokens in (low, 3, 7, min(high, 300)):
            hidden, logits = inputs(tokens, dtype)
            same(program(hidden, logits), plain(hidden, logits))


RULE = RoutingRule("sigmoid", 4, 2)  # not an argument: found by a tracer, or made while it looks on


def routed(logits: Tensor, rule: RoutingRule) -> Tensor:
    return layer.topk_routing_sorting(logits, K, E, D, F32, rule=rule)[3]


def sort_with_given_outputs(logits: Tensor) -> Tensor:
    weights, ids = layer.fused_topk(logits, logits, K, True)
    out = layer.empty_sorted_buffers(logits.shape[0], K, E, D, F32, device="cpu")
    aiter.moe_sorting_fwd(ids, weights, *out, E, 32)
    return out[3]


def topk(logits: Tensor, select: Callable[..., None], *options: Any) -> Tensor:
    weights = logits.new_empty(logits.shape[0], K)
    ids = logits.new_empty(logits.shape[0], K, dtype=torch.int32)
    if select is aiter.biased_grouped_topk:
        select(logits, logits[0] * 0, weights, ids, *options)
    else:
        select(logits, weights, ids, *options)
    return weights


ROUTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "a rule": lambda logits: routed(logits, RULE),
    "a rule made inside": lambda logits: routed(logits, RoutingRule("sigmoid", 2, 1)),
    "moe_sorting_fwd": sort_with_given_outputs,
    "biased_grouped_topk": lambda logits: topk(logits, aiter.biased_grouped_topk, 4, 2, True),
    "grouped_topk": lambda logits: topk(logits, aiter.grouped_topk, 4, 2, False),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing_compiled_once(name: str) -> None:
    """Also where rules are made in between."""
    function, counter = ROUTINGS[name], CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counter, dynamic=True, fullgraph=True)
    for tokens in SIZES[:4]:
        logits = inputs(tokens, F32)[1]
        got = compiled(logits)
        RoutingRule("softmax", renorm_min=float(tokens))
        assert torch.equal(got, function(logits))
    assert counter.frame_count == 1


def test_exported_programs_can_be_saved(tmp_path: Any) -> None:
    plain = FromLogits(F32, {})
    dim = torch.export.Dim("M", min=2, max=64)
    program = torch.export.export(plain, inputs(5, F32), dynamic_shapes=({0: dim}, {0: dim}))
    torch.export.save(program, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    same(again(*inputs(33, F32)), plain(*inputs(33, F32)))


def test_a_fixed_size_is_still_right() -> None:
    """Without dynamic=True, and with the lowering that fuses."""
    torch._dynamo.reset()
    plain = FromLogits(F32, {"backend": "block_bmm"})
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for tokens in (1, 5, 0, 40):
            same(compiled(*inputs(tokens, F32)), plain(*inputs(tokens, F32)))


@pytest.mark.parametrize("case", [BASE, GPT_OSS], ids=["base", "gpt-oss"])
def test_the_product_as_an_op(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.ops.aiter.block_bmm` passes PyTorch's own check of ops, in one chunk and in several."""
    made = make_layer(case, "cpu")
    rows = torch.randn(12, case.model_dim)
    experts = torch.tensor([0, 2, 5], dtype=torch.int32)
    whole = torch.ops.aiter.block_bmm(rows, made.w1.float(), experts, 4)
    monkeypatch.setattr("aiter.layer.graph.CHUNK_BYTES", 1)
    chunks = torch.ops.aiter.block_bmm(rows, made.w1.float(), experts, 4)
    torch.testing.assert_close(whole, chunks)
    torch.library.opcheck(
        torch.ops.aiter.block_bmm.default, (rows, made.w1.float(), experts, 4),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
