"""Do transformers' models compute the same when the routing launch makes their routers' products?

`use_aiter(model, router=True)`; the untouched model is the reference.
"""

from __future__ import annotations

import copy
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from targets import Target

from aiter import reference
from aiter.integrations import forwards
from aiter.integrations.blocks import BLOCKS
from aiter.integrations.transformers import use_aiter

transformers = pytest.importorskip("transformers")
import tiny_models as tiny  # noqa: E402
from test_transformers import BLOCKS as LAYERS  # noqa: E402
from test_transformers import (  # noqa: E402
    MODELS,
    TOLERANCE,
    generate,
    make_model,
    make_tokens,
    marked,
)


@pytest.mark.parametrize("name", MODELS)
def test_same_tokens(target: Target, name: str) -> None:
    model, tokens = make_model(name, target.device), make_tokens(target.device)
    with torch.no_grad(), target.active():
        plain, plain_tokens = model(tokens).logits, generate(model, tokens)
        with use_aiter(model, router=True) as patched:
            logits = model(tokens).logits
            assert patched.layers == patched.routers == LAYERS
            assert set(patched.paths.values()) == {"router"}
            got = generate(model, tokens)
        after = model(tokens).logits
    assert (logits - plain).abs().max().item() <= TOLERANCE * plain.abs().max().item()
    assert torch.equal(got, plain_tokens)
    assert torch.equal(after, plain) and marked(model) == []


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "glm4_moe", "ernie4_5_moe", "lfm2_moe", "minimax_m2"]
)
def test_rules_and_correction_biases(family: str) -> None:
    """Routers with groups and biases, some of them arguments of the router's call."""
    model, tokens = tiny.make_model(family), make_tokens("cpu")
    with torch.no_grad():
        plain = model(tokens).logits
        with use_aiter(model, router=True) as patched:
            got = model(tokens).logits
            assert patched.routers == patched.layers
            assert set(patched.paths.values()) == {"router"}
    assert (got - plain).abs().max().item() <= TOLERANCE * plain.abs().max().item()


def test_a_prefill_takes_two_launches() -> None:
    """Beyond 64 tokens PyTorch makes the product, and `paths` has that of the routing."""
    model = make_model("gpt-oss")
    tokens = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = model(tokens).logits
        with use_aiter(model, router=True) as patched:
            got = model(tokens).logits
            assert set(patched.paths.values()) == {"fused"}
    assert (got - plain).abs().max().item() <= TOLERANCE * plain.abs().max().item()


@pytest.mark.parametrize("name", ["gpt-oss", "mixtral"])
def test_router_logits_are_recorded(name: str) -> None:
    model, tokens = make_model(name), make_tokens("cpu")
    with torch.no_grad():
        plain = model(tokens, output_router_logits=True)
        with use_aiter(model, router=True):
            got = model(tokens, output_router_logits=True)
    assert [logits.dtype for logits in got.router_logits] == [torch.float32] * 2
    torch.testing.assert_close(got.router_logits, plain.router_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.aux_loss, plain.aux_loss)


def test_logits_are_the_contracts() -> None:
    """Of bfloat16 weights: not rounded, and the reference's to the bit."""
    model, tokens = make_model("gpt-oss").bfloat16(), make_tokens("cpu")
    seen: list[torch.Tensor] = []
    router = model.model.layers[0].mlp.router
    with torch.no_grad(), use_aiter(model, router=True):
        hook = router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        logits = model(tokens, output_router_logits=True).router_logits[0]
        hook.remove()
    rows = seen[0].reshape(-1, seen[0].shape[-1])
    wanted = reference.router_logits(rows, router.weight.detach(), router.bias.detach())
    assert torch.equal(logits, wanted)


def test_weights_are_looked_up_at_each_call() -> None:
    """What is changed in place, and a copy, compute with the weights of now."""
    model, tokens = make_model("gpt-oss"), make_tokens("cpu")
    with torch.no_grad(), use_aiter(model, router=True):
        other = copy.deepcopy(model)
        before = model(tokens).logits
        for layer in model.model.layers:
            layer.mlp.router.bias.add_(torch.linspace(-40, 40, 8))
        assert not torch.allclose(model(tokens).logits, before, rtol=1e-2)
        assert torch.equal(other(tokens).logits, before)


def test_compiled(target: Target) -> None:
    """One graph, whose routing op writes the logits."""
    model = make_model("mixtral", target.device)
    with torch.no_grad(), target.active(), use_aiter(model, router=True):
        block = model.model.layers[0].mlp
        hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
        hidden = hidden.to(target.device)
        eager = block(hidden)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(hidden), eager)


def test_other_routers_keep_their_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that does more than a product; a model that has none else is refused."""
    model, tokens = make_model("mixtral"), make_tokens("cpu")
    spec: Any = BLOCKS["MixtralSparseMoeBlock"].spec
    shifted = type(spec)(spec.rule, then=lambda _, logits: logits * 1.0)
    with torch.no_grad():
        plain = model(tokens).logits
        monkeypatch.setitem(forwards.ROUTERS, "MixtralTopKRouter", shifted)
        block = BLOCKS["MixtralSparseMoeBlock"]
        monkeypatch.setitem(
            BLOCKS, "MixtralSparseMoeBlock",
            type(block)(block.router, block.router_class, block.experts_class, shifted),
        )  # fmt: skip
        with pytest.raises(ValueError, match="router: expected a block whose router is a plain"):
            use_aiter(model, router=True)
        assert marked(model) == []
        with use_aiter(model) as patched:
            assert patched.routers == []
            got = model(tokens).logits
    assert (got - plain).abs().max().item() <= TOLERANCE * plain.abs().max().item()


def test_gradients_and_other_kinds_are_refused() -> None:
    model, tokens = make_model("gpt-oss"), make_tokens("cpu")
    with pytest.raises(TypeError, match="router: expected a bool, got int"):
        use_aiter(model, router=1)  # type: ignore[arg-type]
    with (
        use_aiter(model, router=True),
        pytest.raises(ValueError, match="expected a tensor that needs no gradient"),
    ):
        model(tokens)
