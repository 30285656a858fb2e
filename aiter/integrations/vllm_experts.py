"""How does a layer of vLLM go from router logits to its output in one launch and the products?

The class is `OneLaunch`, and vLLM's interface for experts that take logits behind it. A call routes once
and has the products of the layer's `Taken`:

- "ours": the fused launch and the products of `aiter.layer`. On a CPU vLLM traces through it, so
  that everything here has to be traceable; elsewhere vLLM hides the layer from its compiler.
- "triton": vLLM's Triton kernels. The launch writes what their `moe_align_block_size` would (flat ids,
  blocks of -1 for experts of other ranks, for which the kernels write zeros) and the top-k weights. For
  a handful of tokens vLLM skips the alignment and takes each (token, slot) for a block, by
  M * K * 4 <= E, as an alignment is a launch more there. So do we, with the top-k launch alone: each of
  the M * K blocks reads an expert's weights once, as they would after an alignment.
- "rocm": ROCm's aiter, by vLLM's own AiterExperts, which knows how weights were shuffled and padded.
  Its one call of ROCm's `fused_moe` gets our launch in place of the sort (`rocm_aiter`).

Rows that vLLM has marked as padding (batches are padded to the sizes of captured graphs) are left out
where that costs less than it saves: experts that only padding would hit are not read. The number of rows
that count is computed on the device, in two small launches. Rows of padding come out zero, since what
follows may look at all rows, as a scale for a whole tensor does.

A failure raises. What vLLM captures of the choice (`routing_replay_out`) is written from `topk_out`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..jit.warmup import warmup
from ..layer.calls import fused_moe_from_logits
from ..layer.experts import default_block_size, expert_backend, run_experts
from ..layer.parts import SWIGLU_LIMIT, Experts
from ..routing.buffers import empty_topk
from ..routing.calls import topk_routing_sorting
from ..routing.graph import topk_routing
from . import vllm_names
from .vllm_layers import Between, Taken
from .vllm_names import Names, TritonNames

MODULES = (
    "module_fused_topk_moe_sorting", "module_topk_softmax", "module_topk_routing",
    "module_moe_sorting_opus",
)  # fmt: skip
_ANY_NUMBER = 2**31 - 1  # of slots, where each (token, slot) is a block: the grid says how many
_PLAIN = (
    "use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant",
)  # fmt: skip


class OneLaunch:
    """vLLM's unquantised experts, from router logits on. `take` says how, before the first call."""

    standard: Any  # of vLLM's FusedMoEActivationFormat
    moe_config: Any
    quant_config: Any
    w1_bias: Any
    w2_bias: Any

    @classmethod
    def activation_format(cls) -> Any:
        return cls.standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return True  # NOTE: asked of the products that would compute it (`vllm_layers`).

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not (moe_parallel_config.use_all2all_kernels or moe_parallel_config.enable_eplb)

    @staticmethod
    def _supports_routing_method(method: Any, weight_key: Any, activation_key: Any) -> bool:
        return True  # NOTE: the router itself is asked, which says more than its method's name.

    @staticmethod
    def _supports_router_logits_dtype(dtype: Any, method: Any) -> bool:
        return dtype in (None, torch.float32, torch.float16, torch.bfloat16)

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    def supports_routing_replay_capture(self) -> bool:
        return True

    def take(self, taken: Taken, layer: Any, products: Any) -> None:
        """Says what a call computes; builds, loads and makes all it needs, so that no request waits.

        Args:
            layer: vLLM's RoutedExperts.
            products: a `TritonNames`, vLLM's class of AITER experts, or None for ours.
        """
        self.taken = taken
        self.names = products
        self.inner: Any = None
        self.consumes_expert_mask = taken.products == "rocm"
        self.known_map = layer.expert_map
        warmup(modules=MODULES, devices=[layer.w13_weight.device])
        if taken.products == "triton":
            self.inner = products.TritonExperts(self.moe_config, self.quant_config)
            device = layer.w13_weight.device
            self.bound = torch.full((1,), _ANY_NUMBER, dtype=torch.int32, device=device)
        elif taken.products == "rocm":
            self.inner = products(self.moe_config, self.quant_config)

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
        **others: Any,
    ) -> Tensor:
        """The layer's output [M, D] for hidden states [M, D] and logits [M, E].

        Groups and scale are the rule's; they are read from the router when weights are loaded.
        """
        taken = self.taken
        self._check(taken, router_logits, e_score_correction_bias, expert_map, others)
        rows = hidden_states.shape[0]
        counted = _rows_that_count(rows) if taken.skips_padding else None
        topk_out = None
        if routing_replay_out is not None or taken.products != "ours":
            topk_out = empty_topk(rows, taken.routing.topk, router_logits.device)
            if counted is not None:
                topk_out[1].zero_()
        arguments = (hidden_states, w1, w2, router_logits, e_score_correction_bias, topk_out)
        if taken.between is not None:
            biases, weight_first = (self.w1_bias, self.w2_bias), apply_router_weight_on_input
            output = _ours(taken, taken.between, *arguments, biases, counted, weight_first)
        elif taken.products == "triton":
            output = self._by_triton(taken, *arguments, activation, counted)
        else:
            output = self._by_rocm(taken, *arguments, activation, global_num_experts, expert_map)
        if routing_replay_out is not None and topk_out is not None:
            routing_replay_out[:rows].copy_(topk_out[1])
        return output

    def _check(
        self,
        taken: Taken,
        router_logits: Tensor,
        correction_bias: Tensor | None,
        expert_map: Tensor | None,
        others: dict[str, Any],
    ) -> None:
        """Raises for what a layer was not taken with."""
        if (correction_bias is not None) != taken.routing.biased:
            raise ValueError(
                "e_score_correction_bias: expected"
                f" {'one' if taken.routing.biased else 'none'}, as when the weights were loaded"
            )
        if expert_map is not self.known_map:
            raise ValueError(
                "expert_map: expected that of when the weights were loaded, got another"
            )
        if router_logits.shape[1] != taken.num_experts:
            raise ValueError(
                f"router_logits: expected {taken.num_experts} columns, got shape"
                f" {list(router_logits.shape)}"
            )
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]}: expected None, as no rule has a use for it")

    def _by_triton(
        self,
        taken: Taken,
        hidden: Tensor,
        w1: Tensor,
        w2: Tensor,
        logits: Tensor,
        correction_bias: Tensor | None,
        topk_out: Any,
        activation: Any,
        counted: Tensor | None,
    ) -> Tensor:
        """vLLM's two Triton products, its activation and its sum, on our order."""
        call: TritonNames = self.names
        (rows, width), topk = hidden.shape, taken.routing.topk
        output = torch.empty_like(hidden)
        if rows == 0:
            return output
        kind = self.quant_config.config_name(hidden.dtype)
        config = call.try_get_optimal_moe_config(w1.size(), w2.size(), topk, kind, rows)
        order = self._order(
            taken, logits, correction_bias, topk_out, config["BLOCK_SIZE_M"], counted
        )
        first = hidden.new_empty((rows, topk, w1.shape[1]))
        middle = hidden.new_empty((rows * topk, w2.shape[2]))
        # NOTE: padding has no block that would write its rows.
        second = (hidden.new_empty if counted is None else hidden.new_zeros)((rows, topk, width))
        fixed = {
            "sorted_token_ids": order[0], "expert_ids": order[1],
            "num_tokens_post_padded": order[2], "config": config,
            "compute_type": _compute_type(call, hidden.dtype), "A_scale": None,
            "B_scale": None, "block_shape": None, **dict.fromkeys(_PLAIN, False),
        }  # fmt: skip
        call.invoke_fused_moe_triton_kernel(
            A=hidden, B=w1, C=first, topk_weights=None, mul_routed_weight=False, top_k=topk,
            B_bias=self.w1_bias, **fixed,
        )  # fmt: skip
        self.inner.activation(activation, middle, first.view(rows * topk, -1))
        call.invoke_fused_moe_triton_kernel(
            A=middle, B=w2, C=second, topk_weights=topk_out[0], mul_routed_weight=True, top_k=1,
            B_bias=self.w2_bias, **fixed,
        )  # fmt: skip
        self.inner.moe_sum(second, output)
        return output

    def _order(
        self,
        taken: Taken,
        logits: Tensor,
        correction_bias: Tensor | None,
        topk_out: Any,
        block: int,
        counted: Tensor | None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """sorted_token_ids, expert_ids, num_tokens_post_padded; top-k goes to `topk_out`."""
        rule, topk, _ = taken.routing
        experts = taken.num_experts
        if taken.mask is None and logits.shape[0] * topk * 4 <= experts:
            # NOTE: all rows route, padding as well: each of its slots is a block with an expert.
            weights, ids = topk_out
            topk_routing(weights, ids, logits, rule=rule, correction_bias=correction_bias)
            return None, ids.view(-1), self.bound
        buffers = topk_routing_sorting(
            logits, topk, experts, 0, torch.float32, rule=rule, correction_bias=correction_bias,
            block_size=block, expert_mask=taken.mask, num_local_tokens=counted,
            topk_out=topk_out, id_format="flat",
        )  # fmt: skip
        return buffers[0], buffers[2], buffers[3]

    def _by_rocm(
        self,
        taken: Taken,
        hidden: Tensor,
        w1: Tensor,
        w2: Tensor,
        logits: Tensor,
        correction_bias: Tensor | None,
        topk_out: Any,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
    ) -> Tensor:
        """vLLM's AITER experts, whose one call of ROCm's `fused_moe` routes from the logits."""
        from .vllm_rocm import routed

        output = torch.empty_like(hidden)
        rule, topk, _ = taken.routing
        empty = hidden.new_empty(0)
        with routed(logits, topk, rule, correction_bias, topk_out):
            self.inner.apply(
                output=output, hidden_states=hidden, w1=w1, w2=w2, topk_weights=topk_out[0],
                topk_ids=topk_out[1], activation=activation,
                global_num_experts=global_num_experts, expert_map=expert_map, a1q_scale=None,
                a2_scale=None, workspace13=empty, workspace2=empty, expert_tokens_meta=None,
                apply_router_weight_on_input=False,
            )  # fmt: skip
        return output


def make_experts(names: Names) -> Any:
    """The class of experts that route in one launch, derived from vLLM's."""
    fixed = {"standard": names.FusedMoEActivationFormat.Standard}
    return type("OneLaunchExperts", (OneLaunch, names.FusedMoEExpertsMonolithic), fixed)


def _ours(
    taken: Taken,
    between: Between,
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    logits: Tensor,
    correction_bias: Tensor | None,
    topk_out: Any,
    biases: tuple[Tensor | None, Tensor | None],
    counted: Tensor | None,
    weight_first: bool,
) -> Tensor:
    """`fused_moe_from_logits`, or its two steps where it has no argument for what is asked."""
    rule, topk, _ = taken.routing
    if topk_out is None and between.swiglu_limit == SWIGLU_LIMIT:
        return fused_moe_from_logits(
            hidden, w1, w2, logits, topk, expert_mask=taken.mask, activation=between.activation,
            doweight_stage1=weight_first, num_local_tokens=counted, bias1=biases[0], bias2=biases[1],
            rule=rule, correction_bias=correction_bias, gate_up_interleaved=between.interleaved,
        )  # fmt: skip
    experts = Experts(
        w1, w2, *biases, between.activation, between.interleaved, between.swiglu_limit
    )
    backend = expert_backend(w1, w2, between.activation)
    block = default_block_size(backend, hidden, experts, topk, taken.num_experts)
    buffers = topk_routing_sorting(
        logits, topk, taken.num_experts, w2.shape[1], hidden.dtype, rule=rule,
        correction_bias=correction_bias, block_size=block, expert_mask=taken.mask,
        num_local_tokens=counted, topk_out=topk_out,
    )  # fmt: skip
    return run_experts(
        hidden, experts, buffers, topk, block, backend,
        all_routed=taken.mask is None and counted is None, weight_first=weight_first,
    )  # fmt: skip


def _rows_that_count(rows: int) -> Tensor | None:
    """How many of the rows are no padding, int32 on the device; None for all."""
    padding = vllm_names.padding_of()
    if padding is None:
        return None
    counted: Tensor = padding[:rows].logical_not().sum(dtype=torch.int32)
    return counted


def _compute_type(names: TritonNames, dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    return getattr(names.tl, str(dtype).removeprefix("torch."))
