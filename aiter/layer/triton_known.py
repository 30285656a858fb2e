"""Which calls of a layer on the Triton backend have been made before? Those skip checks and lookups.

A call is known by everything that its checks and its plan look at: the plain arguments, what the hidden
states and the logits are like (dtype, shape, strides, device, alignment), and, of weights and biases,
where they lie as well, so that their arguments for the kernels are known, too. Nothing is known by the
identity of a Python object: a weight that was given other memory, strides or a dtype in place is
another key. The logits' remaining properties, the mask and `num_local_tokens` are asked by the routing
each time, which has its own memory of calls.

Host time is what an eager decode step pays per layer: checks, backend, plan and arguments are more of
it than the launches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.compiler import is_dynamo_compiling

from .triton_experts import Fixed
from .triton_launch import ALIGNMENT
from .triton_plan import Plan

MOST_KNOWN = 4096  # then all are dropped; a server has some sizes of M per layer


class Known(NamedTuple):
    """What a call's key leads to: the sort's block size, the output's dtype, launches, arguments."""

    block: int
    dtype: torch.dtype
    plan: Plan
    fixed: Fixed


_known: dict[tuple[Any, ...], Known] = {}


def key_of(
    hidden_states: Tensor,
    gating_output: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    plain: tuple[Any, ...],
) -> tuple[Any, ...] | None:
    """The key of a call on a GPU; None for what no key is made for: tracers, gradients, odd types.

    Args:
        weights: w1, w2, bias1, bias2.
        plain: the other arguments that are no tensors, and which tensors there are none of.
    """
    if is_dynamo_compiling() or _len_torch_dispatch_stack():
        return None
    if type(hidden_states) is not Tensor or type(gating_output) is not Tensor:
        return None
    w1, w2, bias1, bias2 = weights
    if not isinstance(w1, Tensor) or not isinstance(w2, Tensor) or not hidden_states.is_cuda:
        return None
    if torch.is_grad_enabled() and (
        hidden_states.requires_grad or w1.requires_grad or w2.requires_grad
        or (bias1 is not None and bias1.requires_grad)
        or (bias2 is not None and bias2.requires_grad)
    ):  # fmt: skip
        return None
    return (
        plain, hidden_states.dtype, hidden_states.shape, hidden_states.stride(),
        hidden_states.device, hidden_states.data_ptr() % ALIGNMENT, gating_output.shape,
        w1.data_ptr(), w1.dtype, w1.shape, w1.stride(),
        w2.data_ptr(), w2.dtype, w2.shape, w2.stride(),
        None if bias1 is None else (bias1.data_ptr(), bias1.dtype, bias1.shape, bias1.stride()),
        None if bias2 is None else (bias2.data_ptr(), bias2.dtype, bias2.shape, bias2.stride()),
    )  # fmt: skip


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
    """Drops all known calls."""
    _known.clear()
