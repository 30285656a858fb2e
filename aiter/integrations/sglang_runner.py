"""What does a layer of SGLang do once our launch routes it? From logits, or ready ids, to its output.

A taken layer's top-k is bypassed: SGLang hands the router's logits to the layer's runner, and the one
here makes one launch of them, followed by the products that the device has:

    own     the CPU: our experts (`fused_moe_from_logits`), as SGLang has nothing but a loop there
    triton  CUDA and HIP: SGLang's Triton experts, by `_fused_moe_kernel_sequence`, with flat ids
            of docs/contract.md ("Buffers") in place of its top-k and its `moe_align_block_size`
    rocm    HIP with SGLANG_USE_AITER=1: ROCm's products, by `rocm_aiter.fused_moe_from_logits`

Ready ids come for a rule that cannot be expressed, for rows without tokens, and where SGLang maps
experts to other places (`expert_location_dispatch_info`). Our experts take them on the CPU; on a GPU
SGLang's own runner does, as nothing would be gained there.

What is easily lost, each of which op_tests/integrations/test_sglang.py tests:

- The rule stays with the layer. SGLang rebuilds the configuration that travels with the logits where
  a graph is captured in pieces, without score, groups and scale.
- Experts of other ranks: a bypassed top-k is not mapped to local ids by SGLang's dispatcher, and ROCm's
  runner gets no mask from it. The mask here is the layer's own buffer, so that it is moved with it.
- Rows from `num_token_non_padded` on have no entry, so that the engine's kernels leave there what was in
  memory, NaN perhaps, which a later layer multiplies by zero. They are zeroed, as SGLang's own path
  leaves them; only batches with such a number pay for it.
- The tensor-memory path of the down product stores its rows in the order of the sort, in a buffer that
  is sized for one block of all other ranks' experts; ours have a block each. It is off under a mask.
- Recorders of the experts' load see a bypassed layer's ids from here.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor

from ..fused_moe import fused_moe, fused_moe_from_logits, topk_routing_sorting
from ..ops.rule import RoutingRule
from ..ops.topk_routing import topk_routing
from ..routing.buffers import empty_topk
from .sglang_rules import activation_of

STATE = "fused_moe_routing"  # a taken layer's `Taken`, on the layer and on its runner's backend
MASK = "fused_moe_routing_mask"  # the layer's buffer


def srt(module: str) -> Any:
    """A module of SGLang's runtime; untyped, as SGLang is no requirement of ours."""
    return importlib.import_module(f"sglang.srt.{module}")


@dataclasses.dataclass
class Taken:
    """A layer that we took.

    Attributes:
        layer: SGLang's `FusedMoE`.
        products: "own", "triton" or "rocm".
        sglang_runner: the `MoeRunner` that SGLang had made, for ready ids.
        rule: what its logits are routed by, once its top-k is bound; None where that stays SGLang's.
    """

    layer: Any
    products: str
    sglang_runner: Any
    rule: RoutingRule | None = None

    def bind(self, rule: RoutingRule) -> None:
        """Remembers the rule; raises RuntimeError where the layer has another one."""
        if self.rule is not None and self.rule != rule:
            raise RuntimeError(
                f"the top-k of layer {self.layer.layer_id}: expected {self.rule}, by which its experts"
                f" are routed already, got {rule}"
            )
        self.rule = rule

    def mask(self) -> Tensor | None:
        """int32 [E], 1 for the experts of this rank; None for all."""
        mask: Tensor | None = getattr(self.layer, MASK, None)
        # NOTE: SGLang may give a loaded layer all experts, and then sets its size to 1.
        return mask if self.layer.moe_ep_size > 1 else None

    def prepare(self, device: torch.device) -> None:
        """Makes the mask, and one routing of one row, which builds what is not built.

        Before a graph is captured: neither may happen while one is.
        """
        layer = self.layer
        if layer.moe_ep_size > 1 and getattr(layer, MASK, None) is None:
            mask = torch.zeros(layer.num_experts, dtype=torch.int32, device=device)
            first = layer.moe_ep_rank * layer.num_local_experts
            mask[first : first + layer.num_local_experts] = 1
            layer.register_buffer(MASK, mask, persistent=False)
        if self.rule is not None and layer.top_k:
            logits = torch.zeros(1, layer.num_experts, device=device)
            format_of_ids = "flat" if self.products == "triton" else "slot"
            topk_routing_sorting(
                logits, layer.top_k, layer.num_experts, 0, torch.bfloat16, rule=self.rule,
                expert_mask=self.mask(), id_format=format_of_ids,
            )  # fmt: skip


class Runner:
    """SGLang's `DispatchMoeRunnerCore` for a taken layer (registered as one, by `sglang.register`).

    Args:
        config: SGLang's `MoeRunnerConfig`.

    Raises:
        ValueError: the layer was not taken, as with our name in --moe-runner-backend.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.taken: Taken | None = getattr(config.layer, STATE, None)
        if self.taken is None:
            raise ValueError(
                "moe_runner_backend: expected auto or triton, as layers are chosen one by one, got"
                f" the name of this plugin, {STATE}"
            )

    @property
    def runner_backend(self) -> Any:
        """The layer's, as SGLang asks of a core."""
        return self.config.runner_backend

    def run_from_dispatch(
        self, dispatch_output: Any, quant_info: Any, runner_config: Any, hooks: Any = None
    ) -> Any:
        """The layer's output, as SGLang's `StandardCombineInput`.

        Raises:
            TypeError: a top-k of another kind than bypassed or standard.
            NotImplementedError: hooks of LoRA.
        """
        taken = self.taken
        assert taken is not None
        if hooks is not None:
            raise NotImplementedError("hooks: expected None, as layers with LoRA are not taken")
        topk = srt("layers.moe.topk")
        choice = dispatch_output.topk_output
        bypassed = topk.TopKOutputChecker.format_is_bypassed(choice)
        if bypassed and choice.expert_location_dispatch_info is not None:
            choice = choice.to_standard()
            if taken.products != "rocm":  # NOTE: which reads global ids and a mask.
                choice = choice._replace(topk_ids=_local(choice.topk_ids, taken))
            bypassed = False
        if not bypassed:
            if not topk.TopKOutputChecker.format_is_standard(choice):
                raise TypeError(
                    "topk_output: expected a bypassed or a standard one, got"
                    f" {type(choice).__name__}"
                )
            return _from_ids(taken, dispatch_output._replace(topk_output=choice), quant_info)
        combine = srt("layers.moe.token_dispatcher.standard").StandardCombineInput
        hidden = dispatch_output.hidden_states
        if hidden.shape[0] == 0:
            return combine(hidden_states=hidden)
        if taken.rule is None:
            raise RuntimeError(
                f"layer {taken.layer.layer_id}: got logits, but its top-k was not bound to its experts"
            )
        call = Call(taken, taken.rule, choice)
        out = _PRODUCTS[taken.products](call, hidden, quant_info)
        if call.rows is not None:
            _zero_padded(out, call.rows)
        return combine(hidden_states=out)


class Call:
    """A routing of a taken layer: what its launch is given.

    Attributes:
        logits: [M, E].
        topk: K.
        bias: [E] or None, read at every call, as weights are loaded into it or replace it.
        mask: as `Taken.mask`.
        rows: int32 on the device, 0-d or [1], the rows that count; None for all.
    """

    def __init__(self, taken: Taken, rule: RoutingRule, choice: Any) -> None:
        self.taken, self.rule = taken, rule
        self.config = choice.topk_config
        self.logits: Tensor = choice.router_logits
        self.topk: int = self.config.top_k
        bias = self.config.correction_bias
        self.bias: Tensor | None = None if bias is None else bias.detach()
        self.mask = taken.mask()
        rows = choice.num_token_non_padded
        self.rows: Tensor | None = None if rows is None else rows.to(torch.int32)

    def empty_topk(self) -> tuple[Tensor, Tensor]:
        """Weights and ids for this call, uninitialised."""
        return empty_topk(self.logits.shape[0], self.topk, self.logits.device)

    def recorded(self) -> bool:
        """Whether somebody wants to see the ids."""
        return _recorder() is not None or _capturer() is not None

    def record(self, ids: Tensor) -> None:
        """Shows the ids to SGLang's recorders, -1 in rows that do not count."""
        if not self.recorded():
            return
        if self.rows is not None:
            ids = ids.masked_fill(_padded(ids, self.rows), -1)
        topk = srt("layers.moe.topk")
        topk.capture_routed_experts_if_allowed(self.config, self.config.layer_id, ids)
        recorder = _recorder()
        if recorder is not None:
            recorder.on_select_experts(topk_ids=ids)


def _own(call: Call, hidden: Tensor, quant_info: Any) -> Tensor:
    activation, interleaved = activation_of(call.taken.sglang_runner.config)
    experts = (hidden, quant_info.w13_weight, quant_info.w2_weight)
    biases = (quant_info.b13, quant_info.b2)
    if call.recorded():
        weights, ids = call.empty_topk()
        topk_routing(weights, ids, call.logits, rule=call.rule, correction_bias=call.bias)
        call.record(ids)
        return fused_moe(
            *experts, weights, ids, expert_mask=call.mask, activation=activation,
            num_local_tokens=call.rows, bias1=biases[0], bias2=biases[1],
            gate_up_interleaved=interleaved,
        )  # fmt: skip
    return fused_moe_from_logits(
        *experts, call.logits, call.topk, expert_mask=call.mask, activation=activation,
        num_local_tokens=call.rows, bias1=biases[0], bias2=biases[1], rule=call.rule,
        correction_bias=call.bias, gate_up_interleaved=interleaved,
    )  # fmt: skip


def _triton(call: Call, hidden: Tensor, quant_info: Any) -> Tensor:
    experts = srt("layers.moe.moe_runner.triton_utils.fused_moe")
    config = call.taken.sglang_runner.config
    w1, w2 = quant_info.w13_weight, quant_info.w2_weight
    up, (down, _) = experts.try_get_optimal_moe_config(
        w1.shape, w2.shape, call.topk, experts.get_config_dtype_str(dtype=hidden.dtype),
        hidden.shape[0], return_down_config=True,
    )  # fmt: skip
    # NOTE: copies, as SGLang hands out what it keeps.
    up, down = dict(up), None if down is None else dict(down)
    tma = experts._moe_support_tma()
    up_tma = bool(up.pop("USE_TMA", False)) and tma
    down_tma = bool(down is not None and down.pop("USE_TMA", False)) and tma
    weights, ids = call.empty_topk()
    sorted_ids, _, expert_ids, num_valid_ids, _ = topk_routing_sorting(
        call.logits, call.topk, call.logits.shape[1], 0, hidden.dtype, rule=call.rule,
        correction_bias=call.bias, block_size=up["BLOCK_SIZE_M"], expert_mask=call.mask,
        num_local_tokens=call.rows, topk_out=(weights, ids), id_format="flat",
    )  # fmt: skip
    call.record(ids)
    out: Tensor = experts._fused_moe_kernel_sequence(
        hidden, w1, w2, weights, ids, sorted_ids, expert_ids, num_valid_ids, up, down,
        down_tma and call.mask is None, up_tma,
        **dict.fromkeys(UNUSED_FLAGS, False), **dict.fromkeys(UNUSED_TENSORS),
        b1=quant_info.b13, b2=quant_info.b2, activation=config.activation,
        is_gated=config.is_gated, inplace=config.inplace,
        routed_scaling_factor=config.routed_scaling_factor, gemm1_alpha=config.gemm1_alpha,
        gemm1_limit=config.gemm1_clamp_limit, filter_expert=call.mask is not None,
        gate_up_interleaved=config.gate_up_interleaved,
    )  # fmt: skip
    return out


UNUSED_FLAGS = (
    "use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant",
    "no_combine", "apply_router_weight_on_input",
)  # fmt: skip
UNUSED_TENSORS = (
    "w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale", "block_shape",
)  # fmt: skip


def _rocm(call: Call, hidden: Tensor, quant_info: Any) -> Tensor:
    products = importlib.import_module(".rocm_aiter", __package__)
    runner = srt("layers.moe.moe_runner.aiter")
    topk_out = call.empty_topk() if call.recorded() else None
    out: Tensor = products.fused_moe_from_logits(
        hidden, quant_info.w13_weight, quant_info.w2_weight, call.logits, call.topk,
        rule=call.rule, correction_bias=call.bias, topk_out=topk_out, expert_mask=call.mask,
        activation=runner._aiter_activation(call.taken.sglang_runner.config),
        num_local_tokens=None if call.rows is None else call.rows.reshape(1),
        bias1=quant_info.b13, bias2=quant_info.b2,
        moe_sorting_dispatch_policy=runner._MOE_SORTING_DISPATCH_POLICY,
    )  # fmt: skip
    if topk_out is not None:
        call.record(topk_out[1])
    return out


_PRODUCTS = {"own": _own, "triton": _triton, "rocm": _rocm}


def _from_ids(taken: Taken, dispatch_output: Any, quant_info: Any) -> Any:
    """The output for ids that SGLang chose: local ones, -1 for none, but for ROCm's products."""
    if taken.products == "rocm" and taken.mask() is not None and quant_info.expert_mask is None:
        quant_info = dataclasses.replace(quant_info, expert_mask=taken.mask())
    if taken.products != "own":
        return taken.sglang_runner.run(dispatch_output, quant_info)
    hidden, choice = dispatch_output.hidden_states, dispatch_output.topk_output
    combine = srt("layers.moe.token_dispatcher.standard").StandardCombineInput
    if hidden.shape[0] == 0:
        return combine(hidden_states=hidden)
    activation, interleaved = activation_of(taken.sglang_runner.config)
    out = fused_moe(
        hidden, quant_info.w13_weight, quant_info.w2_weight,
        choice.topk_weights.to(torch.float32).contiguous(),
        choice.topk_ids.to(torch.int32).contiguous(), activation=activation,
        bias1=quant_info.b13, bias2=quant_info.b2, gate_up_interleaved=interleaved,
    )  # fmt: skip
    return combine(hidden_states=out)


def _local(ids: Tensor, taken: Taken) -> Tensor:
    """Local ids of global ones; -1 for those of other ranks."""
    if taken.mask() is None:
        return ids
    count = taken.layer.num_local_experts
    local = ids - taken.layer.moe_ep_rank * count
    return torch.where((ids >= 0) & (local >= 0) & (local < count), local, -1)


def _padded(like: Tensor, rows: Tensor) -> Tensor:
    """bool [M, 1]: the rows that do not count."""
    return (torch.arange(like.shape[0], device=like.device) >= rows)[:, None]


def _zero_padded(out: Tensor, rows: Tensor) -> None:
    out.masked_fill_(_padded(out, rows), 0)


def _recorder() -> Any:
    """SGLang's recorder of the experts' load; None where it records nothing."""
    module = srt("eplb.expert_distribution")
    recorder = module.get_global_expert_distribution_recorder()
    return None if isinstance(recorder, module._ExpertDistributionRecorderNoop) else recorder


def _capturer() -> Any:
    return srt("state_capturer.routed_experts").get_global_experts_capturer()
