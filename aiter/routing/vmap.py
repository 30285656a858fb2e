"""What does torch.func.vmap make of an op that writes to what it is given?

    for i in range(batch size): op(slice i of every tensor that is mapped over, the others as they are)

PyTorch does so itself for ops that return new tensors, and knows no way for ops that write. What an op
writes has to be mapped over as soon as anything is, or one slice would overwrite the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tracing import by_name

_native: Any = torch._C
_functorch: Any = _native._functorch


def once_per_slice(op: Any) -> Callable[..., None]:
    """The kernel for torch.func.vmap of a registered op that returns nothing.

    It raises ValueError, by the argument's name, for a tensor to write to that is not mapped over.
    """
    order = tuple(argument.name for argument in op._schema.arguments)
    written = tuple(
        argument.name
        for argument in op._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    )

    def call(*args: Any, **kwargs: Any) -> None:
        given = by_name(order, args) | kwargs
        size, mapped = _unwrapped(given)
        for name in written:
            if mapped and name not in mapped and isinstance(given.get(name), Tensor):
                raise ValueError(
                    f"{name}: expected a tensor that torch.func.vmap maps over, as every slice writes"
                    " to its own, got one for all slices"
                )
        with _native._ExcludeDispatchKeyGuard(
            _native.DispatchKeySet(_native.DispatchKey.FuncTorchBatched)
        ):
            for i in range(size):
                slices = {name: each.select(dim, i) for name, (each, dim) in mapped.items()}
                named = given | slices
                op(
                    *(named[name] for name in order[: len(args)]),
                    **{name: named[name] for name in kwargs},
                )

    return call


def _unwrapped(given: dict[str, Any]) -> tuple[int, dict[str, tuple[Tensor, int]]]:
    """The batch size, and what is mapped over, by name, with the dimension that is.

    Where nothing is, the size is 1.
    """
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    interpreter: Any = retrieve_current_functorch_interpreter()
    mapped = {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            tensor, dim = _functorch._unwrap_batched(value, interpreter.level())
            if dim is not None:
                mapped[name] = (tensor, dim)
    return interpreter.batch_size() if mapped else 1, mapped
