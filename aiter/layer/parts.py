"""What are the experts of a layer? Their weights, and what lies between the two products."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .types import ActivationType

Activation = ActivationType | Callable[[Tensor], Tensor]
"""What lies between the products: a known one, or a function from [R, N1] to [R, inter], row by row."""

SWIGLU_LIMIT = 7.0
SWIGLU_ALPHA = 1.702


class Experts(NamedTuple):
    """The weights of E local experts and what lies between the two products.

    w1 [E, N1, D] with N1 = 2*inter (gate and up) or inter, w2 [E, D, inter]; any strides.
    bias1 [E, N1] and bias2 [E, D], or None. `interleaved`: gate and up take turns along N1 instead
    of one after the other.
    """

    w1: Tensor
    w2: Tensor
    bias1: Tensor | None
    bias2: Tensor | None
    activation: Activation
    interleaved: bool
    swiglu_limit: float = SWIGLU_LIMIT
