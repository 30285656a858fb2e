"""Which versions of PyTorch does this package run on, and what do the older ones lack?

Compiled modules ask nothing of PyTorch's headers, so that a version is a matter of names in Python.
Those that are younger than `OLDEST` and easily done without are here. What an older PyTorch has not got
at all is asked for where it is used: `torch.nn.functional.grouped_mm` (`layer.experts`), Triton with
tensor descriptors (`layer.triton_experts`), and the C functions for tensors, without which no call is
known (csrc/include/pybind_args.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OLDEST = (2, 6)

_native: Any = torch._C
_compiler: Any = torch.compiler


def parsed(version: str) -> tuple[int, ...]:
    """Major and minor of a version such as 2.13.0+cpu.

    Raises:
        ImportError: it is older than `OLDEST`.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(f"torch: expected PyTorch {oldest} or newer, got {version}")
    return numbers


VERSION = parsed(torch.__version__)


def some_requires_grad(*arguments: object) -> bool:
    """Whether a tensor among the arguments, or in a list there, requires grad; as PyTorch 2.8 has it."""
    for argument in arguments:
        for each in argument if isinstance(argument, list) else (argument,):
            if isinstance(each, Tensor) and each.requires_grad:
                return True
    return False


any_requires_grad: Callable[..., bool] = getattr(_native, "_any_requires_grad", some_requires_grad)


def is_exporting() -> bool:
    """Whether torch.export records the call; never before PyTorch 2.7, which does not tell."""
    # NOTE: `torch.compiler.is_exporting()` is true under every torch.compile up to PyTorch 2.11.
    flag: bool = getattr(_compiler, "_is_exporting_flag", False)
    return flag
