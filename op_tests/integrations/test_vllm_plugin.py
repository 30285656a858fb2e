"""What does the vLLM plugin leave alone, and does it say so; and how does it get into vLLM?

Against a stand-in (`vllm_stand_in.py`), as `test_vllm.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
import vllm_stand_in as engine
from vllm_stand_in import vllm  # noqa: F401

from aiter.integrations import vllm as plugin
from aiter.integrations import vllm_layers

GROUPS = {"num_expert_group": 4, "topk_group": 2}
BIAS = torch.linspace(-0.3, 0.4, 16)


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
        assert (
            type(engine.layer_of(engine.router_of(**router), **options).experts)
            is engine.OwnExperts
        )
    lines = [line for line in caplog.messages if "stay vLLM's:" in line]
    assert len(lines) == 1 and engine.NAME in lines[0] and reason in lines[0]


def test_a_class_of_experts_that_computes_otherwise_is_left_alone() -> None:
    loads = type("GptOssRoutedExperts", (engine.RoutedExperts,), {"weight_loader": print})
    computes = type("Other", (engine.RoutedExperts,), {"forward_modular": print})
    router = engine.router_of("FusedTopKRouter")
    assert type(engine.layer_of(router, kind=loads).experts) is not engine.OwnExperts
    assert type(engine.layer_of(router, kind=computes).experts) is engine.OwnExperts


def test_compiled_models_are_kept_apart() -> None:
    engine.layer_of(engine.router_of("FusedTopKRouter"), moe={"is_lora_enabled": True})
    assert engine.config.additional_config == {}
    engine.layer_of(engine.router_of("FusedTopKRouter"))
    assert list(engine.config.additional_config) == ["aiter"]
    engine.config.additional_config = SimpleNamespace()
    assert type(engine.layer_of(engine.router_of("FusedTopKRouter")).experts) is engine.OwnExperts


def test_new_weights_of_a_running_server_keep_the_kernel() -> None:
    layer = engine.layer_of(engine.router_of("FusedTopKRouter"))
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


@pytest.mark.parametrize("change", ["apply", "gone", "name"])
def test_an_unknown_version_is_left_alone_with_one_warning(
    change: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if change == "apply":
        monkeypatch.setattr(engine.FusedMoEExpertsMonolithic, "apply", lambda self, x, logits: x)
    elif change == "name":
        monkeypatch.delattr(engine.UnquantizedFusedMoEMethod, "name")
    else:
        del sys.modules[f"{engine.LAYERS}.modular_kernel"].FusedMoEActivationFormat  # type: ignore
    for _ in range(2):
        plugin.register()
    assert not engine.registry
    lines = [line for line in caplog.messages if "not known here" in line]
    assert len(lines) == 1
    assert ("takes self, x, logits" in lines[0]) == (change == "apply")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("RoutedExperts", "expert_map_manager"), ("RoutedExperts", "layer_name"),
     ("UnquantizedFusedMoEMethod", "unquantized_backend"), ("UnquantizedFusedMoEMethod", "moe"),
     ("FusedMoEConfig", "pcp_size"), ("FusedTopKRouter", "renormalize"), ("FusedTopKRouter", "top_k")],
)  # fmt: skip
def test_a_layer_without_an_attribute_that_is_read_is_left_alone(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a version of vLLM that calls it otherwise."""
    router = engine.router_of("FusedTopKRouter")
    decide = vllm_layers.decide
    where = "a layer" if name == "layer_name" else engine.NAME

    def without(experts: Any, method: Any, layer: Any) -> Any:
        owners = {
            "UnquantizedFusedMoEMethod": method, "RoutedExperts": layer,
            "FusedMoEConfig": method.moe, "FusedTopKRouter": router,
        }  # fmt: skip
        value = getattr(owners[kind], name)
        delattr(owners[kind], name)
        found = decide(experts, method, layer)
        if name != "layer_name":
            setattr(owners[kind], name, value)  # NOTE: for the stand-in's own way.
        return found

    monkeypatch.setattr(vllm_layers, "decide", without)
    assert type(engine.layer_of(router).experts) is engine.OwnExperts
    said = caplog.text.replace("object has no attribute '", "has no ")
    assert f"{where} and layers like it stay vLLM's:" in said and f"has no {name}" in said


def test_an_unknown_triton_kernel_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module: Any = sys.modules[f"{engine.LAYERS}.fused_moe"]
    module.invoke_fused_moe_triton_kernel = lambda A, B, C: None
    layer = engine.layer_of(engine.router_of("FusedTopKRouter"), "TRITON")
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
    assert importlib.util.find_spec(name) is not None and not engine.registry  # only looks
    importlib.import_module(name)
    assert list(engine.registry) == [plugin.METHOD]
    assert not any(isinstance(each, plugin._AfterImport) for each in sys.meta_path)
    sys.modules[name] = kept
