"""Is a call to be run, or is somebody recording it?

Nothing here knows the ops; `graph` registers them under `NAMESPACE`, and who is to be recorded asks
for them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.compiler import is_dynamo_compiling

NAMESPACE = __name__.partition(".")[0]  # of the registered ops: the package's own name

_native: Any = torch._C
transforms_active: Callable[[], bool] = _native._are_functorch_transforms_active
tracing_state: Callable[[], object] = _native._get_tracing_state
_is_excluded: Callable[[Any], bool] = _native._dispatch_tls_is_dispatch_key_excluded
_TRACER = _native._dispatch_key_parse("Tracer")


def traced(tensor: object) -> bool:
    """Whether a call with this argument is being recorded, transformed or simulated, not run.

    True under torch.compile and torch.export, inside any dispatch mode (fake tensors, make_fx), in
    torch.jit.trace and torch.func's transforms, for a tensor subclass that dispatches by itself, such as
    a fake tensor outside its mode, and for a tensor on the meta device.
    """
    if is_dynamo_compiling() or _len_torch_dispatch_stack() or transforms_active():
        return True
    if tracing_state() is not None and not _is_excluded(_TRACER):
        return True  # NOTE: the tracer excludes itself while it runs what it has recorded.
    return simulated(tensor)


def recorded() -> bool:
    """What `traced` asks, but for the tensor: whether a call may be recorded or transformed now."""
    return (
        is_dynamo_compiling()
        or _len_torch_dispatch_stack() > 0
        or transforms_active()
        or tracing_state() is not None
    )


def simulated(tensor: object) -> bool:
    """What `traced` asks of the tensor: whether it is a meta one, or dispatches by itself."""
    if not isinstance(tensor, Tensor):
        return False
    if tensor.is_meta:
        return True
    kind = type(tensor)
    if kind is Tensor or kind is torch.nn.Parameter:
        return False
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def transformed() -> bool:
    """Whether torch.func transforms the call: what is written in place may be of too few dimensions."""
    return not is_dynamo_compiling() and transforms_active()


def by_name(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Values by their names, as far as there are both."""
    # NOTE: cut to one length, as torch.compile up to PyTorch 2.6 refuses what strict=False is for.
    return dict(zip(names[: len(values)], values[: len(names)], strict=True))


def refuse_some_meta(arguments: dict[str, object], first: object) -> None:
    """Raises ValueError, if `first` is on the meta device, for a tensor that is not.

    PyTorch's dispatcher would take a GPU's tensors for meta ones then, and nothing would be written.
    """
    if not isinstance(first, Tensor) or not first.is_meta:
        return
    tensors = {name: each for name, each in arguments.items() if isinstance(each, Tensor)}
    other = next((each.device for each in tensors.values() if not each.is_meta), None)
    for name, tensor in tensors.items():
        if other is not None and tensor.is_meta:
            raise ValueError(
                f"{name}: expected a tensor on {other}, as the others, got one on {tensor.device}"
            )


def all_meta(fake: Callable[..., Any], op: Any) -> Callable[..., Any]:
    """`fake`, unless some tensors are real: PyTorch's dispatcher asks it for one on the meta device."""
    order = tuple(argument.name for argument in op._schema.arguments)

    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = {**by_name(order, args), **kwargs}
        tensors = (each for each in arguments.values() if isinstance(each, Tensor))
        refuse_some_meta(arguments, next((each for each in tensors if each.is_meta), None))
        return fake(*args, **kwargs)

    return call


def registered(name: str) -> Any:
    """The registered op of that name."""
    return getattr(getattr(torch.ops, NAMESPACE), name)
