"""Does a model that uses aiter stay a model like any other?

Copies, replicas, pickles, values that change later, hooks around the forwards in any order, gradients
and autocast: what a user may do with a model between `use_aiter` and `remove()`.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from torch import nn

from aiter.integrations import forwards
from aiter.integrations.patching import mark_of
from aiter.integrations.transformers import remove_aiter, use_aiter

transformers = pytest.importorskip("transformers")
import tiny_models as tiny  # noqa: E402

FAMILIES = ["gpt_oss", "mixtral", "deepseek_v3"]
TOKENS = torch.randint(2, tiny.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def check_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def change_weights(model: Any) -> None:
    """Other weights of routers and experts, and other correction biases."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "mlp" in name and tensor.is_floating_point():
                tensor.mul_(-1.7)


def moe_block(model: Any) -> Any:
    return model.model.layers[1].mlp


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_computes_with_what_is_its_own(family: str) -> None:
    model = tiny.make_model(family)
    patched = use_aiter(model)
    before = logits(model)
    twin = copy.deepcopy(model)
    change_weights(twin)
    fresh = tiny.make_model(family)
    fresh.load_state_dict(twin.state_dict())
    check_close(logits(twin), logits(fresh))
    assert torch.equal(logits(model), before)
    patched.remove()
    assert mark_of(moe_block(twin).experts) is not None, "a copy goes on using aiter"
    remove_aiter(twin)
    assert not any(mark_of(module) for module in twin.modules())
    assert torch.equal(logits(twin), logits(fresh))


def test_an_averaged_model_stays_put() -> None:
    model = tiny.make_model("mixtral")
    use_aiter(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    before = logits(averaged)
    change_weights(model)
    assert torch.equal(logits(averaged), before)


def test_a_replica_computes_with_what_is_its_own() -> None:
    """What DataParallel does on every device, with other weights to tell them apart."""
    model = tiny.make_model("mixtral")
    use_aiter(model)
    block = moe_block(model)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        _, scores, choice = block.gate(hidden)
        replica = block.experts._replicate_for_data_parallel()
        for name, parameter in block.experts.named_parameters():
            setattr(replica, name, parameter.detach() * (2 if name == "down_proj" else 1))
        own = block.experts(hidden, choice, scores)
        torch.testing.assert_close(replica(hidden, choice, scores), 2 * own)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash"])
def test_an_ensemble_of_blocks(family: str) -> None:
    """torch.func.vmap over the weights of two blocks: what each gives by itself."""
    model = tiny.make_model(family)
    patched = use_aiter(model)
    block = model.get_submodule(patched.layers[-1])
    twin = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(-1.7)
        weights = {
            name: torch.stack([tensor, twin.state_dict()[name]])
            for name, tensor in block.state_dict().items()
        }
        hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(2))

        def call(weights: dict[str, torch.Tensor]) -> torch.Tensor:
            out: torch.Tensor = torch.func.functional_call(block, weights, (hidden,))
            return out

        for got, module in zip(torch.func.vmap(call)(weights), (block, twin), strict=True):
            check_close(got, module(hidden))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_dict_loaded_later_counts(family: str) -> None:
    model, other = tiny.make_model(family), tiny.make_model(family)
    change_weights(other)
    use_aiter(model)
    logits(model)
    model.load_state_dict(other.state_dict())
    check_close(logits(model), logits(other))


CHANGES: dict[str, tuple[str, Any]] = {
    "qwen3_moe": ("gate.norm_topk_prob", True),
    "mixtral": ("gate.top_k", 2),
    "gpt_oss": ("experts.limit", 0.5),
    "gpt_oss, alpha": ("experts.alpha", 1.0),
    "deepseek_v3": ("gate.routed_scaling_factor", 3.0),
    "deepseek_v3, groups": ("gate.topk_group", 2),
    "olmoe": ("experts.act_fn", nn.GELU()),
    "lfm2_moe": ("expert_bias", torch.linspace(-2, 2, tiny.EXPERTS)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_values_changed_later_count(name: str) -> None:
    family, (path, value) = name.split(",")[0], CHANGES[name]
    model, other = tiny.make_model(family), tiny.make_model(family)
    use_aiter(model)
    before = logits(model)
    for each in (model, other):
        layer = each.model.layers[1]
        target = layer.feed_forward if family == "lfm2_moe" else layer.mlp
        *parts, last = path.split(".")
        for part in parts:
            target = getattr(target, part)
        setattr(target, last, value)
    check_close(logits(model), logits(other))
    assert (logits(other) - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2), (0, 2, 1)])
def test_routers_that_return_in_another_order(order: tuple[int, ...]) -> None:
    """As those of other versions of transformers: the choice is where the block looks for ids."""
    model = tiny.make_model("mixtral")
    plain = logits(model)
    router_class, block_class = type(moe_block(model).gate), type(moe_block(model))

    class Router(router_class):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            parts = super().forward(hidden_states)
            return tuple(parts[i] for i in order)

    class Block(block_class):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            rows = hidden_states.reshape(-1, hidden_states.shape[-1])
            parts = dict(zip(order, self.gate(rows), strict=True))
            out: torch.Tensor = self.experts(rows, parts[2], parts[1])
            return out.reshape(hidden_states.shape)

    Router.__name__, Block.__name__ = router_class.__name__, block_class.__name__
    for layer in model.model.layers:
        layer.mlp.__class__, layer.mlp.gate.__class__ = Block, Router
    assert torch.equal(logits(model), plain)
    with use_aiter(model) as patched:
        check_close(logits(model), plain)
        assert None not in patched.paths.values()
        check_close(logits(copy.deepcopy(model)), plain)


def test_what_are_no_ids_is_refused() -> None:
    model = tiny.make_model("mixtral")
    block = moe_block(model)
    own = type(block.gate)

    class Router(own):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(super().forward(hidden_states)[:2])

    with use_aiter(model), pytest.raises(ValueError, match="top_k_index: expected ids of an int"):
        block.experts(torch.ones(2, 64), torch.ones(2, 3), torch.ones(2, 3))
    Router.__name__ = own.__name__
    block.gate.__class__ = Router
    with pytest.raises(
        ValueError, match="mlp.gate: router: expected one that returns logits, weig"
    ):
        use_aiter(model)
    assert not any(mark_of(module) for module in model.modules())


@pytest.mark.slow
def test_pickles_use_aiter_as_well(tmp_path: Path) -> None:
    model = tiny.make_model("deepseek_v3")
    use_aiter(model)
    before = logits(model)
    for again in (pickle.loads(pickle.dumps(model)), saved_and_loaded(model)):
        assert mark_of(moe_block(again).experts) is not None
        assert torch.equal(logits(again), before)
        remove_aiter(again)
        check_close(logits(again), before)
    # In a process that has patched nothing.
    torch.save((model, TOKENS, before), tmp_path / "model.pt")
    script = (
        "import sys, torch; from aiter.fused_moe import last_path\n"
        "model, tokens, before = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): got = model(tokens).logits\n"
        "assert torch.equal(got, before) and last_path() is not None, last_path()"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt")], check=True)


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_only_a_handles_own_marks_are_taken_off() -> None:
    model = tiny.make_model("mixtral")
    plain = logits(model)
    first = use_aiter(model)
    first.remove()
    second = use_aiter(model)
    first.remove()
    assert all(mark_of(layer.mlp.gate) for layer in model.model.layers)
    del moe_block(model).experts.forward  # as of a forward that is set on the instance
    assert mark_of(moe_block(model).experts) is None
    second.remove()
    second.remove()
    assert not any(mark_of(module) for module in model.modules())
    assert torch.equal(logits(model), plain)
    with pytest.raises(AttributeError):
        del moe_block(model).experts.forward


@pytest.mark.parametrize("order", ["hooks first", "aiter first", "offload"])
def test_hooks_around_the_forwards_stay(order: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    hooks = accelerate.hooks
    calls: list[str] = []

    class Counting(hooks.ModelHook):  # type: ignore[name-defined, misc]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(type(module).__name__)
            return args, kwargs

    def hook(model: Any) -> None:
        if order == "offload":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
            return
        for layer in model.model.layers:
            for part in (layer.mlp, layer.mlp.gate, layer.mlp.experts):
                hooks.add_hook_to_module(part, Counting())

    model = tiny.make_model("mixtral")
    plain = logits(model)
    if order == "hooks first":
        hook(model)
    patched = use_aiter(model)
    if order != "hooks first":
        hook(model)
    check_close(logits(model), plain)
    assert set(patched.paths.values()) <= {"fused", "oneshot", "multiphase"}
    patched.remove()
    assert torch.equal(logits(model), plain)
    hooks.remove_hook_from_submodules(model)
    hooks.remove_hook_from_module(model)
    assert torch.equal(logits(model), plain)
    assert not any(mark_of(module) for module in model.modules())
    assert order == "offload" or calls.count("MixtralTopKRouter") == 2 * 2


TRAINED = ("gate", "experts", "embed_tokens", "lora on the gate")
LONG = {
    "gate": pytest.mark.slow,
    "lora on the gate": pytest.mark.slow,
}  # to trace; the others thorough
WAYS = [
    *(pytest.param(name, False) for name in TRAINED),
    *(pytest.param(name, True, marks=LONG.get(name, pytest.mark.thorough)) for name in TRAINED),
]


@pytest.mark.parametrize(("trained", "compiled"), WAYS)
def test_gradients_are_refused(trained: str, compiled: bool) -> None:
    model = tiny.make_model("mixtral").requires_grad_(False)
    use_aiter(model)
    if trained == "lora on the gate":
        add_low_rank(moe_block(model).gate)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
    torch.compiler.reset()
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with pytest.raises(ValueError, match="needs no gradient, as routing has no backward"):
        # NOTE: transformers' way of collecting router logits makes no whole graph.
        call(TOKENS, use_cache=False, labels=TOKENS, output_router_logits=not compiled)
    assert logits(model).isfinite().all()


def add_low_rank(router: Any) -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(8, 2)), nn.Parameter(torch.zeros(2, 64))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + self.a @ self.b

    nn.utils.parametrize.register_parametrization(router, "weight", LowRank())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast_is_as_without(dtype: torch.dtype, cast: torch.dtype) -> None:
    """The same dtype comes out, and it is as near to float32 as the untouched model's."""
    model = tiny.make_model("mixtral")
    exact = logits(model)
    model.to(dtype)
    with torch.autocast("cpu", dtype=cast):
        plain = logits(model)
        with use_aiter(model):
            got = logits(model)
    assert got.dtype == plain.dtype
    plain_error = (plain.float() - exact).norm()
    assert (got.float() - exact).norm() <= 2 * plain_error
    assert plain_error <= 0.2 * exact.norm()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "dots1"])
def test_transformers_own_registry(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router stays transformers'; its ids go to `fused_moe`."""
    calls: list[None] = []
    own = forwards.fused_moe
    monkeypatch.setattr(
        forwards, "fused_moe", lambda *a, **k: (calls.append(None), own(*a, **k))[1]
    )
    model = tiny.make_model(family)
    plain = logits(model)
    before = model.config._experts_implementation
    model.set_experts_implementation("aiter")
    got = logits(model)
    model.set_experts_implementation(before)
    check_close(got, plain)
    assert calls
    assert torch.equal(logits(model), plain) and not any(map(mark_of, model.modules()))
