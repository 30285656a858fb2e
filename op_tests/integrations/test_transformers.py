"""Do transformers' models compute the same with aiter in their MoE blocks?

Small models with random weights, nothing is downloaded. The untouched model is the reference: logits
must be close, and greedy generation must give the same tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from targets import Target

import aiter
from aiter import ActivationType
from aiter.integrations.forwards import weights_of
from aiter.integrations.patching import mark_of
from aiter.integrations.transformers import use_aiter

transformers = pytest.importorskip("transformers")
import tiny_models as tiny  # noqa: E402

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss": (
        "GptOss",
        {
            "intermediate_size": 48,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3-moe, softmax over all": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": False}),
    "qwen3-moe, gelu": ("Qwen3Moe", {**EXPERTS, "hidden_act": "gelu"}),
    "qwen3-moe, relu": ("Qwen3Moe", {**EXPERTS, "hidden_act": "relu"}),
    "qwen3-next": (
        "Qwen3Next",
        {
            **EXPERTS,
            **LINEAR,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}
BLOCKS = ["model.layers.0.mlp", "model.layers.1.mlp"]
# float32; the experts' sums run in another order, and two layers pass it on.
TOLERANCE = 1e-5


def make_model(name: str, device: str = "cpu", **changes: Any) -> Any:
    """A model of the family with weights large enough for every step to matter."""
    family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **options, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(device)


def make_tokens(device: str) -> torch.Tensor:
    return torch.randint(2, 97, (3, 7), generator=torch.Generator().manual_seed(1)).to(device)


def generate(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False
    )


def marked(model: Any) -> list[str]:
    """The modules whose forward is ours."""
    return [name for name, module in model.named_modules() if mark_of(module) is not None]


@pytest.mark.parametrize("name", MODELS)
def test_same_tokens(target: Target, name: str) -> None:
    model, tokens = make_model(name, target.device), make_tokens(target.device)
    with torch.no_grad(), target.active():
        plain, plain_tokens = model(tokens).logits, generate(model, tokens)
        with use_aiter(model) as patched:
            logits, got = model(tokens).logits, generate(model, tokens)
            assert patched.layers == BLOCKS
            # NOTE: which path is the fastest depends on the device, and on what was tuned there.
            assert list(patched.paths) == BLOCKS
            assert set(patched.paths.values()) <= {"fused", "oneshot", "multiphase"}
        after = model(tokens).logits
    scale = plain.abs().max().item()
    assert (logits - plain).abs().max().item() <= TOLERANCE * scale
    assert not torch.equal(logits, torch.zeros_like(logits))
    assert torch.equal(got, plain_tokens)
    assert torch.equal(after, plain) and marked(model) == []


@pytest.mark.parametrize("name", ["gpt-oss", "qwen3-moe, softmax over all", "mixtral"])
def test_router_logits_are_still_recorded(name: str) -> None:
    model, tokens = make_model(name), make_tokens("cpu")
    with torch.no_grad():
        plain = model(tokens, output_router_logits=True)
        with use_aiter(model):
            got = model(tokens, output_router_logits=True)
    assert len(got.router_logits) == 2
    torch.testing.assert_close(got.router_logits, plain.router_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.aux_loss, plain.aux_loss)


def test_the_router_bias_counts() -> None:
    """gpt-oss' router has a bias: without it other experts would be chosen."""
    model, tokens = make_model("gpt-oss"), make_tokens("cpu")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias.mul_(20)
        plain = model(tokens).logits
        with use_aiter(model):
            assert (model(tokens).logits - plain).abs().max() <= TOLERANCE * plain.abs().max()
            for layer in model.model.layers:
                layer.mlp.router.bias.zero_()
            assert (model(tokens).logits - plain).abs().max() > 1e-2 * plain.abs().max()


def test_bfloat16(target: Target) -> None:
    """Within what bfloat16 leaves of the same model in float32."""
    model, tokens = make_model("gpt-oss", target.device), make_tokens(target.device)
    with torch.no_grad(), target.active():
        exact = model(tokens).logits
        model.to(torch.bfloat16)
        plain = (model(tokens).logits.float() - exact).norm().item()
        with use_aiter(model):
            got = (model(tokens).logits.float() - exact).norm().item()
    assert got <= 2 * plain


def test_chain_and_fused_are_told_apart() -> None:
    """A prefill beyond the fused launch's limit takes the chain, and `paths` says so."""
    model = make_model("mixtral")
    limit = aiter.fused_topk_moe_sorting_max_tokens(8, 2, device="cpu")
    length = 100
    tokens = torch.randint(2, 97, (limit // length + 1, length))
    with torch.no_grad():
        plain = model(tokens).logits
        with use_aiter(model) as patched:
            got = model(tokens).logits
            assert set(patched.paths.values()) <= {"oneshot", "multiphase"}
    torch.testing.assert_close(got, plain, rtol=0, atol=TOLERANCE * plain.abs().max().item())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_compiled_model(family: str) -> None:
    torch.compiler.reset()
    model, tokens = tiny.make_model(family), make_tokens("cpu")
    with torch.no_grad(), use_aiter(model):
        plain = model(tokens).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        got = compiled(tokens, use_cache=False).logits
    torch.testing.assert_close(got, plain, rtol=0, atol=TOLERANCE * plain.abs().max().item())


def test_handle_without_with() -> None:
    model = make_model("gpt-oss")
    patched = use_aiter(model)
    assert sorted(marked(model)) == sorted(
        f"{block}.{part}" for block in BLOCKS for part in ("router", "experts")
    )
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.mlp: .* replaced already \(by use_aiter"
    ):
        use_aiter(model)
    patched.remove()
    patched.remove()
    assert marked(model) == []
    use_aiter(model).remove()


def test_training_is_refused() -> None:
    model, tokens = make_model("mixtral"), make_tokens("cpu")
    with use_aiter(model), pytest.raises(ValueError, match="needs no gradient"):
        model(tokens)


def refused(model: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        use_aiter(model)
    assert marked(model) == []


def test_other_routers_are_refused() -> None:
    """What is not top-k of scores is named; one unknown block is as good as any."""
    model = tiny.make_model("phimoe")
    refused(
        model, r"layers\.0\.mlp: expected .*RoutingRule.*got PhimoeSparseMoeBlock: .*sparsemixer"
    )

    class OtherMoE(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.Linear(2, 2)

    refused(torch.nn.Sequential(OtherMoE()), r"^0: expected .*router that is known.*got OtherMoE")


def test_models_without_experts_are_refused() -> None:
    config = transformers.LlamaConfig(**COMMON, intermediate_size=48)
    refused(transformers.LlamaForCausalLM(config), "model: expected MoE blocks.*LlamaForCausalLM")


def test_what_does_not_fit_is_refused() -> None:
    model = tiny.make_model("deepseek_v3")
    model.model.layers[1].mlp.gate.topk_group = 3
    refused(model, r"layers\.1\.mlp\.gate: topk_group: expected a value from 1 to 2, got 3")
    model = make_model("mixtral")
    quantised = model.model.layers[0].mlp.experts.down_proj.to(torch.float8_e4m3fn)
    model.model.layers[0].mlp.experts.down_proj = torch.nn.Parameter(quantised, requires_grad=False)
    refused(model, r"down_proj: expected float32.*quantised.*got torch\.float8_e4m3fn")
    model = make_model("mixtral")
    model.model.layers[0].mlp.experts = torch.nn.Linear(2, 2)
    refused(model, r"layers\.0\.mlp: expected MixtralExperts \(quantised.*got Linear")
    model = make_model("mixtral")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    refused(model, "expected all experts on this rank")


class Sharded(torch.Tensor):
    """Stands for any tensor that is more than its values."""


def test_hooked_and_sharded_blocks_are_refused() -> None:
    model = make_model("gpt-oss")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach().as_subclass(Sharded))
    refused(model, r"layers\.1\.mlp\.experts\.down_proj: expected a plain parameter.*got Sharded")
    model = make_model("gpt-oss")
    hooked = model.model.layers[1].mlp
    hooked.forward = hooked.forward
    refused(model, r"layers\.1\.mlp: .* replaced already \(by use_aiter")


def test_backends_follow_the_weights() -> None:
    model = make_model("mixtral", intermediate_size=44)
    with use_aiter(model) as patched:
        assert patched.backends == dict.fromkeys(BLOCKS, "grouped_mm")  # float32 rows of 176 bytes
        model.to(torch.bfloat16)
        assert patched.backends == dict.fromkeys(BLOCKS, "block_bmm")  # 88 bytes


def test_silu_is_known_by_its_name() -> None:
    """Every backend computes it then; what was changed stays the model's own function."""
    experts: Any = make_model("mixtral").model.layers[0].mlp.experts
    assert weights_of(experts).activation is ActivationType.Silu
    handle = experts.act_fn.register_forward_hook(lambda *arguments: None)
    assert not isinstance(weights_of(experts).activation, ActivationType)
    handle.remove()
    assert weights_of(experts).activation is ActivationType.Silu
    experts._apply_gate = lambda hidden: hidden.chunk(2, dim=-1)[0]
    assert not isinstance(weights_of(experts).activation, ActivationType)
    del experts._apply_gate
    experts.act_fn = torch.nn.GELU()
    assert not isinstance(weights_of(experts).activation, ActivationType)


def test_a_wrong_router_is_noticed() -> None:
    """The comparison fails for a model that renormalises where it should not."""
    model, tokens = make_model("qwen3-moe, softmax over all"), make_tokens("cpu")
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        layer.mlp.gate.norm_topk_prob = True
    with torch.no_grad(), use_aiter(other):
        plain, got = model(tokens).logits, other(tokens).logits
    assert (got - plain).abs().max() > 100 * TOLERANCE * plain.abs().max()
