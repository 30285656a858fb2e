"""Puts the stand-ins of SGLang, and the plugin, in place for a test; what tests of it have in common."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_standin as standin
import torch
from torch import Tensor

from aiter import RoutingRule
from aiter.integrations import sglang
from aiter.jit import log
from aiter.ops.topk_routing import topk_routing

EXPERTS, TOPK, TOKENS = 8, 2, 6
BIAS = torch.tensor([0.3, -0.2, 0.0, 0.1, 0.5, -0.4, 0.2, 0.0])


def in_place(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's stand-ins with the plugin in place, as SGLang does it; their state."""
    monkeypatch.delenv("AITER_SGLANG", raising=False)
    state = install(monkeypatch)
    sglang.register()
    standin.HookRegistry.apply_hooks()
    return state


def config(**fields: Any) -> standin.TopKConfig:
    return standin.TopKConfig(top_k=TOPK, **fields)


def inputs(rows: int = TOKENS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 16, generator=generator), torch.randn(
        rows, EXPERTS, generator=generator
    )


def bound(layer: Any, **fields: Any) -> standin.TopK:
    """The layer's top-k, bound to it, and the layer's weights processed, as SGLang does it."""
    topk = standin.TopK(top_k=TOPK, layer_id=0, **fields)
    topk.bind_runner_backend(layer.runner_backend)
    layer.quant_method.process_weights_after_loading(layer)
    return topk


def wanted(layer: Any, hidden: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """A plain loop over the experts that the layer has."""
    out = torch.zeros_like(hidden)
    first = layer.moe_ep_rank * layer.num_local_experts
    for row in range(hidden.shape[0]):
        for weight, expert in zip(weights[row], ids[row].tolist(), strict=True):
            if first <= expert < first + layer.num_local_experts:
                gate, up = (layer.w13_weight[expert - first] @ hidden[row]).chunk(2)
                out[row] += weight * (
                    layer.w2_weight[expert - first] @ (torch.nn.functional.silu(gate) * up)
                )
    return out


def routed(logits: Tensor, rule: RoutingRule | None = None, bias: Tensor | None = None) -> Any:
    weights = torch.empty(logits.shape[0], TOPK)
    ids = torch.empty(logits.shape[0], TOPK, dtype=torch.int32)
    topk_routing(weights, ids, logits, rule=rule, correction_bias=bias)
    return weights, ids


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def runner_config(**fields: Any) -> standin.MoeRunnerConfig:
    return standin.MoeRunnerConfig(EXPERTS, EXPERTS, TOPK, None, **fields)


def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts the stand-ins in place until the test ends; what they ask of is in the returned object."""
    standin.STATE.__dict__.clear()
    standin.STATE.__dict__.update(
        device="cpu", lora=False, a2a="none", remap=False, compiled=False, simulated=False, amx=False,
        recorder=standin.Noop(), captured=None, calls=[], down_config=None, tma=False,
        block_config={"BLOCK_SIZE_M": 16, "USE_TMA": True}, scale_in_topk=False,
    )  # fmt: skip
    monkeypatch.setitem(sglang._state, "registered", False)
    monkeypatch.setattr(log, "_said", set())
    monkeypatch.setattr(sglang, "_explained", set())
    standin.FACTORIES.clear()
    standin.HookRegistry.hooks.clear()
    for kind in (standin.UnquantizedFusedMoEMethod, standin.TopK):
        for name, value in vars(kind).items():
            if callable(value):
                monkeypatch.setattr(kind, name, value)  # NOTE: undoes the hooks at the end.
    for name, members in _modules().items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    return standin.STATE


def _modules() -> dict[str, dict[str, Any]]:
    """The modules below `sglang`, and the packages that they are in, with what is in them."""
    found: dict[str, dict[str, Any]] = {}
    for below, members in (_classes() | _functions(standin.STATE)).items():
        parts = ["sglang", "srt", *below.split(".")]
        for length in range(1, len(parts)):
            found.setdefault(".".join(parts[:length]), {})
        found.setdefault(".".join(parts), {}).update(members)
    return found


def _classes() -> dict[str, dict[str, Any]]:
    """What does not depend on the state."""
    runner = "layers.moe.moe_runner"
    return {
        "plugins.hook_registry": _named(standin.HookRegistry, standin.HookType),
        "layers.quantization.unquant": _named(standin.UnquantizedFusedMoEMethod),
        f"{runner}.base": _named(standin.DispatchMoeRunnerCore),
        f"{runner}.runner": _named(standin.MoeRunner, standin.register_moe_runner_core),
        f"{runner}.aiter": {
            "_aiter_activation": lambda config: f"ROCm's {config.activation}",
            "aiter_swiglu_oai_limit": lambda config: config.gemm1_clamp_limit,
            "_MOE_SORTING_DISPATCH_POLICY": 2,
        },
        "layers.moe.token_dispatcher.standard": {"StandardCombineInput": standin.Combine},
    }


def _functions(state: Any) -> dict[str, dict[str, Any]]:
    """What answers by the state."""

    def capture(topk_config: Any, layer_id: int, topk_ids: Tensor) -> None:
        if state.captured is not None:
            state.captured.append((layer_id, topk_ids))

    return {
        "layers.moe.topk": {
            **_named(standin.TopK, standin.TopKConfig),
            **_named(standin.TopKOutputChecker, standin.TopKOutputFormat),
            "is_routed_scaling_factor_fused_in_topk": lambda topk_config: state.scale_in_topk,
            "is_expert_remapping_enabled": lambda: state.remap,
            "routing_simulation_enabled": lambda: state.simulated,
            "capture_routed_experts_if_allowed": capture,
        },
        "layers.moe.utils": {
            **_named(standin.RegisteredMoeRunnerBackend),
            "get_moe_a2a_backend": lambda: SimpleNamespace(
                is_none=lambda: state.a2a == "none", value=state.a2a
            ),
        },
        "layers.moe.moe_runner.triton_utils.fused_moe": {
            "try_get_optimal_moe_config": standin.optimal_config,
            "get_config_dtype_str": lambda dtype: None,
            "_moe_support_tma": lambda: state.tma,
            "_fused_moe_kernel_sequence": standin.kernel_sequence,
        },
        "eplb.expert_distribution": {
            "_ExpertDistributionRecorderNoop": standin.Noop,
            "get_global_expert_distribution_recorder": lambda: state.recorder,
        },
        "state_capturer.routed_experts": {"get_global_experts_capturer": lambda: state.captured},
        "runtime_context": {
            "get_lora": lambda: SimpleNamespace(enable_lora=state.lora, lora_paths=None),
            "get_flags": lambda: SimpleNamespace(
                capture=SimpleNamespace(enable_torch_compile=state.compiled)
            ),
        },
        "utils": {
            "is_cuda": lambda: state.device == "cuda",
            "is_hip": lambda: state.device == "hip",
            "is_cpu": lambda: state.device == "cpu",
            "cpu_has_amx_support": lambda: state.amx,
        },
    }


def _named(*members: Any) -> dict[str, Any]:
    return {member.__name__: member for member in members}
