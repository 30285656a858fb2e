"""Which calls of a layer on the Triton backend have been made before? Those skip checks and lookups.

A call is known by everything that its checks and its plan look at: the plain arguments, what the hidden
states and the logits are like (dtype, shape, strides, device, alignment), and, of weights and biases,
where they lie as well, so that their arguments for the kernels are known, too. Nothing is known by the
identity of a Python object: a weight that was given other memory, strides or a dtype in place is
another key. A rule counts by its packed numbers. The logits' remaining properties, the mask, the
correction bias and `num_local_tokens` are asked by the routing each time, which has its own memory of
calls and refuses their gradients; those of the tensors here are refused before a key is made.

Host time is what an eager decode step pays per layer: checks, backend, plan and arguments are more of
it than the launches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.rule import Packed, RoutingRule
from ..routing import known as routing_known
from ..routing.autograd import gradients_matter, refuse_gradients
from ..routing.tracing import traced
from . import triton_experts
from .triton_experts import Fixed
from .triton_launch import ALIGNMENT
from .triton_plan import Plan

MOST_KNOWN = 4096  # then all are dropped; a server has some sizes of M per layer


class Known(NamedTuple):
    """What a call's key leads to: what the routing is asked for, launches, arguments."""

    block: int
    num_experts: int
    dtype: torch.dtype  # of the output
    rule: RoutingRule
    plan: Plan
    fixed: Fixed


_known: dict[tuple[Any, ...], Known] = {}


def key_of(
    hidden_states: Tensor,
    gating_output: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    by_rule: bool | Packed,
    plain: tuple[Any, ...],
) -> tuple[Any, ...] | None:
    """The key of a call on a GPU; None for what no key is made for: tracers, transforms, odd types.

    Args:
        weights: w1, w2, bias1, bias2.
        by_rule: the rule, as a `Request` has it.
        plain: the other arguments that are no tensors, and which tensors there are none of.

    Raises:
        ValueError: a gradient would be lost.
    """
    w1, w2, bias1, bias2 = weights
    if traced(hidden_states) or not _is_plain(hidden_states) or not hidden_states.is_cuda:
        return None
    if not (_is_plain(gating_output) and _is_plain(w1) and _is_plain(w2)):
        return None
    if not ((bias1 is None or _is_plain(bias1)) and (bias2 is None or _is_plain(bias2))):
        return None
    if gradients_matter(hidden_states, w1, w2, bias1, bias2):
        refuse_gradients(hidden_states=hidden_states, w1=w1, w2=w2, bias1=bias1, bias2=bias2)
    return (
        plain, by_rule, by_rule.__class__, hidden_states.dtype, hidden_states.shape,
        hidden_states.stride(), hidden_states.device, hidden_states.data_ptr() % ALIGNMENT,
        gating_output.shape, gating_output.device, _of_weight(w1), _of_weight(w2),
        None if bias1 is None else _of_weight(bias1), None if bias2 is None else _of_weight(bias2),
    )  # fmt: skip


def _is_plain(tensor: object) -> bool:
    """Whether it is a tensor that no subclass gave other ways."""
    kind = tensor.__class__
    return kind is Tensor or kind is torch.nn.Parameter


def _of_weight(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def known(key: tuple[Any, ...] | None) -> Known | None:
    """What is remembered under a key."""
    if key is None:
        return None
    try:
        return _known.get(key)
    except TypeError:  # an argument that cannot be looked up, such as a list: the checks say so
        return None


def remember(key: tuple[Any, ...] | None, call: Known) -> None:
    """Makes a call known, once it was checked and made."""
    if key is not None:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[key] = call


def forget() -> None:
    """Drops all known calls, and what `triton_experts` knows of plans."""
    _known.clear()
    triton_experts.forget()


routing_known.on_forget(forget)
