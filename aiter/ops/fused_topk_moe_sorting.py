"""Softmax, top-k, block-padded sort by expert and `moe_buf` zeroing in one launch."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..jit import compile_ops, module_for
from ..jit.target import cpu_wave_override
from .device import current_device
from .rule import RoutingRule

FusedAgain = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None]


class FusedCalls(NamedTuple):
    """The fused launch on a device, as functions of positional arguments that a caller remembers.

    Attributes:
        into: called as (request, gating_output, expert_mask, num_local_tokens, correction_bias,
            topk_out, out, expected, layouts), does what `fused_topk_moe_sorting_fwd` does if `out` is
            a tuple of tensors of exactly the sizes in `expected` (`routing.buffers.Buffers`), else
            nothing, and returns which. `request` is a `routing.request.Request`; `layouts`, if not
            None, are the `routing.buffers.Layouts` that `out` was allocated by for this call. The
            call is one that `again` knows from then on.
        again: called as (request, gating_output, expert_mask, num_local_tokens, correction_bias,
            topk_out, out), makes the launch of an earlier call that agrees in the request, in which
            tensors there are, and in everything that is checked of the tensors (device, dtype, shape,
            strides, alignment, no overlap), if one is remembered, and returns the outputs, `out` or
            new ones; else launches nothing and returns None.
    """

    into: Callable[..., bool]
    again: FusedAgain


_MODULE = "module_fused_topk_moe_sorting"
_modules: dict[tuple[torch.device, int | None], ModuleType] = {}


@compile_ops(_MODULE)
def fused_topk_moe_sorting_fwd(
    gating_output: Tensor,
    sorted_ids: Tensor,
    sorted_weights: Tensor,
    sorted_expert_ids: Tensor,
    num_valid_ids: Tensor,
    moe_buf: Tensor,
    num_experts: int,
    topk: int,
    unit_size: int,
    need_renorm: bool,
    *,
    local_expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    cluster_size: int | None = None,
    rule: RoutingRule | None = None,
    correction_bias: Tensor | None = None,
    topk_out: tuple[Tensor, Tensor] | None = None,
    id_format: str = "slot",
) -> None:
    """Routes M tokens to `topk` of `num_experts` experts and sorts them into blocks, in one launch.

    With x = float(gating_output[t]): the slots of token t are its `topk` experts of largest x,
    equal ones by lower index; slot k weighs exp(x_k - max x) / Z, Z the sum of these over the chosen
    experts (`need_renorm`) or over all. The entries (t, k) of every expert, tokens ascending, fill
    blocks of B = `unit_size` slots, experts ascending.

    Args:
        gating_output: [M, E] float32, float16 or bfloat16 logits; inner stride 1, any row stride.
        sorted_ids: out, int32, at least M*K + E*B - K: `k << 24 | t`, padding `K << 24 | n`.
        sorted_weights: out, float32, as many: the weight, 0.0 in padding.
        sorted_expert_ids: out, int32, at least that / B rounded up: the expert of every block.
        num_valid_ids: out, int32 [2]: slots in use, and n.
        moe_buf: out, contiguous [M, D] of any dtype; rows below n are zeroed.
        num_experts: E, at most 65535 and the width of `gating_output`.
        topk: K, 1 to min(E, 255).
        unit_size: B, slots per block.
        need_renorm: whether the weights of a token sum to 1.
        local_expert_mask: int32 [E] of 0 and 1. Experts with 0 get nothing, and
            `sorted_expert_ids` counts only those with 1.
        num_local_tokens: int32 [1] on the device: n, the rows that count. None for n = M.
        cluster_size: workgroups that share the routing: 1, 2, 4, 8 or 16 as far as the device has
            clusters (compute capability 9.0 and above, and the cpu target), else 1. None to choose.
            The result is the same.
        rule: how experts are chosen and weighed; None for softmax and top-k. `need_renorm` has to
            agree with its own.
        correction_bias: [E] float32, float16 or bfloat16, added to the scores for the choice alone.
        topk_out: out, (weights float32 [M, K], ids int32 [M, K]), rows any stride: what
            `topk_routing` writes, from the same launch.
        id_format: "slot" as above; "flat": `sorted_ids` holds t*K + k, padding M*K, and experts that
            are masked out keep their blocks, with -1 in `sorted_expert_ids`.

    With shared and zero experts in the rule, E, K and the width of the logits are as in
    `routing.calls.topk_routing_sorting`.

    What lies behind slot `num_valid_ids[0]` is not written. Runs on PyTorch's current stream of the
    tensors' device, allocates nothing and does not synchronise.

    Raises:
        ValueError: an argument does not fit, or M is above `fused_topk_moe_sorting_max_tokens`.
        TypeError: an argument is of the wrong Python type.
        aiter.jit.JitError: the module could not be built or loaded (first call on a device).
    """


def fused_calls(device: torch.device) -> FusedCalls:
    """The fused launch for tensors on `device`, at the cpu target's wave width of the moment."""
    key = (device, cpu_wave_override.get())
    if key not in _modules:
        _modules[key] = module_for(_MODULE, device)
    compiled = _modules[key]
    return FusedCalls(compiled.fused_topk_moe_sorting_into, compiled.fused_topk_moe_sorting_again)


def fused_topk_moe_sorting_forget() -> None:
    """Drops the remembered calls of all devices."""
    for module in tuple(_modules.values()):
        module.fused_topk_moe_sorting_forget()


def fused_topk_moe_sorting_max_tokens(
    num_experts: int, topk: int, *, device: torch.device | str | int | None = None
) -> int:
    """The largest M that `fused_topk_moe_sorting_fwd` takes for E experts and K slots.

    It is what fits in the LDS of the workgroups that share the routing unasked: up to 16 where a
    GPU has clusters, else one. 0 when not even one token does.

    Args:
        num_experts: E.
        topk: K.
        device: whose LDS counts; None for the current GPU if there is one, else the CPU.

    Raises:
        ValueError: not 1 <= topk <= min(num_experts, 255), or num_experts above 65535.
    """
    chosen = current_device(device)
    compiled = module_for(_MODULE, chosen)
    return int(compiled.fused_topk_moe_sorting_max_tokens(num_experts, topk, chosen.index or 0))
