"""What decides the launches of a layer on the Triton backend?"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .triton_configs import Family, Row


class Call(NamedTuple):
    """Everything about a call that decides its launches; hashable."""

    device: torch.device
    dtype: torch.dtype
    out_dtype: torch.dtype
    tokens: int
    topk: int
    slots: int  # of sorted_ids
    block: int
    shape1: tuple[int, ...]
    shape2: tuple[int, ...]
    hidden_strides: tuple[int, ...]
    strides1: tuple[int, ...]
    strides2: tuple[int, ...]
    bias1: tuple[Any, ...] | None  # dtype and strides
    bias2: tuple[Any, ...] | None
    activation: int
    interleaved: bool
    limit: float  # of Swiglu
    weight_first: bool
    complete: bool
    aligned: bool
    choice: Choice | None = None


class Choice(NamedTuple):
    """Tiles that a measurement asks for instead of the known ones."""

    family: Family
    row: Row
