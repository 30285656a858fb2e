"""How does vLLM get the routing in one launch? By being installed beside it.

`register` is the plugin that vLLM calls in each of its processes (entry points of the group
`vllm.general_plugins`). It puts a subclass of vLLM's unquantised MoE method in its place, through
vLLM's own registry (`CustomOp.register_oot`). The subclass differs in one step: when the weights of a
layer have been loaded, it asks `vllm_layers` whether the layer's router has a rule and whose products
it gets, and has vLLM build its kernel around `vllm_experts` in place of the experts that take ids.
Everything else, weights, ranks, shared experts, reductions, stays vLLM's, and so does a layer that is
not taken, with a line in the log that says why.

Front-end processes load plugins, too, and never build a layer: nothing of vLLM's layers is imported
here, but the class is put in place as soon as vLLM itself has imported the method's module.

Rejected: deciding when the method is made, where vLLM's own backends are chosen: neither the layer nor
its router is known there. Replacing `RoutedExperts`, which holds the weights, or the runner, which
holds the router: both do much else that changes from version to version.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import logging
import sys
from typing import Any

from ..jit import envs
from ..jit.log import log_once
from ..jit.paths import PACKAGE
from . import vllm_names
from .vllm_names import METHOD, METHOD_MODULE, Names, Unknown


def register() -> None:
    """Has vLLM's unquantised MoE layers route in one launch, where they can; may be called again.

    AITER_VLLM=0 switches it off. An engine that is not known is left alone, with a warning.
    """
    if not envs.AITER_VLLM.get():
        log_once(f"vLLM: nothing is taken, as {envs.AITER_VLLM.name}=0")
        return
    if METHOD_MODULE in sys.modules:
        put_in_place()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `put_in_place` behind the first import of the method's module."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """The spec that others find, with one step more; None for every other module."""
        if fullname != METHOD_MODULE or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                # NOTE: not before, as whoever only looks for the module does not import it.
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                put_in_place()

            loader.exec_module = exec_module
        return spec


def put_in_place() -> None:
    """Registers our method with vLLM in place of its own."""
    try:
        names = vllm_names.find()
    except Unknown as why:
        _warn(f"vLLM: nothing is taken, as this version is not known here: {why}")
        return
    present = names.op_registry_oot.get(METHOD)
    if present is not None:
        if present.__module__ != __name__:
            _warn(f"vLLM: nothing is taken, as {present.__module__} has replaced {METHOD} already")
        return
    name = names.UnquantizedFusedMoEMethod.name
    method = make_method(names)
    names.CustomOp.register_oot(name=METHOD)(method)
    method.name = name  # NOTE: by which users of vLLM switch the op on and off.
    log_once(
        f"vLLM {names.version}: MoE layers without quantisation whose router has a rule route in one"
        " launch; all others stay vLLM's"
    )


def make_method(names: Names) -> Any:
    """vLLM's unquantised MoE method, which takes the layers that can be taken."""
    from .vllm_experts import make_experts
    from .vllm_layers import decide

    experts = make_experts(names)

    base: Any = names.UnquantizedFusedMoEMethod

    class OneLaunchMethod(base):  # type: ignore[misc]
        """vLLM's, but for the experts of layers that route in one launch."""

        def process_weights_after_loading(self, layer: Any) -> None:
            """As vLLM's; before the first time, decides who routes and multiplies."""
            # NOTE: there already where weights of a running server were replaced.
            if getattr(self, "moe_kernel", None) is not None:
                super().process_weights_after_loading(layer)
                return
            found = decide(experts, self, layer)
            where = f"vLLM: {getattr(layer, 'layer_name', 'a layer')} and layers like it"
            if isinstance(found, str):
                log_once(f"{where} stay vLLM's: {found}", found)
                super().process_weights_after_loading(layer)
                return
            self.experts_cls = experts
            super().process_weights_after_loading(layer)
            kernel: Any = self.moe_kernel
            kernel.fused_experts.take(found.taken, layer, found.products)
            log_once(f"{where} route in one launch: {found}", str(found))

    return OneLaunchMethod


def _warn(text: str) -> None:
    log_once(f"{text} ({PACKAGE})", level=logging.WARNING)
