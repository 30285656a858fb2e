"""How do several GPUs share the experts of a MoE layer? Each holds a slice; one all-reduce combines.

Every rank sees all tokens and the whole router, routes them with the `expert_mask` of its own
experts, so that its one launch sorts only the entries that it will multiply, and computes a partial
sum over those experts. The sum over the ranks is the layer's output. Nothing else is exchanged: in
decode, where a step has few tokens, an all-reduce of [M, D] is cheaper than two all-to-alls of the
routed rows, and all shapes stay fixed, so a step can be captured in a graph.

The partial sums are float32 and so is the all-reduce, unless told otherwise: two ranks' output then
differs from one's only by the order of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.device import device_of_tensors
from ..routing.arguments import check_strided
from ..routing.buffers import check_size
from .calls import fused_moe_from_logits


@dataclass(frozen=True, eq=False, repr=False)
class ExpertShard:
    """The experts `first` to `first + count - 1` of `num_experts`, with their mask.

    mask: int32 [num_experts], 1 for the shard's experts, on the device of the layer. Shards are equal
    if they name the same experts on the same device, which says what the mask holds.
    """

    first: int
    count: int
    num_experts: int
    mask: Tensor

    def _key(self) -> tuple[int, int, int, torch.device]:
        return self.first, self.count, self.num_experts, self.mask.device

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExpertShard):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        first, count, num_experts, device = self._key()
        return f"ExpertShard({first=}, {count=}, {num_experts=}, device='{device}')"

    def of(self, weight: Tensor) -> Tensor:
        """The shard's part [count, ...] of a tensor [num_experts, ...], as a view."""
        check_strided("weight", weight)
        if weight.dim() == 0 or weight.shape[0] != self.num_experts:
            raise ValueError(
                f"weight: expected {self.num_experts} experts in the first dimension, got shape"
                f" {list(weight.shape)}"
            )
        return weight[self.first : self.first + self.count]


def expert_shard(
    num_experts: int, rank: int, world_size: int, device: torch.device | str
) -> ExpertShard:
    """The slice of the experts that a rank holds: in order, sizes differing by at most one.

    Args:
        num_experts: E, at least `world_size`.
        rank, world_size: of the group that shares the layer.
        device: where the mask goes.

    Raises:
        ValueError: the rank is not in the group, or there are fewer experts than ranks.
        TypeError: an argument is of the wrong Python type.
    """
    check_size("num_experts", num_experts)
    check_size("world_size", world_size)
    check_size("rank", rank, low=0)
    place = device_of_tensors(device)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    if num_experts < world_size:
        raise ValueError(
            f"num_experts: expected at least one for each of {world_size} ranks, got {num_experts}"
        )
    first = num_experts * rank // world_size
    end = num_experts * (rank + 1) // world_size
    mask = torch.zeros(num_experts, dtype=torch.int32, device=place)
    mask[first:end] = 1
    return ExpertShard(first, end - first, num_experts, mask)


def fused_moe_expert_parallel(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    gating_output: Tensor,
    topk: int,
    shard: ExpertShard,
    group: dist.ProcessGroup | None = None,
    *,
    reduce_dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor:
    """The output of a MoE layer whose experts are shared by the ranks of `group`.

    Every rank calls it with the same tokens and logits, and gets the same output.

    Args:
        hidden_states: [M, D], the same on every rank.
        w1: [count, 2*inter, D] or [count, inter, D], the shard's experts.
        w2: [count, D, inter], likewise.
        gating_output: [M, E] logits, the same on every rank.
        topk: K.
        shard: which experts these are, from `expert_shard`.
        group: the ranks that share the layer; None for all.
        reduce_dtype: dtype of the partial sums that the ranks exchange.
        options: more arguments of `fused_moe_from_logits` by name, but `expert_mask` and `dtype`;
            bias1 and bias2 are the shard's.

    Returns:
        [M, D] of `hidden_states`' dtype.

    Raises:
        ValueError, TypeError: the weights or the logits are not of the shard's size, or as in
            `fused_moe_from_logits`; a rank that raises leaves the others waiting in the all-reduce
            until the group's timeout.
    """
    if not isinstance(shard, ExpertShard):
        raise TypeError(f"shard: expected an ExpertShard, got {type(shard).__name__}")
    if "expert_mask" in options or "dtype" in options:
        name = "expert_mask" if "expert_mask" in options else "dtype"
        raise TypeError(
            f"{name}: expected not to be given, as shard and reduce_dtype say it, got"
            f" {type(options[name]).__name__}"
        )
    check_strided("w1", w1)
    check_strided("gating_output", gating_output)
    if w1.dim() != 3 or gating_output.dim() != 2:
        raise ValueError(
            f"w1, gating_output: expected tensors of rank 3 and 2, got shapes {list(w1.shape)} and"
            f" {list(gating_output.shape)}"
        )
    # NOTE: on a GPU the mask itself is not read back, so nobody else would notice.
    if w1.shape[0] != shard.count or gating_output.shape[-1] != shard.num_experts:
        raise ValueError(
            f"w1: expected {shard.count} of {shard.num_experts} experts, as shard, got"
            f" {w1.shape[0]} of {gating_output.shape[-1]}, the width of gating_output"
        )
    partial = fused_moe_from_logits(
        hidden_states,
        w1,
        w2,
        gating_output,
        topk,
        expert_mask=shard.mask,
        dtype=reduce_dtype,
        **options,
    )
    if partial.shape[0]:
        dist.all_reduce(partial, group=group)
    return partial.to(hidden_states.dtype)
