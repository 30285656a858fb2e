"""Is the plugin of SGLang put in place once, switched off, and loud where SGLang only logs?"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import _checkout  # noqa: F401
import pytest
import sglang_standin as standin
from sglang_in_place import bound, in_place, inputs, install

from aiter.integrations import sglang, sglang_runner


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


def _module_of(node: ast.expr, modules: dict[str, str]) -> str | None:
    """The module of SGLang's that an expression is, by `srt("...")` or a name of it."""
    if isinstance(node, ast.Name):
        return modules.get(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "srt":
        return node.args[0].value if isinstance(node.args[0], ast.Constant) else None
    return None


def _called(function: ast.FunctionDef) -> Iterator[str]:
    """What a function calls of SGLang's modules, by its path."""
    modules: dict[str, str] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            (target,), value = node.targets, node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            for name, each in pairs:
                found = _module_of(each, {})
                if isinstance(name, ast.Name) and found is not None:
                    modules[name.id] = found
    for node in ast.walk(function):
        path, place = [], node.func if isinstance(node, ast.Call) else None
        while isinstance(place, ast.Attribute):
            path.insert(0, place.attr)
            place = place.value
        module = _module_of(place, modules) if place is not None else None
        if path and module is not None:
            yield ".".join((module, *path))


def test_whatever_is_called_is_checked_before() -> None:
    """By USED; `register` of a core is the abstract class's own, as Python has it."""
    called = set()
    for module in (sglang, sglang_runner):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef):
                called |= set(_called(node))
    called.remove("layers.moe.moe_runner.base.DispatchMoeRunnerCore.register")
    assert len(called) > 15 and called <= set(sglang.USED), called - set(sglang.USED)


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
