"""A stand-in for the parts of vLLM that the plugin meets: its interfaces, and plain loops for kernels.

`install` puts modules of vLLM's names into `sys.modules` for a test. As in vLLM, a method's weights are
processed after loading, which builds a kernel around `experts_cls`, whose `apply` a layer calls with
its router's logits. The Triton kernel is a loop over blocks that reads exactly what vLLM's reads, writes
zeros for blocks of expert -1, and leaves alone what no block names; what it was given is in `launches`.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from aiter.integrations import vllm as plugin
from aiter.jit import log

BLOCK = 16
NAME = "model.layers.0.mlp.experts"
LAYERS = "vllm.model_executor.layers.fused_moe"

launches: list[dict[str, Any]] = []
registry: dict[str, Any] = {}
context = SimpleNamespace(is_padding=None)
envs = SimpleNamespace(VLLM_MOE_SKIP_PADDING=True)
config = SimpleNamespace(
    compilation_config=SimpleNamespace(static_forward_context={}), additional_config={}
)
Format = enum.Enum("Format", ["Standard", "BatchedExperts"])


class CustomOp:
    """Makes the registered class in place of its own."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(registry.get(cls.__name__, cls))

    @classmethod
    def register_oot(cls, _decorated_op_cls: Any = None, name: str | None = None) -> Any:
        def decorate(kind: Any) -> Any:
            assert name not in registry
            kind.name = name
            registry[name] = kind
            return kind

        return decorate


class FusedMoEExperts:
    consumes_expert_mask = False

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        self.moe_config, self.quant_config = moe_config, quant_config
        self.w1_bias, self.w2_bias = quant_config.w1_bias, quant_config.w2_bias

    @staticmethod
    def is_supported_config(
        cls: Any, moe_config: Any, weight_key: Any, activation_key: Any, activation_format: Any
    ) -> tuple[bool, str | None]:
        if not cls._supports_parallel_config(moe_config.moe_parallel_config):
            return False, "kernel does not support this parallel config"
        if not cls._supports_router_logits_dtype(moe_config.router_logits_dtype, None):
            return (
                False,
                f"kernel does not support router logits dtype {moe_config.router_logits_dtype}",
            )
        if moe_config.is_lora_enabled:
            return False, "kernel does not support LoRA"
        return activation_format is Format.Standard, None


class FusedMoEExpertsMonolithic(FusedMoEExperts):
    def apply(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        router_logits: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        apply_router_weight_on_input: bool,
        num_expert_group: int | None = None,
        e_score_correction_bias: Tensor | None = None,
        routed_scaling_factor: float | None = None,
        topk_group: int | None = None,
        routing_replay_out: Tensor | None = None,
    ) -> Tensor:
        raise NotImplementedError


class OwnExperts(FusedMoEExperts):
    """What vLLM would have taken."""


class UnquantizedFusedMoEMethod(CustomOp):
    name = "unquantized_fused_moe"

    def __init__(self, moe: Any) -> None:
        self.moe = moe
        self.moe_kernel: Any = None
        self.experts_cls: Any = OwnExperts
        self.unquantized_backend = SimpleNamespace(name=moe.backend)

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        return SimpleNamespace(
            w1_bias=getattr(layer, "w13_bias", None), w2_bias=getattr(layer, "w2_bias", None),
            config_name=lambda dtype: None,
        )  # fmt: skip

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.moe_kernel is None:
            quant_config = self.get_fused_moe_quant_config(layer)
            experts = self.experts_cls(moe_config=self.moe, quant_config=quant_config)
            self.moe_kernel = SimpleNamespace(fused_experts=experts)


class RoutedExperts:
    """A layer's weights and what its router shares with them."""

    def __init__(self, name: str, expert_map: Tensor | None, **attributes: Any) -> None:
        self.layer_name = name
        self.own_map, self.expert_mask = expert_map, None
        self.e_score_correction_bias = None
        self.apply_router_weight_on_input = False
        self.expert_map_manager = SimpleNamespace(num_fused_shared_experts=0)
        for key, value in attributes.items():
            setattr(self, key, value)

    @property
    def expert_map(self) -> Tensor | None:
        kernel = self.method.moe_kernel
        if kernel is not None and kernel.fused_experts.consumes_expert_mask:
            return self.expert_mask
        return self.own_map

    def forward(self) -> None: ...

    def forward_modular(self) -> None: ...

    def forward_monolithic(self) -> None: ...


class TritonExperts(FusedMoEExperts):
    def activation(self, activation: Any, output: Tensor, input: Tensor, **kwargs: Any) -> None:
        gate, up = input.chunk(2, dim=-1)
        output.copy_(F.silu(gate) * up)

    def moe_sum(self, input: Tensor, output: Tensor, *others: Any) -> None:
        output.copy_(input.sum(dim=1))


class AiterExperts(FusedMoEExperts):
    """As vLLM's, ends in one call of ROCm's `fused_moe`, most of it by position."""

    rocm: Any = None

    def apply(
        self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor,
        topk_ids: Tensor, activation: Any, global_num_experts: int, expert_map: Tensor | None,
        a1q_scale: None, a2_scale: None, workspace13: Tensor, workspace2: Tensor,
        expert_tokens_meta: None, apply_router_weight_on_input: bool,
    ) -> None:  # fmt: skip
        kind, quant = self.rocm.ActivationType.Silu, self.rocm.QuantType.No
        result = self.rocm.fused_moe(
            hidden_states, w1, w2, topk_weights, topk_ids, expert_map, kind, quant, False, None, None,
            a1q_scale, a2_scale, num_local_tokens=None, dtype=output.dtype,
        )  # fmt: skip
        output.set_(result)


def try_get_optimal_moe_config(
    w1_shape: Any, w2_shape: Any, top_k: int, dtype: str | None, M: int, block_shape: Any = None
) -> dict[str, int]:
    return {"BLOCK_SIZE_M": BLOCK}


def invoke_fused_moe_triton_kernel(
    A: Tensor, B: Tensor, C: Tensor, A_scale: None, B_scale: None, topk_weights: Tensor | None,
    sorted_token_ids: Tensor | None, expert_ids: Tensor, num_tokens_post_padded: Tensor,
    mul_routed_weight: bool, top_k: int, config: dict[str, Any], compute_type: Any,
    use_fp8_w8a8: bool, use_int8_w8a8: bool, use_int8_w8a16: bool, use_int4_w4a16: bool,
    per_channel_quant: bool, block_shape: Any = None, B_bias: Tensor | None = None,
) -> None:  # fmt: skip
    """C[row] of every row of a block: A[row // top_k] times the block's expert, weighted."""
    assert A_scale is None and B_scale is None and block_shape is None
    launches.append({"sorted": sorted_token_ids, "compute_type": compute_type})
    rows = A.shape[0] * top_k
    block, flat = config["BLOCK_SIZE_M"], C.view(-1, C.shape[-1])
    if sorted_token_ids is None:
        assert int(num_tokens_post_padded) >= rows * block
        blocks = [(slice(row, row + 1), int(expert_ids[row])) for row in range(rows)]
        order = torch.arange(rows)
    else:
        used = int(num_tokens_post_padded[0]) // block
        blocks = [(slice(i * block, (i + 1) * block), int(expert_ids[i])) for i in range(used)]
        order = sorted_token_ids
    for part, expert in blocks:
        ids = order[part].long()
        ids = ids[ids < rows]
        if expert == -1:
            flat[ids] = 0.0
            continue
        out = A[ids // top_k].float() @ B[expert].float().T
        if B_bias is not None:
            out += B_bias[expert].float()
        if mul_routed_weight:
            assert topk_weights is not None
            out *= topk_weights.view(-1)[ids, None]
        flat[ids] = out.to(C.dtype)


class ApplyMoEActivationConfig(SimpleNamespace):
    @classmethod
    def from_configs(cls, moe_config: Any, quant_config: Any) -> Any:
        return cls(clamp_limit=moe_config.swiglu_limit, alpha=1.0, beta=0.0)


def install() -> None:
    """Puts vLLM's modules in place, and forgets what an earlier test left."""
    launches.clear()
    registry.clear()
    context.is_padding = None
    config.compilation_config.static_forward_context.clear()
    config.additional_config = {}
    names = {
        "vllm": {"__version__": "0.32.0", "envs": envs},
        "vllm.envs": vars(envs),
        "vllm.config": {"get_current_vllm_config": lambda: config},
        "vllm.forward_context": {
            "is_forward_context_available": lambda: True, "get_forward_context": lambda: context,
        },
        "vllm.triton_utils": {"tl": SimpleNamespace(float32="f32", bfloat16="bf16")},
        "vllm.model_executor": {},
        "vllm.model_executor.custom_op": {"CustomOp": CustomOp, "op_registry_oot": registry},
        "vllm.model_executor.layers": {},
        LAYERS: {},
        f"{LAYERS}.activation": {"ApplyMoEActivationConfig": ApplyMoEActivationConfig},
        f"{LAYERS}.modular_kernel": {
            "FusedMoEExpertsMonolithic": FusedMoEExpertsMonolithic,
            "FusedMoEActivationFormat": Format,
        },
        f"{LAYERS}.unquantized_fused_moe_method": {
            "UnquantizedFusedMoEMethod": UnquantizedFusedMoEMethod,
        },
        f"{LAYERS}.fused_moe": {
            "invoke_fused_moe_triton_kernel": invoke_fused_moe_triton_kernel,
            "try_get_optimal_moe_config": try_get_optimal_moe_config,
        },
        f"{LAYERS}.experts": {},
        f"{LAYERS}.experts.rocm_aiter_moe": {"AiterExperts": AiterExperts},
        f"{LAYERS}.experts.triton_moe": {"TritonExperts": TritonExperts},
    }  # fmt: skip
    for name, attributes in names.items():
        module: Any = ModuleType(name)
        module.__path__ = []
        vars(module).update(attributes)
        sys.modules[name] = module


def remove() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


@contextmanager
def installed() -> Iterator[None]:
    kept = {name: sys.modules[name] for name in sys.modules if name.split(".")[0] == "vllm"}
    install()
    try:
        yield
    finally:
        remove()
        sys.modules.update(kept)


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log, "_said", set())
    monkeypatch.setenv("AITER_LOG_LEVEL", "INFO")
    monkeypatch.delenv("AITER_VLLM", raising=False)
    finders = list(sys.meta_path)
    with installed():
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
    layer = options.pop("kind", RoutedExperts)(
        NAME, expert_map, w13_weight=torch.randn(local, 2 * inter, width) / 8,
        w2_weight=torch.randn(local, width, inter) / 6,
        e_score_correction_bias=router.e_score_correction_bias, **options,
    )  # fmt: skip
    config.compilation_config.static_forward_context[NAME] = SimpleNamespace(router=router)
    plugin.register()
    layer.method = UnquantizedFusedMoEMethod(moe)
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


def inputs(tokens: int, experts: int = 16, width: int = 64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens)
    return torch.randn(tokens, width), torch.randn(tokens, experts)
