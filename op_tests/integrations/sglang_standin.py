"""The few classes of SGLang 0.5.23 that the plugin meets, small and written anew, for tests without it.

`sglang_in_place.install` puts them below `sglang.srt` in `sys.modules`; STATE is what tests ask of them.
They keep what is easily got wrong: a dispatcher that maps only standard ids to local ones; Triton
experts that read every slot of a row and leave slots without an entry as they were in memory (NaN
here); a choice that SGLang rebuilds without score and groups; hooks whose failure is only logged.
"""

from __future__ import annotations

import functools
import sys
from abc import ABC
from dataclasses import dataclass
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class TopKOutputFormat(IntEnum):
    STANDARD = 1
    TRITON_KERNEL = 2
    BYPASSED = 3


@dataclass
class TopKConfig:
    top_k: int
    use_grouped_topk: bool = False
    topk_group: int | None = None
    num_expert_group: int | None = None
    renormalize: bool = True
    custom_routing_function: Any = None
    correction_bias: Tensor | None = None
    routed_scaling_factor: float | None = None
    apply_routed_scaling_factor_on_output: bool = False
    output_format: Any = None
    runner_backend: Any = None
    scoring_func: str = "softmax"
    layer_id: int | None = None
    shared_experts: Any = None

    @property
    def num_shared_topk_slots(self) -> int:
        return self.shared_experts or 0


class Standard(NamedTuple):
    topk_weights: Tensor
    topk_ids: Tensor
    router_logits: Tensor


class Bypassed(NamedTuple):
    hidden_states: Tensor
    raw_router_logits: Tensor
    topk_config: TopKConfig
    num_token_non_padded: Tensor | None = None
    expert_location_dispatch_info: Any = None

    @property
    def router_logits(self) -> Tensor:
        if self.expert_location_dispatch_info is not None:
            raise NotImplementedError("experts have moved")
        return self.raw_router_logits

    def to_standard(self, layer_id: int | None = None) -> Standard:
        return select_experts(
            self.raw_router_logits, self.topk_config, self.expert_location_dispatch_info
        )


class TopKOutputChecker:
    @staticmethod
    def format_is_bypassed(topk_output: Any) -> bool:
        return isinstance(topk_output, Bypassed)

    @staticmethod
    def format_is_standard(topk_output: Any) -> bool:
        return isinstance(topk_output, Standard)


def select_experts(logits: Tensor, config: TopKConfig, moved: Tensor | None = None) -> Standard:
    """The choice of ungrouped softmax; `moved` maps ids to the places of experts."""
    assert config.scoring_func == "softmax" and not config.use_grouped_topk
    if config.custom_routing_function is not None:
        weights, ids = config.custom_routing_function(logits, config.top_k)
    else:
        weights, ids = torch.topk(logits.float().softmax(-1), config.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
    return Standard(weights, (ids if moved is None else moved[ids]).int(), logits)


class TopK:
    def __init__(self, moved: Any = None, rows: Tensor | None = None, **fields: Any) -> None:
        self.topk_config = TopKConfig(**fields)
        self.enable_waterfill = False
        self.moved, self.rows = moved, rows

    def bind_runner_backend(self, runner_backend: Any, *, routing_method_type: Any = None) -> None:
        self.topk_config.runner_backend = runner_backend
        if self.topk_config.output_format is None:
            self.topk_config.output_format = TopKOutputFormat.STANDARD

    def forward_native(self, hidden_states: Tensor, router_logits: Tensor) -> Any:
        return select_experts(router_logits, self.topk_config, self.moved)

    def forward_cuda(self, hidden_states: Tensor, router_logits: Tensor) -> Any:
        if self.topk_config.output_format == TopKOutputFormat.BYPASSED:
            return Bypassed(hidden_states, router_logits, self.topk_config, self.rows, self.moved)
        return self.forward_native(hidden_states, router_logits)


class Predicates:
    value: str

    def is_triton(self) -> bool:
        return self.value == "triton"

    def is_aiter(self) -> bool:
        return self.value == "aiter"


class MoeRunnerBackend(Predicates, Enum):
    TRITON = "triton"
    AITER = "aiter"
    DEEP_GEMM = "deep_gemm"


@dataclass(frozen=True)
class RegisteredMoeRunnerBackend(Predicates):
    value: str


@dataclass
class MoeRunnerConfig:
    num_experts: int
    num_local_experts: int
    top_k: int
    layer: Any
    layer_id: int = 0
    num_fused_shared_experts: int = 0
    runner_backend: Any = None
    activation: str = "silu"
    is_gated: bool = True
    apply_router_weight_on_input: bool = False
    inplace: bool = True
    no_combine: bool = False
    routed_scaling_factor: float | None = None
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None
    swiglu_limit: float | None = None
    gate_up_interleaved: bool = True


class DispatchMoeRunnerCore(ABC):  # noqa: B024
    """What SGLang asks a core to be an instance of."""

    def __init__(self, config: MoeRunnerConfig) -> None:
        self.config = config


FACTORIES: dict[str, Any] = {}


def register_moe_runner_core(backend_name: str, factory: Any) -> None:
    if backend_name in FACTORIES:
        raise ValueError(f"{backend_name} is already registered")
    FACTORIES[backend_name] = factory


class MoeRunner:
    """Runs a registered core; SGLang's own runner writes down what it was given."""

    def __init__(self, runner_backend: Any, config: MoeRunnerConfig) -> None:
        self.runner_backend, self.config = runner_backend, config
        factory = FACTORIES.get(runner_backend.value)
        self.runner_core = factory(config) if factory else None
        self.given: list[Any] = []

    def run(self, dispatch_output: Any, quant_info: Any) -> Any:
        if self.runner_core is None:
            self.given.append((dispatch_output.topk_output, quant_info))
            return Combine(dispatch_output.hidden_states)
        assert isinstance(self.runner_core, DispatchMoeRunnerCore)
        return self.runner_core.run_from_dispatch(
            dispatch_output, quant_info, self.config, hooks=None
        )


class Combine(NamedTuple):
    hidden_states: Tensor


class Dispatch(NamedTuple):
    hidden_states: Tensor
    topk_output: Any


@dataclass
class QuantInfo:
    w13_weight: Tensor
    w2_weight: Tensor
    b13: Tensor | None = None
    b2: Tensor | None = None
    expert_mask: Tensor | None = None


class UnquantizedFusedMoEMethod:
    def __init__(self) -> None:
        self.runner: Any = None
        self._aiter_runner: Any = None
        self.backend = MoeRunnerBackend.TRITON
        self.use_aiter = False

    def create_moe_runner(self, layer: Any, moe_runner_config: MoeRunnerConfig) -> None:
        self.runner = MoeRunner(self.backend, moe_runner_config)
        if self.use_aiter:
            self._aiter_runner = MoeRunner(MoeRunnerBackend.AITER, moe_runner_config)

    def process_weights_after_loading(self, layer: Any) -> None:
        pass

    def get_moe_runner_backend(self, layer: Any) -> Any:
        return (self._aiter_runner or self.runner).runner_backend

    def get_triton_quant_info(self, layer: Any) -> QuantInfo:
        return QuantInfo(layer.w13_weight, layer.w2_weight)

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """SGLang's own on a GPU, where its forward ends in a runner."""
        runner = self._aiter_runner or self.runner
        return runner.run(dispatch_output, self.get_triton_quant_info(layer))


class OtherMethod(UnquantizedFusedMoEMethod):
    """A subclass, as SGLang has three."""


class FusedMoE(nn.Module):
    """A layer of `experts` experts, of which rank `rank` of `ranks` has its share."""

    def __init__(
        self,
        method: Any = None,
        experts: int = 8,
        topk: int = 2,
        ranks: int = 1,
        rank: int = 0,
        **more: Any,
    ) -> None:
        super().__init__()
        self.layer_id, self.top_k, self.num_experts = 0, topk, experts
        self.moe_ep_size, self.moe_ep_rank, self.num_local_experts = ranks, rank, experts // ranks
        generator = torch.Generator().manual_seed(0)
        local = slice(rank * self.num_local_experts, (rank + 1) * self.num_local_experts)
        self.w13_weight = torch.randn(experts, 32, 16, generator=generator)[local]
        self.w2_weight = torch.randn(experts, 16, 16, generator=generator)[local]
        self.quant_method = UnquantizedFusedMoEMethod() if method is None else method
        self.config = MoeRunnerConfig(experts, self.num_local_experts, topk, self, **more)
        self.quant_method.create_moe_runner(self, self.config)
        self.runner_backend = self.quant_method.get_moe_runner_backend(self)
        self.config.runner_backend = self.runner_backend

    def forward(self, hidden: Tensor, topk_output: Any) -> Tensor:
        """Dispatches as SGLang's standard dispatcher does, and applies."""
        if (
            self.moe_ep_size > 1
            and isinstance(topk_output, Standard)
            and not self.runner_backend.is_aiter()
        ):
            local = topk_output.topk_ids - self.moe_ep_rank * self.num_local_experts
            outside = (local < 0) | (local >= self.num_local_experts)
            topk_output = topk_output._replace(topk_ids=local.masked_fill(outside, -1))
        found: Tensor = self.quant_method.apply(self, Dispatch(hidden, topk_output)).hidden_states
        return found


def kernel_sequence(
    hidden_states, w1, w2, topk_weights, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_padded,
    config, down_config, down_moe_use_tma, up_moe_use_tma, *, b1, b2, use_fp8_w8a8, use_int8_w8a8,
    use_int8_w8a16, use_int4_w4a16, per_channel_quant, w1_scale, w2_scale, w1_zp, w2_zp, a1_scale,
    a2_scale, block_shape, activation, is_gated, no_combine, inplace, apply_router_weight_on_input,
    routed_scaling_factor, gemm1_alpha, gemm1_limit, filter_expert, hooks=None, swiglu_limit=None,
    gate_up_interleaved=True, a1_q=None, fuse_swiglu_interleaved=False, defer_sum=False,
    no_combine_keep_router_weight=False,
):  # fmt: skip  # noqa: ANN001, ANN201
    """What SGLang's two products and their sum do, by a loop over the blocks."""
    STATE.calls.append(
        SimpleNamespace(down_tma=down_moe_use_tma, up_tma=up_moe_use_tma, config=config)
    )
    tokens, slots = topk_ids.shape
    block = config["BLOCK_SIZE_M"]
    rows = torch.full((tokens * slots, w2.shape[1]), torch.nan)
    for index in range(int(num_tokens_post_padded[0]) // block):
        expert = int(expert_ids[index])
        assert filter_expert or expert >= 0
        for entry in sorted_token_ids[index * block : (index + 1) * block].tolist():
            if entry >= tokens * slots:
                continue
            if expert < 0:
                rows[entry] = 0.0
                continue
            gate, up = (w1[expert] @ hidden_states[entry // slots]).chunk(2)
            rows[entry] = topk_weights.view(-1)[entry] * (
                w2[expert] @ (torch.sigmoid(gate) * gate * up)
            )
    out = rows.view(tokens, slots, -1).sum(1) * (routed_scaling_factor or 1.0)
    return hidden_states.copy_(out) if inplace else out


def optimal_config(
    w1_shape, w2_shape, top_k, dtype, M, is_marlin=False, block_shape=None,  # noqa: N803
    per_channel_quant=False, return_down_config=False,
):  # fmt: skip  # noqa: ANN001, ANN201
    return STATE.block_config, (STATE.down_config, None)


class HookType(Enum):
    AROUND = "around"


class HookRegistry:
    hooks: list[tuple[str, Any]] = []

    @classmethod
    def register(cls, target: str, hook: Any, hook_type: Any) -> None:
        cls.hooks.append((target, hook))

    @classmethod
    def apply_hooks(cls) -> None:
        for target, hook in cls.hooks:
            module, kind, name = target.rsplit(".", 2)
            owner = getattr(sys.modules[module], kind)
            setattr(owner, name, _around(getattr(owner, name), hook))


def _around(original: Any, hook: Any) -> Any:
    @functools.wraps(original)
    def wrapper(*arguments: Any, **by_name: Any) -> Any:
        return hook(original, *arguments, **by_name)

    return wrapper


class Noop:
    def on_select_experts(self, topk_ids: Tensor) -> None:
        raise AssertionError("a recorder that records nothing is not asked")


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_select_experts(self, topk_ids: Tensor) -> None:
        self.seen.append(topk_ids)


STATE: Any = SimpleNamespace()
