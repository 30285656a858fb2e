"""The router's product, top-k, block-padded sort by expert and `moe_buf` zeroing in one launch."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..jit import compile_ops, module_for
from ..jit.target import cpu_wave_override
from .device import current_device
from .rule import Packed, RoutingRule

_Sorted = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
RouterAgain = Callable[..., tuple[_Sorted, Tensor | None] | None]


class RouterCalls(NamedTuple):
    """The launches from hidden states on a device, as `fused_topk_moe_sorting.FusedCalls`.

    Attributes:
        into: called as (request, hidden_states, router_weight, router_bias, expert_mask,
            num_local_tokens, correction_bias, topk_out, out, logits, expected, layouts,
            logits_layouts, in_one), makes everything in one launch or, once all arguments are
            checked, `router_product`. `request` is a `routing.request.Request` and `batch_invariant`
            in one tuple; the layouts are None for what the caller of the call gave.
        again: called as (request, hidden_states, router_weight, router_bias, expert_mask,
            num_local_tokens, correction_bias, topk_out, out, logits_out), makes the launch of an
            earlier call that is like this one, and returns the sorted buffers, and the logits if it was
            the product alone, else None; or launches nothing and returns None.
    """

    into: Callable[..., bool]
    again: RouterAgain


_MODULE = "module_fused_router_sorting"
_modules: dict[tuple[torch.device, int | None], ModuleType] = {}


@compile_ops(_MODULE)
def fused_router_sorting_fwd(
    hidden_states: Tensor,
    router_weight: Tensor,
    logits_out: Tensor,
    sorted_ids: Tensor,
    sorted_weights: Tensor,
    sorted_expert_ids: Tensor,
    num_valid_ids: Tensor,
    moe_buf: Tensor,
    num_experts: int,
    topk: int,
    unit_size: int,
    *,
    router_bias: Tensor | None = None,
    rule: RoutingRule | Packed | bool | None = None,
    correction_bias: Tensor | None = None,
    local_expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    topk_out: tuple[Tensor, Tensor] | None = None,
    id_format: str = "slot",
    num_workgroups: int | None = None,
) -> None:
    """Multiplies M hidden states by the router's weight, and routes by the logits, in one launch.

    `logits_out` is hidden_states @ router_weight.T + router_bias in float32, in the order of
    docs/contract.md, so that a row's bits depend on that row alone. Everything else is what
    `fused_topk_moe_sorting_fwd` makes of these logits, with a handover through memory between the two.

    Args:
        hidden_states: [M, D'] float32, float16 or bfloat16; inner stride 1, any row stride.
        router_weight: [E', D'] float32, float16 or bfloat16; inner stride 1, any row stride. E' is
            the width of the logits that the rule takes for `num_experts`.
        logits_out: out, float32 [M, E']; inner stride 1, rows that do not overlap. Rows from
            `num_local_tokens` on are left as they are.
        router_bias: [E'] float32, float16 or bfloat16, contiguous; None for none.
        rule: a RoutingRule or its `packed`; a bool for plain softmax, renormalised or not; None for
            True.
        num_workgroups: 1 to 1024, among which the product is shared; None for as many as the device
            has compute units. The result is the same.
        sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf, num_experts, topk,
            unit_size, correction_bias, local_expert_mask, num_local_tokens, topk_out, id_format: as in
            `fused_topk_moe_sorting_fwd`.

    Runs on PyTorch's current stream of the tensors' device, allocates nothing and does not synchronise.

    Raises:
        ValueError: an argument does not fit, or M is above `fused_router_sorting_max_tokens`.
        TypeError: an argument is of the wrong Python type.
        aiter.jit.JitError: the module could not be built or loaded (first call on a device).
    """


@compile_ops(_MODULE)
def fused_router_sorting_check(
    hidden_states: Tensor,
    router_weight: Tensor,
    logits_out: Tensor,
    sorted_ids: Tensor,
    sorted_weights: Tensor,
    sorted_expert_ids: Tensor,
    num_valid_ids: Tensor,
    moe_buf: Tensor,
    num_experts: int,
    topk: int,
    unit_size: int,
    *,
    router_bias: Tensor | None = None,
    rule: RoutingRule | Packed | bool | None = None,
    correction_bias: Tensor | None = None,
    local_expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    topk_out: tuple[Tensor, Tensor] | None = None,
    id_format: str = "slot",
    num_workgroups: int | None = None,
) -> None:
    """Raises what `fused_router_sorting_fwd` would raise, but for too large an M; launches nothing."""


@compile_ops(_MODULE)
def router_product(
    hidden_states: Tensor,
    router_weight: Tensor,
    logits_out: Tensor,
    *,
    router_bias: Tensor | None = None,
) -> None:
    """The logits of `fused_router_sorting_fwd` alone, for any M: the same bits.

    Args:
        hidden_states, router_weight, logits_out, router_bias: as there; all rows are written.

    Raises:
        ValueError, TypeError, aiter.jit.JitError: as there.
    """


def router_calls(device: torch.device) -> RouterCalls:
    """The launches for tensors on `device`, at the cpu target's wave width of the moment."""
    key = (device, cpu_wave_override.get())
    if key not in _modules:
        _modules[key] = module_for(_MODULE, device)
    compiled = _modules[key]
    return RouterCalls(compiled.fused_router_sorting_into, compiled.fused_router_sorting_again)


def fused_router_sorting_forget() -> None:
    """Drops the remembered calls of all devices."""
    for module in tuple(_modules.values()):
        module.fused_router_sorting_forget()


def fused_router_sorting_max_tokens(
    num_experts: int, topk: int, *, device: torch.device | str | int | None = None
) -> int:
    """The largest M that `fused_router_sorting_fwd` takes for E experts and K slots.

    It is what fits in the LDS of one workgroup; 0 when not even one token does.

    Args:
        num_experts: E, with shared and zero experts.
        topk: K, with shared experts.
        device: whose LDS counts; None for the current GPU if there is one, else the CPU.

    Raises:
        ValueError: not 1 <= topk <= min(num_experts, 255), or num_experts above 65535.
    """
    chosen = current_device(device)
    compiled = module_for(_MODULE, chosen)
    return int(compiled.fused_router_sorting_max_tokens(num_experts, topk, chosen.index or 0))
