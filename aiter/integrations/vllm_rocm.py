"""How does our launch get in front of ROCm's products in vLLM?

vLLM's experts for ROCm's aiter (`AiterExperts`) know how vLLM shuffled and padded the weights, which
activation has which number, and which options of ROCm's `fused_moe` follow. All that ends in one call
of ROCm's `fused_moe`, by name, with top-k weights and ids. `routed` says, for the next such call of a
thread, which logits these ids are to come from: ROCm's function, wrapped once, then hands its call on to
`rocm_aiter.fused_moe_from_logits`, which has the same keywords. Other calls go on as they are.

The top-k tensors that vLLM's experts get are unfilled; the same launch fills them.

Rejected: calling ROCm's function ourselves, which takes a copy of the rules by which vLLM pads, shuffles
and numbers; replacing vLLM's `rocm_aiter_ops.fused_moe`, which speaks in numbers that vLLM turns into
ROCm's enumerations one function later.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from ..jit.paths import PACKAGE
from ..ops.rule import RoutingRule
from . import rocm_aiter, rocm_sort

_MARK = f"_{PACKAGE}_routes"


class _Pending(NamedTuple):
    logits: Tensor
    topk: int
    rule: RoutingRule
    correction_bias: Tensor | None
    topk_out: tuple[Tensor, Tensor]


class _Thread(threading.local):
    pending: _Pending | None = None


_thread = _Thread()


def wrap() -> None:
    """Makes ROCm's `fused_moe` look for logits, once; it is `rocm_sort.available`."""
    module: Any = rocm_sort.upstream().module
    own = module.fused_moe
    if getattr(own, _MARK, False):
        return

    names = tuple(inspect.signature(own).parameters)[len(rocm_sort.LAYER_FIRST) :]

    @functools.wraps(own)
    def fused_moe(*args: Any, **keywords: Any) -> Any:
        pending, _thread.pending = _thread.pending, None
        if pending is None:
            return own(*args, **keywords)
        return _from_logits(pending, names, *args, **keywords)

    setattr(fused_moe, _MARK, True)
    module.fused_moe = fused_moe


def _from_logits(
    pending: _Pending,
    names: tuple[str, ...],
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weight: Tensor,
    topk_ids: Tensor,
    *args: Any,
    **keywords: Any,
) -> Tensor:
    """A call of ROCm's `fused_moe`, whose arguments behind the ids have these names."""
    ours = pending.topk_out
    for name, got, expected in (
        ("topk_weight", topk_weight, ours[0]),
        ("topk_ids", topk_ids, ours[1]),
    ):
        if got.data_ptr() != expected.data_ptr() or got.shape != expected.shape:
            raise ValueError(
                f"{name}: expected the tensor that was given to vLLM's experts, got another"
            )
    keywords.update(zip(names, args, strict=False))
    output: Tensor = rocm_aiter.fused_moe_from_logits(
        hidden_states, w1, w2, pending.logits, pending.topk, rule=pending.rule,
        correction_bias=pending.correction_bias, topk_out=ours, **keywords,
    )  # fmt: skip
    return output


@contextmanager
def routed(
    logits: Tensor,
    topk: int,
    rule: RoutingRule,
    correction_bias: Tensor | None,
    topk_out: tuple[Tensor, Tensor],
) -> Iterator[None]:
    """The next call of ROCm's `fused_moe` in this thread routes by these logits, into `topk_out`.

    Raises:
        RuntimeError: there was no such call; the top-k tensors are unfilled.
    """
    _thread.pending = _Pending(logits, topk, rule, correction_bias, topk_out)
    try:
        yield
        if _thread.pending is not None:
            raise RuntimeError(
                "vLLM's experts: expected one call of ROCm's aiter.fused_moe.fused_moe, got none"
            )
    finally:
        _thread.pending = None
