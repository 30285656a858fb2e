"""Is the plugin of SGLang put in place once, switched off, and loud where SGLang only logs?"""

from __future__ import annotations

import sys
from typing import Any

import _checkout  # noqa: F401
import pytest
import sglang_standin as standin
from sglang_in_place import bound, in_place, inputs, install

from aiter.integrations import sglang


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Any:
    return in_place(monkeypatch)


def test_registering_twice_registers_once(state: Any) -> None:
    before = len(standin.HookRegistry.hooks)
    sglang.register()
    assert before == len(standin.HookRegistry.hooks) == len(sglang.HOOKS)


def test_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setenv("AITER_SGLANG", "0")
    sglang.register()
    assert not standin.HookRegistry.hooks and not standin.FACTORIES


def _no_function(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    module, name = f"sglang.srt.{path}".rsplit(".", 1)
    monkeypatch.delattr(sys.modules[module], name)


def test_another_sglang_is_refused_before_anything_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch)
    _no_function(monkeypatch, "layers.moe.topk.routing_simulation_enabled")
    monkeypatch.delenv("AITER_SGLANG", raising=False)
    with pytest.raises(
        RuntimeError, match=r"expected sglang.srt.layers.moe.topk.routing_simulation"
    ):
        sglang.register()
    assert not standin.HookRegistry.hooks and not standin.FACTORIES
    assert "SGLang is not served by this plugin" in caplog.text
    monkeypatch.setenv("AITER_SGLANG", "1")
    with pytest.raises(SystemExit, match="AITER_SGLANG=1"):
        sglang.register()


@pytest.mark.parametrize(
    "changed",
    [
        lambda topk_config, layer_id, topk_ids, fast: None,  # needs one more
        lambda topk_config, topk_ids: None,  # has one less
        lambda layer_id, topk_config, topk_ids: None,  # in another order
    ],
)
def test_parameters_are_compared(monkeypatch: pytest.MonkeyPatch, changed: Any) -> None:
    install(monkeypatch)
    path, module = "capture_routed_experts_if_allowed", sys.modules["sglang.srt.layers.moe.topk"]
    used = {f"layers.moe.topk.{path}": ("topk_config", "layer_id", "topk_ids")}
    sglang.check_used(used)
    newer = lambda topk_config, layer_id, topk_ids, more=0, *rest, **named: None  # noqa: E731
    monkeypatch.setattr(module, path, newer)
    sglang.check_used(used)
    monkeypatch.setattr(module, path, changed)
    with pytest.raises(
        RuntimeError, match=f"{path}: expected the parameters topk_config, layer_id"
    ):
        sglang.check_used(used)


def test_a_hook_that_sglang_did_not_apply_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.delenv("AITER_SGLANG", raising=False)
    sglang.register()
    standin.HookRegistry.hooks[:] = [
        hook for hook in standin.HookRegistry.hooks if not hook[0].endswith("bind_runner_backend")
    ]
    standin.HookRegistry.apply_hooks()
    with pytest.raises(RuntimeError, match=r"no hook to layers.moe.topk.TopK.bind_runner_backend"):
        standin.FusedMoE()


def test_a_failure_in_a_forward_is_raised(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = standin.FusedMoE()
    topk = bound(layer)
    hidden, logits = inputs()
    choice = topk.forward_native(hidden, logits[:, :5])
    with pytest.raises(ValueError, match="expected"):
        layer(hidden, choice)
    with pytest.raises(TypeError, match="topk_output: expected a bypassed or a standard one"):
        layer(hidden, object())
