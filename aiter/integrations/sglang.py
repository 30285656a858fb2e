"""How does SGLang come to route through one launch? By a plugin that it finds when it starts.

`register` is the function of the entry point group `sglang.srt.plugins`: installing this package is all
there is to do, and AITER_SGLANG=0 switches it off. SGLang calls it in its main, scheduler and
detokenizer processes. Five hooks, each around a method of SGLang's, and one runner core
(`sglang_runner.Runner`) are put in place:

    UnquantizedFusedMoEMethod.create_moe_runner             takes a layer, or says why not
    UnquantizedFusedMoEMethod.process_weights_after_loading mask and build, ahead of any graph
    UnquantizedFusedMoEMethod.apply                         the CPU's way to the runner
    TopK.bind_runner_backend                                the layer's rule; its top-k is bypassed
    TopK.forward_native                                     the CPU's way around the top-k

A layer and its top-k know nothing of each other in SGLang, but that the top-k is handed the backend of
the layer's runner. So every taken layer has a backend object of its own that leads to its `Taken`.
`--moe-runner-backend` stays `auto`: a name of ours there would also be taken up by fp8 layers, whose
runner this is not.

SGLang logs the failure of a plugin or a hook, and serves without. So what the hooks rely on is checked
before any is registered: each method and function that is replaced or called, by its parameters. A
layer is taken only while all five hooks are in place, and what fails later, fails in SGLang's own call
and is raised. With AITER_SGLANG=1 the process ends where the plugin cannot be put in place.

Rejected: our core under the name `triton`, which fp8 layers use as well, and SGLang asks its table of
fused functions before any core; replacing the classes, which two plugins cannot do at once; finding the
top-k of a layer by its number, which a draft model's layers have, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..jit import envs
from ..jit.log import get_logger, log_once
from ..ops.rule import RoutingRule
from .sglang_rules import activation_of, check_experts, rule_of
from .sglang_runner import STATE, UNUSED_FLAGS, UNUSED_TENSORS, Runner, Taken, srt

_METHOD = "layers.quantization.unquant.UnquantizedFusedMoEMethod"
_TOPK = "layers.moe.topk.TopK"
_EXPERTS = "layers.moe.moe_runner.triton_utils.fused_moe"

USED: dict[str, tuple[str, ...]] = {
    f"{_METHOD}.create_moe_runner": ("self", "layer", "moe_runner_config"),
    f"{_METHOD}.process_weights_after_loading": ("self", "layer"),
    f"{_METHOD}.apply": ("self", "layer", "dispatch_output"),
    f"{_METHOD}.get_triton_quant_info": ("self", "layer"),
    f"{_METHOD}.get_moe_runner_backend": ("self", "layer"),
    f"{_TOPK}.bind_runner_backend": ("self", "runner_backend"),
    f"{_TOPK}.forward_native": ("self", "hidden_states", "router_logits"),
    f"{_TOPK}.forward_cuda": ("self", "hidden_states", "router_logits"),
    "layers.moe.topk.is_routed_scaling_factor_fused_in_topk": ("topk_config",),
    "layers.moe.topk.is_expert_remapping_enabled": (),
    "layers.moe.topk.routing_simulation_enabled": (),
    "layers.moe.topk.capture_routed_experts_if_allowed": ("topk_config", "layer_id", "topk_ids"),
    "layers.moe.topk.TopKOutputChecker.format_is_bypassed": ("topk_output",),
    "layers.moe.topk.TopKOutputChecker.format_is_standard": ("topk_output",),
    "layers.moe.token_dispatcher.standard.StandardCombineInput": ("hidden_states",),
    "layers.moe.utils.RegisteredMoeRunnerBackend": ("value",),
    "layers.moe.utils.get_moe_a2a_backend": (),
    "layers.moe.moe_runner.base.DispatchMoeRunnerCore": ("config",),
    "layers.moe.moe_runner.runner.MoeRunner": ("runner_backend", "config"),
    "layers.moe.moe_runner.runner.register_moe_runner_core": ("backend_name", "factory"),
    "plugins.hook_registry.HookRegistry.register": ("target", "hook", "hook_type"),
    "runtime_context.get_flags": (),
    "runtime_context.get_lora": (),
    "utils.cpu_has_amx_support": (),
    "utils.is_cpu": (),
    "utils.is_cuda": (),
    "utils.is_hip": (),
    "eplb.expert_distribution.get_global_expert_distribution_recorder": (),
    "state_capturer.routed_experts.get_global_experts_capturer": (),
    "layers.moe.moe_runner.aiter._aiter_activation": ("config",),
    "layers.moe.moe_runner.aiter.aiter_swiglu_oai_limit": ("config",),
    f"{_EXPERTS}.try_get_optimal_moe_config": (
        "w1_shape", "w2_shape", "top_k", "dtype", "M", "return_down_config",
    ),
    f"{_EXPERTS}.get_config_dtype_str": ("dtype",),
    f"{_EXPERTS}._moe_support_tma": (),
    f"{_EXPERTS}._fused_moe_kernel_sequence": (
        "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "sorted_token_ids", "expert_ids",
        "num_tokens_post_padded", "config", "down_config", "down_moe_use_tma", "up_moe_use_tma",
        *UNUSED_FLAGS, *UNUSED_TENSORS, "b1", "b2", "activation", "is_gated", "inplace",
        "routed_scaling_factor", "gemm1_alpha", "gemm1_limit", "filter_expert",
        "gate_up_interleaved",
    ),
}  # fmt: skip
"""What we replace or call, below `sglang.srt`, and the parameters that we give it, in order as far as
they are positional. What else it has must have a default."""

_explained: set[str] = set()  # backends whose layers `create_moe_runner` has explained
_state = {"registered": False}


def register() -> None:
    """Puts the plugin in place in this process; a second call does nothing.

    Raises:
        RuntimeError: this SGLang is not one that we know how to serve; what differs. SGLang logs it.
        SystemExit: the same, with AITER_SGLANG=1.
    """
    wanted = envs.AITER_SGLANG.get()
    if wanted is False or _state["registered"]:
        return
    try:
        check_used(USED)
        _put_in_place()
    except Exception as error:
        message = f"SGLang is not served by this plugin: {error}"
        get_logger().error(message)
        if wanted:
            # NOTE: no Exception, which SGLang would log and go on.
            raise SystemExit(f"{message} (AITER_SGLANG=1)") from error
        raise RuntimeError(message) from error
    _state["registered"] = True


def check_used(used: dict[str, tuple[str, ...]]) -> None:
    """Raises RuntimeError unless SGLang has all of these, with these parameters."""
    for path, given in used.items():
        function = _resolve(path)
        if function is None:
            raise RuntimeError(f"expected sglang.srt.{path}, found none in SGLang {_version()}")
        parameters = inspect.signature(function).parameters
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = {
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty and parameter.kind not in several
        }
        positional = [
            name
            for name, parameter in parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name in needed
        ]
        if (
            not needed <= set(given) <= set(parameters)
            or [name for name in given if name in positional] != positional
        ):
            raise RuntimeError(
                f"sglang.srt.{path}: expected the parameters {', '.join(given) or 'none'}, got"
                f" {', '.join(parameters) or 'none'} in SGLang {_version()}"
            )


def _put_in_place() -> None:
    registry = srt("plugins.hook_registry")
    srt("layers.moe.moe_runner.base").DispatchMoeRunnerCore.register(Runner)
    srt("layers.moe.moe_runner.runner").register_moe_runner_core(STATE, Runner)
    for path, hook in HOOKS.items():
        registry.HookRegistry.register(f"sglang.srt.{path}", hook, registry.HookType.AROUND)


def _create_moe_runner(original: Any, self: Any, layer: Any, moe_runner_config: Any) -> None:
    """Takes the layer where it can be taken; else it has what SGLang gave it."""
    original(self, layer, moe_runner_config)
    if type(self) is not srt("layers.quantization.unquant").UnquantizedFusedMoEMethod:
        return
    _check_hooks()
    sglang_runner = self._aiter_runner or self.runner
    try:
        products = products_of(self, layer, moe_runner_config)
    except ValueError as reason:
        _explained.add(str(sglang_runner.runner_backend.value))
        log_once(f"{_name(moe_runner_config)}: left to SGLang: {reason}")
        return
    taken = Taken(layer, products, sglang_runner)
    setattr(layer, STATE, taken)
    runner = srt("layers.moe.moe_runner.runner").MoeRunner(_backend(taken), moe_runner_config)
    if products == "rocm":
        self._aiter_runner = runner
    else:
        self.runner = runner


def products_of(method: Any, layer: Any, config: Any) -> str:
    """Which products a layer gets: "own", "triton" or "rocm".

    Args:
        method: SGLang's `UnquantizedFusedMoEMethod`, its own runner made.
        layer: the `FusedMoE` that has it.
        config: the layer's `MoeRunnerConfig`.

    Raises:
        ValueError: the layer is SGLang's; the reason.
    """
    context, moe, utils = srt("runtime_context"), srt("layers.moe.utils"), srt("utils")
    if layer.quant_method is not method:
        raise ValueError(f"its experts are wrapped, by {type(layer.quant_method).__name__}")
    if context.get_lora().enable_lora or context.get_lora().lora_paths:
        raise ValueError("LoRA is on")
    if not moe.get_moe_a2a_backend().is_none():
        raise ValueError(f"--moe-a2a-backend {moe.get_moe_a2a_backend().value}")
    if srt("layers.moe.topk").is_expert_remapping_enabled():
        raise ValueError("experts are moved between places (EPLB)")
    if getattr(layer, "_expert_storage_rank", layer.moe_ep_rank) != layer.moe_ep_rank:
        raise ValueError("ranks join while it serves")
    if context.get_flags().capture.enable_torch_compile:
        raise ValueError("--enable-torch-compile, which replaces the layer's forward")
    check_experts(config)
    if method._aiter_runner is not None:
        return _rocm_products(config)
    if not method.runner.runner_backend.is_triton():
        raise ValueError(f"its runner is {method.runner.runner_backend.value}")
    if utils.is_cuda() or utils.is_hip():
        return "triton"
    if not utils.is_cpu():
        raise ValueError("the device is neither a GPU of CUDA or HIP nor the CPU")
    if utils.cpu_has_amx_support():
        raise ValueError("the CPU has AMX, for which SGLang packs the weights")
    activation_of(config)
    return "own"


def _rocm_products(config: Any) -> str:
    missing = import_module(".rocm_aiter", __package__).available()
    if missing is not None:
        raise ValueError(f"SGLANG_USE_AITER=1, and {missing}")
    swiglu = srt("layers.moe.moe_runner.aiter").aiter_swiglu_oai_limit(config)
    if swiglu is not None or config.activation == "situ":
        raise ValueError(f"activation={config.activation!r} in ROCm's products")
    return "rocm"


def _process_weights(original: Any, self: Any, layer: Any) -> None:
    original(self, layer)
    taken = _taken_by(self, layer)
    if taken is not None:
        taken.prepare(layer.w13_weight.device)


def _apply(original: Any, self: Any, layer: Any, dispatch_output: Any) -> Any:
    """On the CPU SGLang's forward has no runner; on GPUs it ends there by itself."""
    taken = _taken_by(self, layer)
    if taken is None or taken.products != "own":
        return original(self, layer, dispatch_output)
    return self.runner.run(dispatch_output, self.get_triton_quant_info(layer))


def _bind_runner_backend(original: Any, self: Any, runner_backend: Any, **more: Any) -> None:
    """Remembers the rule with the layer, and lets its logits through."""
    original(self, runner_backend, **more)
    taken: Taken | None = getattr(runner_backend, STATE, None)
    topk, config = srt("layers.moe.topk"), self.topk_config
    if taken is None:
        backend = getattr(runner_backend, "value", None)
        if backend is not None and backend not in _explained:
            log_once(
                f"layers whose runner is {backend}: left to SGLang: they are quantised or not FusedMoE"
            )
        return
    name = _name(taken.sglang_runner.config)
    standard = topk.TopKOutputFormat.STANDARD
    try:
        if self.enable_waterfill:
            raise ValueError("its shared experts are spread by Waterfill")
        if topk.routing_simulation_enabled():
            raise ValueError("the choice is simulated")
        if config.output_format not in (standard, topk.TopKOutputFormat.BYPASSED):
            raise ValueError(f"its top-k is handed on as {config.output_format.name}")
        rule = rule_of(config, topk.is_routed_scaling_factor_fused_in_topk(config))
    except (ValueError, TypeError) as reason:
        experts = "ours" if taken.products == "own" else "SGLang's"
        log_once(f"{name}: SGLang chooses, the experts are {experts}: {reason}")
        return
    taken.bind(rule)
    config.output_format = topk.TopKOutputFormat.BYPASSED
    log_once(f"{name}: one launch by {_described(rule)}; products: {_PRODUCTS[taken.products]}")


def _forward_native(original: Any, self: Any, *arguments: Any, **more: Any) -> Any:
    """SGLang's plain PyTorch path has no bypassed top-k; its GPU path makes one of any tensors."""
    backend = self.topk_config.runner_backend
    bypassed = srt("layers.moe.topk").TopKOutputFormat.BYPASSED
    if hasattr(backend, STATE) and self.topk_config.output_format == bypassed:
        return self.forward_cuda(*arguments, **more)
    return original(self, *arguments, **more)


HOOKS: dict[str, Callable[..., Any]] = {
    f"{_METHOD}.create_moe_runner": _create_moe_runner,
    f"{_METHOD}.process_weights_after_loading": _process_weights,
    f"{_METHOD}.apply": _apply,
    f"{_TOPK}.bind_runner_backend": _bind_runner_backend,
    f"{_TOPK}.forward_native": _forward_native,
}

_PRODUCTS = {
    "own": "ours, on the CPU",
    "triton": "SGLang's Triton experts",
    "rocm": "those of ROCm's aiter",
}


def _check_hooks() -> None:
    """Raises RuntimeError unless SGLang has applied all hooks; it only logs one that it could not."""
    missing = [path for path, hook in HOOKS.items() if hook not in _hooks_of(_resolve(path))]
    if missing:
        raise RuntimeError(
            f"SGLang applied no hook to {', '.join(missing)}; its log says why (AITER_SGLANG=0 serves"
            " without this plugin)"
        )


def _hooks_of(function: Any) -> Iterable[Any]:
    """What a function's wrappers close over."""
    while function is not None:
        for cell in getattr(function, "__closure__", None) or ():
            yield cell.cell_contents
        function = getattr(function, "__wrapped__", None)


def _backend(taken: Taken) -> Any:
    """A backend of SGLang's kind, one per layer, that leads to its `Taken`."""
    base = srt("layers.moe.utils").RegisteredMoeRunnerBackend
    # NOTE: for ROCm's products SGLang's dispatcher keeps global ids and makes a mask, as it does there.
    rocm = taken.products == "rocm"
    kind: Any = type("RoutedBackend", (base,), {"is_aiter": lambda self: rocm, STATE: taken})
    return kind(STATE)


def _taken_by(method: Any, layer: Any) -> Taken | None:
    taken: Taken | None = getattr(layer, STATE, None)
    return taken if taken is not None and layer.quant_method is method else None


def _resolve(path: str) -> Any:
    """What is at `path` below `sglang.srt`; None where nothing is."""
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found: Any = srt(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part, None)
        return found
    return None


def _version() -> str:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return "(of unknown version)"


def _described(rule: RoutingRule) -> str:
    """The rule by what differs from plain softmax."""
    plain = RoutingRule()
    differing = (
        f"{field.name}={getattr(rule, field.name)!r}"
        for field in fields(rule)
        if getattr(rule, field.name) != getattr(plain, field.name)
    )
    return f"RoutingRule({', '.join(differing)})"


def _name(config: Any) -> str:
    return f"SGLang layers of {config.num_experts} experts, top-{config.top_k}"
