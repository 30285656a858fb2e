"""Does the Triton backend take every call of the layer: rules, shared experts, odd ids, tracers?

Judged by the loop in float64 with the reference's routing, so that nothing is shared with the layer. On
a CPU the kernels run in Triton's interpreter (`test_triton`), else what needs them is skipped.
"""

from __future__ import annotations

from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from moe_layers import BASE, GPT_OSS, check_close, make_layer
from targets import Target
from torch import Tensor

from aiter import ActivationType, RoutingRule, reference
from aiter import fused_moe as layer
from aiter.layer import triton_experts, triton_known, triton_plan
from aiter.reference.layer import moe_layer
from aiter.routing import known as routing_known

pytest.importorskip("triton", reason="PyTorch's GPU builds bring Triton; here: pip install triton")

K, E = 3, BASE.num_experts
RULES = {
    "grouped": RoutingRule("sigmoid", 4, 2, routed_scaling_factor=2.5),
    "shared": RoutingRule(num_shared_experts=2, shared_expert_weight=0.5),
    "shared by their logits": RoutingRule(
        num_shared_experts=1, shared_expert_scoring_func="sigmoid"
    ),
    "zero experts": RoutingRule(need_renorm=False, num_zero_experts=3),
    "by logits": RoutingRule(select_on="logit", softcap=5.0),
}


def needs_kernels(target: Target) -> None:
    if reason := triton_experts.why_not(torch.device(target.device)):
        pytest.skip(reason)


def draw(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def on_cpu(*tensors: Tensor) -> list[Tensor]:
    return [tensor.cpu() for tensor in tensors]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_rules(target: Target, name: str, with_bias: bool) -> None:
    """Slots K+S, entries that zero experts leave out, a bias of the choice; twice, for known calls."""
    needs_kernels(target)
    rule, inputs = RULES[name], make_layer(BASE, target.device)
    if with_bias and rule.select_on == "logit":
        pytest.skip("the routing takes no bias for a choice by logits")
    routed = E - rule.num_shared_experts + rule.num_zero_experts
    width = rule.num_logits(E)
    bias = draw(routed, device=target.device) if with_bias else None
    for tokens in (1, 9):
        hidden, logits = inputs.hidden[:tokens], draw(tokens, width, device=target.device)
        weights, ids = reference.topk_routing(
            logits.cpu(), K, rule=rule, correction_bias=None if bias is None else bias.cpu()
        )
        expected = moe_layer(*on_cpu(hidden, inputs.w1, inputs.w2), weights, ids)
        first = None
        for _ in range(2):
            with target.active():
                got = layer.fused_moe_from_logits(
                    hidden, inputs.w1, inputs.w2, logits, K, rule=rule, correction_bias=bias,
                    backend="triton",
                )  # fmt: skip
            check_close(got, expected)
            assert first is None or torch.equal(got, first)
            first = got


def test_another_rule_is_another_call(target: Target) -> None:
    """Calls that differ in nothing but the rule, the renormalisation or the bias."""
    needs_kernels(target)
    inputs = make_layer(BASE, target.device)
    bias = 3 * draw(E, device=target.device)
    ways: tuple[dict[str, Any], ...] = (
        {}, {"renormalize": False}, {"rule": RoutingRule("sigmoid")}, {"correction_bias": bias},
        {"rule": RoutingRule("sigmoid", routed_scaling_factor=2.0)}, {"rule": RoutingRule()},
    )  # fmt: skip

    def call(way: dict[str, Any]) -> Tensor:
        tensors = (inputs.hidden, inputs.w1, inputs.w2, inputs.logits)
        with target.active():
            return layer.fused_moe_from_logits(*tensors, K, **way, backend="triton")

    first = [call(way) for way in ways]
    again = [call(way) for way in reversed(ways)][::-1]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first[0], first[5])
    for index in range(5):
        assert not any(torch.equal(first[index], first[other]) for other in range(index))
    for wrong in (1, 0, None):
        with pytest.raises(TypeError, match="renormalize: expected a bool"):
            call({"renormalize": wrong})
    with pytest.raises(TypeError, match="rule: expected a RoutingRule"):
        call({"rule": "softmax"})


@pytest.mark.parametrize("tokens", [1, 9])
def test_limits_of_swiglu(target: Target, tokens: int) -> None:
    """A limit is part of what a kernel is: 7 and 0.5 differ, None is 7."""
    needs_kernels(target)
    inputs = make_layer(GPT_OSS, target.device)
    weights, ids = reference.topk_softmax(inputs.logits[:tokens].cpu(), K, True)

    def call(limit: float | None) -> Tensor:
        with target.active():
            return layer.fused_moe(
                inputs.hidden[:tokens], inputs.w1, inputs.w2, weights.to(target.device),
                ids.to(target.device), activation=ActivationType.Swiglu, bias1=inputs.bias1,
                bias2=inputs.bias2, gate_up_interleaved=True, swiglu_limit=limit, backend="triton",
            )  # fmt: skip

    assert torch.equal(call(None), call(7.0))
    hidden, w1, w2, bias1, bias2 = on_cpu(
        inputs.hidden[:tokens],
        inputs.w1,
        inputs.w2,
        inputs.bias1,
        inputs.bias2,  # type: ignore[arg-type]
    )
    rows = torch.zeros(tokens, w2.shape[1], dtype=torch.float64)
    for token in range(tokens):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            h = w1[expert].double() @ hidden[token].double() + bias1[expert].double()
            gate, up = h[0::2].clamp(max=0.5), h[1::2].clamp(-0.5, 0.5)
            y = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            rows[token] += weight * (w2[expert].double() @ y + bias2[expert].double())
    check_close(call(0.5), rows)


@pytest.mark.parametrize("tokens", [1, 9])
def test_repeated_and_strange_ids(target: Target, tokens: int) -> None:
    """Every (token, slot) is a term of the sum, the same bits each time."""
    needs_kernels(target)
    inputs = make_layer(BASE, target.device)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, 3, (tokens, 5), generator=generator, dtype=torch.int32)
    ids[0] = 2
    weights = torch.rand(tokens, 5, generator=generator)
    expected = moe_layer(*on_cpu(inputs.hidden[:tokens], inputs.w1, inputs.w2), weights, ids)
    for block in (None, 1, 16):
        outputs = []
        for _ in range(3):
            with target.active():
                output = layer.fused_moe(
                    inputs.hidden[:tokens], inputs.w1, inputs.w2, weights.to(target.device),
                    ids.to(target.device), block_size_M=block, backend="triton",
                )  # fmt: skip
            check_close(output, expected)
            outputs.append(output)
        assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_functions_between_the_products(target: Target) -> None:
    """No kernel calls one: the default is another backend, and asking for this one is refused."""
    needs_kernels(target)
    inputs = make_layer(BASE, target.device)

    def silu(hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    arguments = (inputs.hidden, inputs.w1, inputs.w2, inputs.logits, K)
    with target.active():
        by_name = layer.fused_moe_from_logits(*arguments, backend="triton")
        by_function = layer.fused_moe_from_logits(*arguments, activation=silu)
        torch.testing.assert_close(by_function, by_name, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="backend: expected another one.*call no function"):
            layer.fused_moe_from_logits(*arguments, activation=silu, backend="triton")
    assert layer.expert_backend(inputs.w1, inputs.w2, silu) != "triton"


def test_a_rank_without_experts(target: Target) -> None:
    needs_kernels(target)
    inputs = make_layer(BASE, target.device)
    mask = torch.zeros(E, dtype=torch.int32, device=target.device)
    for tokens in (0, 1, 9):
        with target.active():
            output = layer.fused_moe_from_logits(
                inputs.hidden[:tokens], inputs.w1[:0], inputs.w2[:0], inputs.logits[:tokens], K,
                expert_mask=mask, backend="triton",
            )  # fmt: skip
        assert torch.equal(output, torch.zeros_like(inputs.hidden[:tokens]))
    assert layer.warmup_layer(inputs.w1[:0], inputs.w2[:0], K) >= 0


NEEDING = ("hidden_states", "w1", "w2", "bias1", "bias2", "gating_output", "correction_bias")


@pytest.mark.parametrize("name", NEEDING)
def test_gradients_are_refused(target: Target, name: str) -> None:
    """Also by a call that is known, by a compiled one, and of tangents."""
    needs_kernels(target)
    inputs = make_layer(GPT_OSS, target.device)
    tensors = {
        "hidden_states": inputs.hidden, "w1": inputs.w1, "w2": inputs.w2, "bias1": inputs.bias1,
        "bias2": inputs.bias2, "gating_output": inputs.logits,
        "correction_bias": draw(E, device=target.device),
    }  # fmt: skip
    options: dict[str, Any] = {
        "topk": K, "activation": ActivationType.Swiglu, "gate_up_interleaved": True,
        "backend": "triton",
    }  # fmt: skip
    words = f"{name}: expected a tensor that needs no gradient"
    with target.active():
        for _ in range(2):
            plain = layer.fused_moe_from_logits(**tensors, **options)
        needing = tensors[name].detach().requires_grad_()
        given = tensors | {name: needing}
        with torch.no_grad():
            assert torch.equal(layer.fused_moe_from_logits(**given, **options), plain)
        with pytest.raises(ValueError, match=words):
            layer.fused_moe_from_logits(**given, **options)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(
                tensors[name], torch.ones_like(tensors[name])
            )
            with pytest.raises(ValueError, match=words):
                layer.fused_moe_from_logits(**(tensors | {name: dual}), **options)

        def call(needing: Tensor) -> Tensor:
            return layer.fused_moe_from_logits(**(tensors | {name: needing}), **options)

        torch._dynamo.reset()
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        # NOTE: PyTorch before 2.13 takes torch.compile for an export and raises an error of its own.
        with pytest.raises((ValueError, RuntimeError), match=words):
            compiled(needing)
        with torch.no_grad():
            assert torch.equal(compiled(needing), plain)


def test_forgetting_reaches_the_layer(target: Target) -> None:
    """What the routing forgets, the layer forgets with it."""
    needs_kernels(target)
    inputs = make_layer(BASE, target.device)
    with target.active():
        layer.fused_moe_from_logits(
            inputs.hidden, inputs.w1, inputs.w2, inputs.logits, K, backend="triton"
        )
    assert triton_plan.make_plan.cache_info().currsize
    assert triton_known._known or target.device == "cpu"
    routing_known.forget()
    assert not triton_known._known and not triton_plan.make_plan.cache_info().currsize


@pytest.mark.parametrize("entry", ["logits", "ids"])
def test_the_ops(target: Target, entry: str) -> None:
    """The registered ops pass PyTorch's own check, with a rule, a bias and a limit."""
    needs_kernels(target)
    inputs = make_layer(GPT_OSS, target.device)
    kind = (inputs.w1, inputs.w2, inputs.bias1, inputs.bias2, int(ActivationType.Swiglu), True)
    options = (None, False, None, None, 0, torch.float16)
    if entry == "logits":
        rule = [float(number) for number in RULES["grouped"].packed]
        bias = draw(E, device=target.device)
        op = torch.ops.aiter.fused_moe_from_logits_triton
        arguments: tuple[Any, ...] = (inputs.hidden, *kind, inputs.logits, K, rule, bias, *options)
    else:
        with target.active():
            chosen = layer.fused_topk(inputs.hidden, inputs.logits, K, True)
        op = torch.ops.aiter.fused_moe_triton
        arguments = (inputs.hidden, *kind, *chosen, 3.0, *options)
    with target.active():
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))
    assert op(*arguments).dtype == torch.float16


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_transforms(target: Target) -> None:
    """vmap runs the op once per slice; a recorded call routes anew."""
    needs_kernels(target)
    inputs = make_layer(BASE, target.device)

    def call(hidden: Tensor) -> Tensor:
        return layer.fused_moe_from_logits(
            hidden, inputs.w1, inputs.w2, inputs.logits, K, backend="triton"
        )

    several = torch.stack([inputs.hidden, -inputs.hidden])
    with target.active():
        looped = torch.stack([call(one) for one in several])
        assert torch.equal(torch.func.vmap(call)(several), looped)
        traced = torch.jit.trace(call, (inputs.hidden,), check_trace=False)
        assert torch.equal(traced(several[1]), looped[1])
