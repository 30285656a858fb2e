"""What of vLLM do we use, and is it what we know?

Every name of vLLM that the plugin touches is looked up here, once, what is called has its parameters
checked, and a layer is asked for the attributes that are read of it: an engine that has moved on is left
alone, with a sentence that says what has changed, instead of failing while it loads or in the middle of
a forward. Known are 0.32, which runs in our tests, and 0.33 by its sources.

vLLM is imported by name, as it need not be there: nothing of it is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ..jit.paths import PACKAGE

LAYERS = "vllm.model_executor.layers.fused_moe"
METHOD_MODULE = f"{LAYERS}.unquantized_fused_moe_method"
METHOD = "UnquantizedFusedMoEMethod"

APPLY = (
    "hidden_states", "w1", "w2", "router_logits", "activation", "global_num_experts", "expert_map",
    "a1q_scale", "apply_router_weight_on_input", "e_score_correction_bias", "routing_replay_out",
)  # fmt: skip
AITER_APPLY = (
    "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation",
    "global_num_experts", "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2",
    "expert_tokens_meta", "apply_router_weight_on_input",
)  # fmt: skip
INVOKE = (
    "A", "B", "C", "A_scale", "B_scale", "topk_weights", "sorted_token_ids", "expert_ids",
    "num_tokens_post_padded", "mul_routed_weight", "top_k", "config", "compute_type", "use_fp8_w8a8",
    "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant", "block_shape", "B_bias",
)  # fmt: skip


OF_METHOD = ("moe", "moe_kernel", "unquantized_backend")
OF_LAYER = (
    "layer_name", "w13_weight", "expert_map", "expert_map_manager", "e_score_correction_bias",
    "apply_router_weight_on_input",
)  # fmt: skip
OF_CONFIG = ("activation", "num_experts", "dp_size", "pcp_size", "is_sequence_parallel")


class Unknown(Exception):
    """Something of vLLM's is not there, or not as we know it; the text says what."""


class Names(NamedTuple):
    """vLLM's names: modules, classes and functions, as vLLM calls them."""

    version: str
    CustomOp: Any
    op_registry_oot: dict[str, Any]
    UnquantizedFusedMoEMethod: Any
    FusedMoEExpertsMonolithic: Any
    FusedMoEActivationFormat: Any


class TritonNames(NamedTuple):
    """vLLM's Triton kernels for experts, and what it computes around them."""

    invoke_fused_moe_triton_kernel: Callable[..., None]
    try_get_optimal_moe_config: Callable[..., dict[str, int]]
    TritonExperts: Any
    tl: Any


def find() -> Names:
    """What the plugin itself needs; vLLM's unquantised MoE method has been imported, or is now.

    Raises:
        Unknown: a name is missing or has other parameters.
    """
    custom_op = _module("vllm.model_executor.custom_op")
    kernels = _module(f"{LAYERS}.modular_kernel")
    names = Names(
        str(getattr(_module("vllm"), "__version__", "of unknown version")),
        _name(custom_op, "CustomOp"),
        _name(custom_op, "op_registry_oot"),
        _name(_module(METHOD_MODULE), METHOD),
        _name(kernels, "FusedMoEExpertsMonolithic"),
        _name(kernels, "FusedMoEActivationFormat"),
    )
    experts, method = names.FusedMoEExpertsMonolithic, names.UnquantizedFusedMoEMethod
    _name(method, "name")
    _check(_name(names.CustomOp, "register_oot"), ("name",))
    _check(_name(method, "__init__"), ("moe",))
    _check(_name(method, "process_weights_after_loading"), ("layer",))
    _check(_name(experts, "__init__"), ("moe_config", "quant_config"))
    _check(_name(experts, "apply"), APPLY)
    _check(
        _name(experts, "is_supported_config"),
        ("moe_config", "weight_key", "activation_key", "activation_format"),
    )
    return names


def check_layer(method: Any, layer: Any) -> None:
    """Raises Unknown unless a method and its RoutedExperts have the attributes that we read."""
    _check_attributes(METHOD, method, OF_METHOD)
    _check_attributes("RoutedExperts", layer, OF_LAYER)
    _check_attributes("FusedMoEConfig", method.moe, OF_CONFIG)


def _check_attributes(kind: str, owner: Any, expected: Iterable[str]) -> None:
    for name in expected:
        if not hasattr(owner, name):
            raise Unknown(f"{kind} has no {name}")


def find_triton() -> TritonNames:
    """vLLM's Triton kernels.

    Raises:
        Unknown: a name is missing or has other parameters.
    """
    kernels = _module(f"{LAYERS}.fused_moe")
    experts = _module(f"{LAYERS}.experts.triton_moe")
    names = TritonNames(
        _name(kernels, "invoke_fused_moe_triton_kernel"),
        _name(kernels, "try_get_optimal_moe_config"),
        _name(experts, "TritonExperts"),
        _name(_module("vllm.triton_utils"), "tl"),
    )
    _check(names.invoke_fused_moe_triton_kernel, INVOKE)
    _check(names.try_get_optimal_moe_config, ("w1_shape", "w2_shape", "top_k", "dtype", "M"))
    _check(_name(names.TritonExperts, "activation"), ("activation", "output", "input"))
    _check(_name(names.TritonExperts, "moe_sum"), ("input", "output"))
    return names


def find_aiter_experts() -> Any:
    """vLLM's experts for ROCm's aiter, without quantisation.

    Raises:
        Unknown: they are not there or take other arguments.
    """
    experts = _name(_module(f"{LAYERS}.experts.rocm_aiter_moe"), "AiterExperts")
    _check(_name(experts, "apply"), AITER_APPLY)
    return experts


def activation_settings(moe_config: Any, quant_config: Any) -> Any:
    """vLLM's settings of a layer's activation: `clamp_limit`, `alpha`, `beta`."""
    settings = _name(_module(f"{LAYERS}.activation"), "ApplyMoEActivationConfig")
    return _name(settings, "from_configs")(moe_config, quant_config)


def runner_of(layer_name: str) -> Any:
    """The runner of a layer of the model that is being loaded, None where vLLM does not say."""
    return _config().compilation_config.static_forward_context.get(layer_name)


def mark_compiled(text: str) -> bool:
    """Makes vLLM keep the compiled model apart from those with other experts; whether it could.

    vLLM finds compiled models again by a hash of its configuration, and by the sources that were
    traced: those of the run that compiled, which without a plugin are none of the plugin's.
    `additional_config` is the part of the configuration that is there for others.
    """
    config = _config()
    if not isinstance(config.additional_config, dict):
        return False
    config.additional_config.setdefault(PACKAGE, text)
    return True


def _config() -> Any:
    return _name(_module("vllm.config"), "get_current_vllm_config")()


def padding_of() -> Any:
    """Which rows of the step that runs are padding, bool [rows] on the device; None for none."""
    context = _module("vllm.forward_context")
    if not context.is_forward_context_available():
        return None
    return getattr(context.get_forward_context(), "is_padding", None)


def skips_padding() -> bool:
    """Whether vLLM leaves out rows that it has marked as padding."""
    return bool(getattr(_module("vllm.envs"), "VLLM_MOE_SKIP_PADDING", False))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unknown(f"{name} cannot be imported ({error})") from error


def _name(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise Unknown(f"{owner.__name__} has no {name}") from None


def _check(function: Any, expected: Iterable[str]) -> None:
    """Raises unless a function takes arguments of these names."""
    known = inspect.signature(function).parameters
    missing = [name for name in expected if name not in known]
    if missing:
        raise Unknown(
            f"{function.__qualname__} takes {', '.join(known)}, and not {', '.join(missing)}"
        )
