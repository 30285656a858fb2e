"""Which mistakes can a tensor or a flag have, whatever it is for? What no op checks itself.

Ops read tensors by their memory and check it. What PyTorch's own operations are given before, beside or
behind an op is checked here: they end the process for a tensor whose memory was given back, and say
nothing of the argument for one that is sparse or nested.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

from .tracing import traced

MOST_SLOTS = 255  # of a row: their number has 8 bits in sorted_ids


def check_bool(name: str, value: object) -> None:
    """Raises TypeError for what is not a bool: an int or a tensor there is another argument's."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_int(name: str, value: object) -> None:
    """Raises TypeError for what is not an int, a bool among that."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")


def check_number(name: str, value: object, expected: str = "a float") -> None:
    """Raises TypeError for what is neither an int nor a float, a bool among that."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def check_strided(name: str, tensor: Any) -> None:
    """Raises unless `tensor` is one, and has strides and memory.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is sparse or nested, or its memory was given back.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        got = "a nested one" if tensor.is_nested else str(tensor.layout)
        raise ValueError(f"{name}: expected a tensor with strides, got {got}")
    if not traced(tensor) and tensor.data_ptr() == 0 and tensor.numel():
        raise ValueError(
            f"{name}: expected a tensor with memory, got shape {list(tensor.shape)} without any"
        )


def is_matrix(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor [any, any]; a nested one, which has no shape, is none."""
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_nested


def refuse_matrix(name: str, value: object) -> NoReturn:
    """Raises that a tensor of rank 2 was expected."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    check_strided(name, value)
    raise ValueError(f"{name}: expected a tensor of rank 2, got shape {list(value.shape)}")


def check_topk(topk: int, num_experts: int) -> None:
    """Raises unless a row of so many logits has `topk` to choose; asked before outputs are allocated.

    Raises:
        TypeError, ValueError: it is no int, or none from 1 to that number or to 255.
    """
    check_int("topk", topk)
    most = min(num_experts, MOST_SLOTS)
    if not 1 <= topk <= most:
        raise ValueError(f"topk: expected 1 to {most} for {num_experts} experts, got {topk}")


def check_apart(name: str, tensor: Tensor, **others: object) -> None:
    """Raises ValueError if `tensor`, which is written to, may share memory with another one."""
    other = None if traced(tensor) else first_sharing(tensor, others)
    if other is not None:
        raise ValueError(f"{name}: expected memory of its own, got memory that {other} shares")


def first_sharing(tensor: Tensor, others: Mapping[str, object]) -> str | None:
    """The name of the first of `others` that may share memory with a tensor; None if none does."""
    first, last = _bytes_of(tensor)
    for name, other in others.items():
        if _has_addresses(other) and other.device == tensor.device:
            begin, end = _bytes_of(other)
            if first < end and begin < last:
                return name
    return None


def _has_addresses(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor whose shape and strides say where it is; the ops refuse any other."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte and behind the last one; equal of an empty tensor."""
    first = tensor.data_ptr()
    if tensor.numel() == 0:
        return first, first
    steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (steps + 1) * tensor.element_size()
