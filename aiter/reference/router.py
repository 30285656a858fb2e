"""What are a router's logits, to the last bit? A plain PyTorch answer, on any device.

:func:`router_logits` adds up in the order of docs/contract.md ("Router logits"):
partial sum p of 128 takes the chunks of 8 items p, p + 128, p + 256, ... and their items one by one
by a fused multiply-add, and a tree adds the 128. Like the other functions of `aiter.reference` it
allocates freely, 24 bytes for each of 128 partial sums of each logit: it is not for serving.

PyTorch has no fused multiply-add, so `_fma` makes one of float64. A product of two float32 is exact
there. The sum with a third is rounded to 53 bits, and the way to 24 would round a second time; so the
first rounding is turned into one to odd, which is known to make the second one right, as 53 is more
than 2 * 24 + 1 (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008). What the
first rounding dropped is found exactly by Knuth's two-sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.rule import RoutingRule
from .routing import _require_tensor
from .rules import topk_routing_sorting

CHUNK = 8
PARTIAL_SUMS = 128
_NEIGHBOURS = 32
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def router_logits(
    hidden_states: Tensor, router_weight: Tensor, router_bias: Tensor | None = None
) -> Tensor:
    """hidden_states @ router_weight.T + router_bias, in the order of the contract.

    Args:
        hidden_states: [M, D'] f32, f16 or bf16, any strides.
        router_weight: [E', D'] f32, f16 or bf16, any strides.
        router_bias: [E'] f32, f16 or bf16; None for none.

    Returns:
        f32 [M, E'], the bits of every other path but for those of a NaN.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a dtype or shape is not as above.
    """
    _check(hidden_states, router_weight, router_bias)
    tokens, width = hidden_states.shape
    experts = router_weight.shape[0]
    sums = torch.zeros(tokens, experts, PARTIAL_SUMS, device=hidden_states.device)
    for first in range(0, width, PARTIAL_SUMS * CHUNK):
        rows = _chunks(hidden_states[:, first : first + PARTIAL_SUMS * CHUNK])
        columns = _chunks(router_weight[:, first : first + PARTIAL_SUMS * CHUNK])
        for item in range(CHUNK):
            # Chunks that have such an item: all, but for the row's last.
            there = -(-(min(width - first, PARTIAL_SUMS * CHUNK) - item) // CHUNK)
            if there > 0:
                sums[..., :there] = _fma(
                    rows[:, None, :there, item], columns[None, :, :there, item], sums[..., :there]
                )
    sums = sums.reshape(tokens, experts, PARTIAL_SUMS // _NEIGHBOURS, _NEIGHBOURS)
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    r0, r1, r2, r3 = sums.squeeze(-1).unbind(-1)
    logits: Tensor = (r0 + r1) + (r2 + r3)
    return logits if router_bias is None else logits + router_bias.float()


def router_topk_sorting(
    hidden_states: Tensor,
    router_weight: Tensor,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    *,
    router_bias: Tensor | None = None,
    rule: RoutingRule | None = None,
    correction_bias: Tensor | None = None,
    block_size: int = 32,
    expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Route from hidden states: :func:`router_logits`, then :func:`topk_routing_sorting` of them.

    Args:
        hidden_states, router_weight, router_bias: as in :func:`router_logits`. Rows from ``n`` on may
            hold anything.
        The others, the returned tensors and the errors: as in :func:`topk_routing_sorting`.
    """
    logits = router_logits(hidden_states, router_weight, router_bias)
    return topk_routing_sorting(
        logits, topk, num_experts, model_dim, moebuf_dtype, rule=rule,
        correction_bias=correction_bias, block_size=block_size, expert_mask=expert_mask,
        num_local_tokens=num_local_tokens,
    )  # fmt: skip


def _chunks(rows: Tensor) -> Tensor:
    """[N, up to 1024] as float64 [N, up to 128, 8]; what is not there is 0."""
    missing = -rows.shape[1] % CHUNK
    whole = torch.nn.functional.pad(rows.double(), (0, missing))
    return whole.reshape(len(rows), whole.shape[1] // CHUNK, CHUNK)


def _fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z rounded once to float32; x and y float64 with float32's numbers, z float32."""
    product, addend = x * y, z.double()
    total = product + addend
    other = total - product
    dropped = (product - (total - other)) + (addend - other)
    bits = total.view(torch.int64)
    # Rounds to odd: towards what was dropped, where the last bit is even. Bits count magnitudes.
    step = torch.where((dropped > 0) == (total > 0), 1, -1)
    inexact = total.isfinite() & (dropped != 0) & (bits & 1 == 0)
    return torch.where(inexact, bits + step, bits).view(torch.float64).float()


def _check(hidden_states: Tensor, router_weight: Tensor, router_bias: Tensor | None) -> None:
    named = {"hidden_states": hidden_states, "router_weight": router_weight}
    for name, tensor in named.items():
        _require_tensor(name, tensor)
        if tensor.dtype not in _FLOATS or tensor.dim() != 2:
            raise ValueError(
                f"{name}: expected rank 2 and dtype float32, float16 or bfloat16, got"
                f" {list(tensor.shape)} of {tensor.dtype}"
            )
    for name, other in (("router_weight", router_weight), ("router_bias", router_bias)):
        if isinstance(other, Tensor) and other.device != hidden_states.device:
            raise ValueError(
                f"{name}: expected it on {hidden_states.device}, as hidden_states, got"
                f" {other.device}"
            )
    width = hidden_states.shape[1]
    if width < 1 or router_weight.shape[1] != width:
        raise ValueError(
            f"router_weight: expected shape [any, {width}], as hidden_states, got"
            f" {list(router_weight.shape)}"
        )
    if router_bias is None:
        return
    _require_tensor("router_bias", router_bias)
    if router_bias.dtype not in _FLOATS or list(router_bias.shape) != [router_weight.shape[0]]:
        raise ValueError(
            f"router_bias: expected [{router_weight.shape[0]}] of float32, float16 or bfloat16, got"
            f" {list(router_bias.shape)} of {router_bias.dtype}"
        )
