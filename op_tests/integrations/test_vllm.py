"""Does the vLLM plugin take what it can, compute the same, and say why it leaves the rest?

Against a stand-in (`vllm_stand_in.py`), with plain loops in place of vLLM's kernels; `.ci/vllm`
generates with the real engine.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import _checkout  # noqa: F401
import pytest
import rocm_stand_in
import torch
import vllm_stand_in as engine
from torch import Tensor

from aiter import RoutingRule, reference
from aiter.fused_moe import topk_routing_sorting
from aiter.integrations import rocm_aiter, rocm_sort, vllm_layers, vllm_rocm
from aiter.integrations import vllm as plugin
from aiter.reference.layer import moe_layer

NAME = "model.layers.0.mlp.experts"
GROUPS = {"num_expert_group": 4, "topk_group": 2}
NO_ACTIVATION = SimpleNamespace(clamp_limit=None, alpha=1.0, beta=0.0)


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plugin, "_said", set())
    monkeypatch.setenv("AITER_LOG_LEVEL", "INFO")
    monkeypatch.delenv("AITER_VLLM", raising=False)
    finders = list(sys.meta_path)
    with engine.installed():
        yield
    sys.meta_path[:] = finders


def router_of(kind: str, experts: int = 16, topk: int = 3, **attributes: Any) -> Any:
    """A router of vLLM: of a class of that name, with the attributes that it has there."""
    common = {
        "top_k": topk, "global_num_experts": experts, "eplb_state": None, "renormalize": True,
        "scoring_func": "softmax", "routed_scaling_factor": 1.0, "e_score_correction_bias": None,
    }  # fmt: skip
    if kind == "CPURouter":
        common |= {"use_grouped_topk": False, "custom_routing_function": None}
    made = type(kind, (), {})()
    for name, value in {**common, **attributes}.items():
        setattr(made, name, value)
    return made


def layer_of(
    router: Any, backend: str = "CPU", inter: int = 32, width: int = 64, **options: Any
) -> Any:
    """A layer whose weights are loaded, and its method; `expert_map` makes it one rank's."""
    torch.manual_seed(3)
    experts, expert_map = router.global_num_experts, options.pop("expert_map", None)
    local = experts if expert_map is None else int((expert_map >= 0).sum())
    moe = SimpleNamespace(
        num_experts=experts, experts_per_token=router.top_k, backend=backend, swiglu_limit=None,
        activation=SimpleNamespace(value="silu"), is_lora_enabled=False, router_logits_dtype=None,
        moe_parallel_config=SimpleNamespace(use_all2all_kernels=False, enable_eplb=False),
        dp_size=1, pcp_size=1, is_sequence_parallel=False,
    )  # fmt: skip
    vars(moe).update(options.pop("moe", {}))
    layer = options.pop("kind", engine.RoutedExperts)(
        NAME, expert_map, w13_weight=torch.randn(local, 2 * inter, width) / 8,
        w2_weight=torch.randn(local, width, inter) / 6,
        e_score_correction_bias=router.e_score_correction_bias, **options,
    )  # fmt: skip
    engine.config.compilation_config.static_forward_context[NAME] = SimpleNamespace(router=router)
    plugin.register()
    layer.method = engine.UnquantizedFusedMoEMethod(moe)
    layer.method.process_weights_after_loading(layer)
    layer.experts = layer.method.moe_kernel.fused_experts
    return layer


def call(layer: Any, hidden: Tensor, logits: Tensor, **keywords: Any) -> Tensor:
    """As vLLM calls it."""
    out: Tensor = layer.experts.apply(
        hidden_states=hidden, w1=layer.w13_weight, w2=layer.w2_weight, router_logits=logits,
        activation=layer.method.moe.activation, global_num_experts=layer.method.moe.num_experts,
        expert_map=layer.expert_map, a1q_scale=None,
        apply_router_weight_on_input=layer.apply_router_weight_on_input,
        **{"e_score_correction_bias": layer.e_score_correction_bias, **keywords},
    )  # fmt: skip
    return out


def expected(
    layer: Any, rule: RoutingRule, topk: int, hidden: Tensor, logits: Tensor, **options: Any
) -> Any:
    """The layer's output and ids by the reference."""
    weights, ids = reference.topk_routing(
        logits, topk, rule=rule, correction_bias=layer.e_score_correction_bias
    )
    mask = None if layer.expert_map is None else (layer.expert_map >= 0).int()
    out = moe_layer(
        hidden, layer.w13_weight, layer.w2_weight, weights, ids, expert_mask=mask, **options
    )
    return out.float(), ids


def inputs(tokens: int, experts: int = 16, width: int = 64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens)
    return torch.randn(tokens, width), torch.randn(tokens, experts)


BIAS = torch.linspace(-0.3, 0.4, 16)
SCALED = {"routed_scaling_factor": 2.5}
RULES = [
    ("FusedTopKRouter", {}, RoutingRule()),
    ("FusedTopKRouter", {"renormalize": False}, RoutingRule(need_renorm=False)),
    ("FusedTopKRouter", {"scoring_func": "sigmoid"}, RoutingRule("sigmoid")),
    ("FusedTopKBiasRouter", {"scoring_func": "sigmoid", "e_score_correction_bias": BIAS, **SCALED},
     RoutingRule("sigmoid", **SCALED)),
    ("FusedTopKBiasRouter", {"scoring_func": "sqrtsoftplus", "e_score_correction_bias": BIAS},
     RoutingRule("sqrtsoftplus")),
    ("FusedTopKBiasRouter", {"e_score_correction_bias": BIAS}, RoutingRule()),
    ("GroupedTopKRouter", {**GROUPS, **SCALED}, RoutingRule("softmax", 4, 2, **SCALED)),
    ("GroupedTopKRouter", {**GROUPS, "scoring_func": "sigmoid", "e_score_correction_bias": BIAS},
     RoutingRule("sigmoid", 4, 2)),
    ("CPURouter", {**SCALED}, RoutingRule()),
    ("CPURouter", {"use_grouped_topk": True, **GROUPS, "scoring_func": "sigmoid",
                   "e_score_correction_bias": BIAS, **SCALED}, RoutingRule("sigmoid", 4, 2, **SCALED)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "attributes", "rule"), RULES)
def test_a_router_has_the_rule_by_which_it_chooses(
    kind: str, attributes: dict[str, Any], rule: RoutingRule
) -> None:
    router = router_of(kind, **attributes)
    layer = layer_of(router)
    taken = layer.experts.taken
    assert taken.routing == (rule, 3, router.e_score_correction_bias is not None)
    hidden, logits = inputs(5)
    want, ids = expected(layer, rule, 3, hidden, logits)
    replay = torch.zeros((9, 3), dtype=torch.int16)
    torch.testing.assert_close(call(layer, hidden, logits), want, rtol=1e-4, atol=1e-4)
    got = call(layer, hidden, logits, routing_replay_out=replay)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(replay[:5], ids.short()) and not replay[5:].any()


def _llama4() -> None: ...


_llama4.__module__, _llama4.__qualname__ = vllm_layers.LLAMA4

LEFT = [
    ({"kind": "ZeroExpertRouter"}, {}, "a ZeroExpertRouter, which no rule expresses"),
    ({"kind": "FusedTopKRouter", "eplb_state": 1}, {}, "EPLB"),
    ({"kind": "GroupedTopKRouter", **GROUPS, "num_fused_shared_experts": 1}, {}, "shared experts"),
    ({"kind": "GroupedTopKRouter", "num_expert_group": 3, "topk_group": 1}, {},
     "16 experts are not 3 groups"),
    ({"kind": "FusedTopKBiasRouter", "_hash_indices_table": 1}, {}, "hash routing"),
    ({"kind": "FusedTopKBiasRouter", "bias_vl": 1}, {}, "image tokens"),
    ({"kind": "CPURouter", "e_score_correction_bias": BIAS}, {}, "leaves the correction bias out"),
    ({"kind": "CPURouter", "custom_routing_function": lambda: 0}, {}, "function of its own"),
    ({"kind": "FusedTopKRouter", "scoring_func": "tanh"}, {}, "scoring_func: expected one of"),
    ({"kind": "FusedTopKRouter"}, {"moe": {"is_lora_enabled": True}}, "LoRA"),
    ({"kind": "FusedTopKRouter"}, {"moe": {"require_decomposed_backend": True}}, "can see"),
    ({"kind": "FusedTopKRouter"}, {"moe": {"moe_parallel_config": SimpleNamespace(
        use_all2all_kernels=True, enable_eplb=False)}}, "parallel config"),
    ({"kind": "FusedTopKRouter"}, {"moe": {"router_logits_dtype": torch.float64}}, "float64"),
    ({"kind": "FusedTopKRouter"}, {"backend": "FLASHINFER_CUTLASS"}, "FLASHINFER_CUTLASS"),
    ({"kind": "FusedTopKRouter"}, {"moe": {"activation": SimpleNamespace(value="situ")}},
     "activation is not computed here"),
    ({"kind": "FusedTopKRouter"}, {"expert_map": torch.tensor([1, 0] + [-1] * 14)}, "in the order"),
    ({"kind": "CustomRoutingRouter", "custom_routing_function": _llama4},
     {"backend": "TRITON", "apply_router_weight_on_input": True}, "multiplies the expert's input"),
]  # fmt: skip


@pytest.mark.parametrize(("router", "options", "reason"), LEFT, ids=lambda each: str(each)[:40])
def test_what_is_left_alone_is_logged_with_the_reason_once(
    router: dict[str, Any], options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert type(layer_of(router_of(**router), **options).experts) is engine.OwnExperts
    lines = [line for line in caplog.messages if "stay vLLM's:" in line]
    assert len(lines) == 1 and NAME in lines[0] and reason in lines[0]


def test_a_class_of_experts_that_computes_otherwise_is_left_alone() -> None:
    loads = type("GptOssRoutedExperts", (engine.RoutedExperts,), {"weight_loader": print})
    computes = type("Other", (engine.RoutedExperts,), {"forward_modular": print})
    router = router_of("FusedTopKRouter")
    assert type(layer_of(router, kind=loads).experts) is not engine.OwnExperts
    assert type(layer_of(router, kind=computes).experts) is engine.OwnExperts


def test_the_weight_of_llama4_multiplies_the_input() -> None:
    router = router_of("CPURouter", topk=1, custom_routing_function=_llama4)
    layer = layer_of(router, apply_router_weight_on_input=True)
    rule = RoutingRule("sigmoid", select_on="logit", need_renorm=False)
    hidden, logits = inputs(4)
    want, _ = expected(layer, rule, 1, hidden, logits, doweight_stage1=True)
    torch.testing.assert_close(call(layer, hidden, logits), want, rtol=1e-4, atol=1e-4)


def align(
    ids: Tensor, block: int, experts: int, mask: Tensor | None
) -> tuple[list[int], list[int]]:
    """Sorted flat ids and the local expert of every block, -1 for those of other ranks."""
    flat, slots, owners, local = ids.flatten().tolist(), [], [], 0
    for expert in range(experts):
        here = mask is None or bool(mask[expert])
        entries = [index for index, each in enumerate(flat) if each == expert]
        padding = -len(entries) % block
        slots += entries + [len(flat)] * padding
        owners += [local if here else -1] * ((len(entries) + padding) // block)
        local += here
    return slots, owners


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "topk", "experts", "block"),
                         [(1, 1, 4, 16), (7, 3, 16, 16), (33, 8, 32, 32), (130, 4, 24, 64)])  # fmt: skip
def test_flat_ids_are_what_an_alignment_writes(
    tokens: int, topk: int, experts: int, block: int, masked: bool
) -> None:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    mask = (torch.arange(experts) % 3 == 1).int() if masked else None
    topk_out = (torch.empty(tokens, topk), torch.empty(tokens, topk, dtype=torch.int32))
    rule = RoutingRule("sigmoid")
    sorted_ids, _, owners, num_valid, _ = topk_routing_sorting(
        logits, topk, experts, 0, torch.float32, rule=rule, block_size=block, expert_mask=mask,
        topk_out=topk_out, id_format="flat",
    )  # fmt: skip
    slots, blocks = align(reference.topk_routing(logits, topk, rule=rule)[1], block, experts, mask)
    assert int(num_valid[0]) == len(slots)
    assert sorted_ids[: len(slots)].tolist() == slots
    assert owners[: len(blocks)].tolist() == blocks


HALF = torch.tensor([-1, 0, 1, -1, -1, 2, -1, 3, 4, 5, -1, -1, 6, -1, -1, 7], dtype=torch.int32)


@pytest.mark.parametrize("expert_map", [None, HALF], ids=["all", "half"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 40])
@pytest.mark.parametrize(("kind", "attributes", "rule"), [RULES[0], RULES[7]])
def test_vllm_s_triton_kernels_get_what_they_read(
    kind: str, attributes: dict[str, Any], rule: RoutingRule, tokens: int, expert_map: Tensor | None
) -> None:
    layer = layer_of(router_of(kind, topk=2, **attributes), "TRITON", expert_map=expert_map)
    assert layer.experts.taken.products == "triton"
    hidden, logits = inputs(tokens)
    want, ids = expected(layer, rule, 2, hidden, logits)
    replay = torch.zeros((64, 2), dtype=torch.int16)
    got = call(layer, hidden, logits, routing_replay_out=replay)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(replay[:tokens], ids.short())
    skipped = expert_map is None and tokens * 2 * 4 <= 16
    assert [each["sorted"] is None for each in engine.launches] == [skipped] * (2 * (tokens > 0))
    assert all(each["compute_type"] == "f32" for each in engine.launches)


@pytest.fixture
def rocm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for ROCm's aiter, which vLLM's experts call."""
    module = rocm_stand_in.load()
    monkeypatch.setattr(rocm_sort, "_found", None)
    monkeypatch.setattr(rocm_sort, "_import", lambda: module)
    monkeypatch.setattr(engine.AiterExperts, "rocm", module)
    yield module
    rocm_aiter.restore()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kind", "attributes", "rule"), [RULES[0], RULES[7]])
def test_rocm_s_products_get_our_launch_in_place_of_their_sort(
    kind: str, attributes: dict[str, Any], rule: RoutingRule, masked: bool, rocm: Any
) -> None:
    mask = torch.cat(((HALF >= 0).int(), torch.zeros(1, dtype=torch.int32)))  # NOTE: as vLLM's.
    options = {"expert_map": HALF, "expert_mask": mask} if masked else {}
    layer = layer_of(router_of(kind, **attributes), "AITER", **options)
    assert layer.experts.taken.products == "rocm"
    assert layer.expert_map is (mask if masked else None)
    hidden, logits = inputs(6)
    replay = torch.zeros((8, 3), dtype=torch.int16)
    got = call(layer, hidden, logits, routing_replay_out=replay)
    layer.experts.consumes_expert_mask = False
    want, ids = expected(layer, rule, 3, hidden, logits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(replay[:6], ids.short())
    assert len(rocm.seen) == 1 and not rocm.own_sorts


def test_other_calls_of_rocm_s_function_go_on_as_they_are(rocm: Any) -> None:
    layer_of(router_of("FusedTopKRouter"), "AITER")
    (hidden, logits), weights = inputs(4), torch.randn(16, 64, 64)
    rows, ids = reference.topk_routing(logits, 2)
    rocm.fused_moe(hidden, weights, weights[:, :, :32], rows, ids)
    assert len(rocm.own_sorts) == 1
    with pytest.raises(RuntimeError, match="expected one call of ROCm's"):
        with vllm_rocm.routed(logits, 2, RoutingRule(), None, (rows, ids)):
            pass
    with pytest.raises(ValueError, match="topk_weight: expected the tensor that was given"):
        with vllm_rocm.routed(logits, 2, RoutingRule(), None, (rows, ids)):
            rocm.fused_moe(hidden, weights, weights[:, :, :32], rows.clone(), ids)


def test_rocm_s_products_are_refused_by_the_adapter_s_sentence(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rocm_sort, "_found", None)
    layer = layer_of(router_of("FusedTopKRouter"), "AITER")
    assert type(layer.experts) is engine.OwnExperts
    assert f"stay vLLM's: {rocm_sort.available()}" in caplog.text


def test_biases_reach_both_products() -> None:
    torch.manual_seed(1)
    biases = {"w13_bias": torch.randn(16, 64), "w2_bias": torch.randn(16, 64)}
    hidden, logits = inputs(9)
    for backend in ("CPU", "TRITON"):
        layer = layer_of(router_of("FusedTopKRouter"), backend, **biases)
        want, _ = expected(
            layer,
            RoutingRule(),
            3,
            hidden,
            logits,
            bias1=biases["w13_bias"],
            bias2=biases["w2_bias"],
        )
        torch.testing.assert_close(call(layer, hidden, logits), want, rtol=1e-4, atol=1e-4)


def test_rows_of_padding_are_left_out() -> None:
    """On a GPU alone, so that the layer is told that it is on one."""
    layer = layer_of(router_of("FusedTopKRouter"), "TRITON")
    layer.experts.taken = layer.experts.taken._replace(skips_padding=True)
    hidden, logits = inputs(12)
    logits[7:], hidden[7:] = float("nan"), float("nan")
    engine.context.is_padding = torch.arange(20) >= 7
    replay = torch.full((12, 3), -1, dtype=torch.int16)
    got = call(layer, hidden, logits, routing_replay_out=replay)
    want, ids = expected(layer, RoutingRule(), 3, hidden[:7], logits[:7])
    torch.testing.assert_close(got[:7], want, rtol=1e-4, atol=1e-4)
    assert torch.equal(replay[:7], ids.short()) and not replay[7:].any()
    sorted_ids = engine.launches[0]["sorted"]
    assert not ((sorted_ids[: 16 * 16] >= 21) & (sorted_ids[: 16 * 16] < 36)).any()


@pytest.mark.parametrize(("value", "limit", "alpha", "beta"), [
    ("swigluoai_uninterleave", 7.0, 1.702, 1.0), ("swigluoai_uninterleave", 5.0, 1.702, 1.0),
    ("swigluoai_uninterleave", 5.0, 1.5, 0.5), ("silu", 2.0, 1.0, 0.0), ("gelu_tanh", None, 1.0, 0.0),
    ("gelu", None, 1.0, 0.0), ("silu", None, 1.0, 0.0), ("swigluoai", None, 1.0, 0.0),
])  # fmt: skip
def test_activations_are_vllm_s(
    value: str, limit: float | None, alpha: float, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SimpleNamespace(clamp_limit=limit, alpha=alpha, beta=beta)
    monkeypatch.setattr(vllm_layers, "settings_of", lambda method, layer: settings)
    router = router_of("FusedTopKRouter", topk=1)
    layer = layer_of(router, moe={"activation": SimpleNamespace(value=value)})
    hidden, logits = inputs(6)
    hidden *= 9
    best = logits.argmax(1)
    got = call(layer, hidden, logits)
    first = torch.einsum("td,tnd->tn", hidden, layer.w13_weight[best])
    gate, up = first.chunk(2, 1)
    if value == "swigluoai":
        (gate, up), (limit, alpha, beta) = (first[:, 0::2], first[:, 1::2]), (7.0, 1.702, 1.0)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    gate = {"gelu": torch.nn.functional.gelu,
            "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh")}.get(
                value, lambda x: x * torch.sigmoid(alpha * x))(gate)  # fmt: skip
    want = torch.einsum("ti,tdi->td", gate * (up + beta), layer.w2_weight[best])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_what_a_layer_was_not_taken_with_is_an_error() -> None:
    layer = layer_of(router_of("FusedTopKRouter"))
    hidden, logits = inputs(3)
    with pytest.raises(ValueError, match="e_score_correction_bias: expected none"):
        call(layer, hidden, logits, e_score_correction_bias=BIAS)
    with pytest.raises(ValueError, match="router_logits: expected 16 columns, got shape"):
        call(layer, hidden, logits[:, :8])
    with pytest.raises(ValueError, match="hash_indices_table: expected None"):
        call(layer, hidden, logits, hash_indices_table=BIAS)
    layer.own_map = HALF
    with pytest.raises(
        ValueError, match="expert_map: expected that of when the weights were loaded"
    ):
        call(layer, hidden, logits)


def test_compiled_models_are_kept_apart() -> None:
    layer_of(router_of("FusedTopKRouter"), moe={"is_lora_enabled": True})
    assert engine.config.additional_config == {}
    layer_of(router_of("FusedTopKRouter"))
    assert list(engine.config.additional_config) == ["aiter"]
    engine.config.additional_config = SimpleNamespace()
    assert type(layer_of(router_of("FusedTopKRouter")).experts) is engine.OwnExperts


def test_new_weights_of_a_running_server_keep_the_kernel() -> None:
    layer = layer_of(router_of("FusedTopKRouter"))
    engine.config.compilation_config.static_forward_context.clear()
    layer.method.process_weights_after_loading(layer)
    assert layer.method.moe_kernel.fused_experts is layer.experts


def test_register_may_be_called_again_and_leaves_the_name() -> None:
    plugin.register()
    method = engine.registry["UnquantizedFusedMoEMethod"]
    plugin.register()
    assert engine.registry == {"UnquantizedFusedMoEMethod": method}
    assert method.name == "unquantized_fused_moe"
    assert isinstance(engine.UnquantizedFusedMoEMethod(SimpleNamespace(backend="CPU")), method)


def test_the_switch_takes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AITER_VLLM", "0")
    plugin.register()
    assert not engine.registry and "nothing is taken, as AITER_VLLM=0" in caplog.text


def test_another_plugin_s_method_stays(caplog: pytest.LogCaptureFixture) -> None:
    engine.registry["UnquantizedFusedMoEMethod"] = engine.OwnExperts
    plugin.register()
    assert engine.registry["UnquantizedFusedMoEMethod"] is engine.OwnExperts
    assert "nothing is taken, as vllm_stand_in has replaced" in caplog.text


@pytest.mark.parametrize("change", ["apply", "gone"])
def test_an_unknown_version_is_left_alone_with_one_warning(
    change: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if change == "apply":
        monkeypatch.setattr(engine.FusedMoEExpertsMonolithic, "apply", lambda self, x, logits: x)
    else:
        del sys.modules[f"{engine.LAYERS}.modular_kernel"].FusedMoEActivationFormat  # type: ignore
    for _ in range(2):
        plugin.register()
    assert not engine.registry
    lines = [line for line in caplog.messages if "not known here" in line]
    assert len(lines) == 1
    assert ("takes self, x, logits" in lines[0]) == (change == "apply")


def test_an_unknown_triton_kernel_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module: Any = sys.modules[f"{engine.LAYERS}.fused_moe"]
    module.invoke_fused_moe_triton_kernel = lambda A, B, C: None
    layer = layer_of(router_of("FusedTopKRouter"), "TRITON")
    assert type(layer.experts) is engine.OwnExperts
    assert "takes A, B, C, and not A_scale" in caplog.text


def test_nothing_of_vllm_s_layers_is_imported_before_vllm_does(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = plugin.METHOD_MODULE
    kept: Any = sys.modules.pop(name)
    (tmp_path / "unquantized_fused_moe_method.py").write_text("from vllm_stand_in import *\n")
    sys.modules[engine.LAYERS].__path__ = [str(tmp_path)]  # type: ignore[attr-defined]
    plugin.register()
    plugin.register()
    assert name not in sys.modules and not engine.registry
    assert sum(isinstance(each, plugin._AfterImport) for each in sys.meta_path) == 1
    importlib.import_module(name)
    assert list(engine.registry) == [plugin.METHOD]
    assert not any(isinstance(each, plugin._AfterImport) for each in sys.meta_path)
    sys.modules[name] = kept
