"""Is `fused_moe_from_hidden` the layer from logits behind the router's product, in everything?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from moe_layers import BASE, DTYPES, GPT_OSS, LayerCase, make_layer, options_of
from router_calls import check_logits
from targets import Target
from test_fused_moe import skip_unless_it_runs
from torch import Tensor

from aiter import RoutingRule, reference
from aiter import fused_moe as layer
from aiter.layer.experts import BACKENDS

CASES = {
    "silu": BASE,
    "gpt-oss layout": GPT_OSS,
    "one token": replace(BASE, num_tokens=1, num_experts=32, topk=4),
    "no token": replace(BASE, num_tokens=0),
    "softmax over all": replace(BASE, renorm=False, weight_first=True),
    "more than one launch takes": replace(BASE, num_tokens=70),
    "mask and local tokens": replace(GPT_OSS, mask=(1, 0, 0, 0, 0, 1, 1, 1), num_local=5),
    "chain": replace(BASE, policy=1),
}


def draw_router(case: LayerCase, target: Target) -> tuple[Tensor, Tensor]:
    """Weight [E, D] and bias [E] of a router."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(case.num_experts, case.model_dim, generator=generator)
    bias = torch.randn(case.num_experts, generator=generator)
    return (weight / case.model_dim**0.5).to(target.device, case.dtype), bias.to(target.device)


def run(case: LayerCase, target: Target, backend: str | None = None, **more: Any) -> None:
    """Both entries, to the bit, and the logits against the reference's where their bits are promised."""
    inputs = make_layer(case, target.device)
    weight, bias = draw_router(case, target)
    options = options_of(case, inputs) | {"backend": backend} | more
    logits = torch.empty(case.num_tokens, case.num_experts, device=target.device)
    with target.active():
        got = layer.fused_moe_from_hidden(
            inputs.hidden, inputs.w1, inputs.w2, weight, case.topk, case.renorm,
            router_bias=bias, logits_out=logits, **options,
        )  # fmt: skip
        in_one = case.num_tokens <= 64 and not case.policy
        assert (layer.last_path() == "router") == in_one
        wanted = layer.fused_moe_from_logits(
            inputs.hidden, inputs.w1, inputs.w2, logits, case.topk, case.renorm, **options
        )
    target.synchronize()
    assert got.dtype == wanted.dtype and torch.equal(got, wanted)
    rows = case.num_tokens if case.num_local is None else case.num_local
    if case.num_tokens <= 64:
        expected = reference.router_logits(inputs.hidden.cpu(), weight.cpu(), bias.cpu())
        check_logits("logits", logits[:rows], expected[:rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_cases(target: Target, name: str, backend: str) -> None:
    skip_unless_it_runs(target, backend, torch.float32)
    run(CASES[name], target, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(target: Target, dtype: torch.dtype) -> None:
    run(replace(BASE, dtype=dtype), target)


def test_a_rule_with_shared_and_grouped_experts(target: Target) -> None:
    """The shared expert has no row in the router's weight."""
    rule = RoutingRule("sigmoid", num_expert_group=2, num_shared_experts=1)
    inputs = make_layer(replace(BASE, num_experts=9), target.device)
    weight, _ = draw_router(BASE, target)
    correction = torch.linspace(-1, 1, 8, device=target.device)
    logits = torch.empty(9, 8, device=target.device)
    options: dict[str, Any] = {"rule": rule, "correction_bias": correction}
    with target.active():
        got = layer.fused_moe_from_hidden(
            inputs.hidden, inputs.w1, inputs.w2, weight, 3, logits_out=logits, **options
        )
        wanted = layer.fused_moe_from_logits(
            inputs.hidden, inputs.w1, inputs.w2, logits, 3, **options
        )
    assert torch.equal(got, wanted)


def test_rows_do_not_depend_on_each_other(target: Target) -> None:
    """With `batch_invariant`, also beyond what one launch takes."""
    inputs = make_layer(replace(BASE, num_tokens=130), target.device)
    weight, _ = draw_router(BASE, target)
    logits = [torch.empty(m, 8, device=target.device) for m in (130, 4)]
    with target.active():
        for rows, written in zip((slice(None), slice(-4, None)), logits, strict=True):
            layer.fused_moe_from_hidden(
                inputs.hidden[rows], inputs.w1, inputs.w2, weight, 3, logits_out=written,
                batch_invariant=True,
            )  # fmt: skip
    assert torch.equal(logits[0][-4:], logits[1])


def test_one_graph(target: Target) -> None:
    """torch.compile records the routing as one op, and writes the logits."""
    inputs = make_layer(BASE, target.device)
    weight, bias = draw_router(BASE, target)

    def step(hidden: Tensor, logits: Tensor) -> Tensor:
        return layer.fused_moe_from_hidden(
            hidden, inputs.w1, inputs.w2, weight, 3, router_bias=bias, logits_out=logits
        )

    made = [torch.zeros(9, 8, device=target.device) for _ in range(2)]
    with target.active(), torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(inputs.hidden, made[0]), step(inputs.hidden, made[1]))
    assert torch.equal(*made) and made[0].any()


@pytest.mark.parametrize(
    ("change", "words", "kind"),
    [
        ({"router_weight": None}, "router_weight: expected a tensor, got NoneType", TypeError),
        ({"router_weight": torch.ones(8, 63)}, r"router_weight: expected shape \[any, 64\]", ValueError),
        ({"router_weight": torch.ones(8, 64, device="meta")}, "router_weight: expected it on cpu",
         ValueError),
        ({"router_weight": torch.ones(7, 64)}, "w1: expected 7 experts, the rows of router_weight",
         ValueError),
        ({"router_weight": torch.ones(8, 64, requires_grad=True)},
         "router_weight: expected a tensor that needs no gradient", ValueError),
        ({"router_bias": torch.ones(7)}, "router_bias: expected shape", ValueError),
        ({"renormalize": 1}, "renormalize: expected a bool", TypeError),
        ({"topk": 9}, "topk: expected at most 8", ValueError),
        ({"backend": "cutlass"}, "backend: expected", ValueError),
    ],
)  # fmt: skip
def test_refusals(change: dict[str, Any], words: str, kind: type[Exception]) -> None:
    inputs = make_layer(BASE, "cpu")
    logits = torch.full((9, 8), 7.0)
    arguments = {
        "hidden_states": inputs.hidden, "w1": inputs.w1, "w2": inputs.w2,
        "router_weight": torch.ones(8, 64), "topk": 3, "logits_out": logits,
    }  # fmt: skip
    with pytest.raises(kind, match=words):
        layer.fused_moe_from_hidden(**{**arguments, **change})
    assert torch.equal(logits, torch.full_like(logits, 7.0))
