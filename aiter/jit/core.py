"""How does a Python function call into a compiled module?

`compile_ops` turns a typed stub into the function of the same name in a module. The device of the
first tensor parameter chooses the target. The first call on a device loads (and if need be builds)
the module; every later one is a dictionary lookup by (device, wave override) and the call itself:
no environment read, no text formatting. Measured with `op_tests/jit/bench_loader.py`, that adds
0.25 us to a call, of which 0.1 us is PyTorch making the device object.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from .errors import LoadError, TargetError
from .target import cpu_wave_override, target_for

if TYPE_CHECKING:
    from .load import Loader

F = TypeVar("F", bound=Callable[..., Any])

DEVICE_TYPES = ("cpu", "cuda")  # of the tensors that there is a target for
_TENSOR_ANNOTATIONS = (torch.Tensor, "torch.Tensor", "Tensor")


def module_for(name: str, device: torch.device | str) -> ModuleType:
    """The compiled module `name` for `device`, built first if need be.

    Raises the errors of `Loader.load`; a device that is not there, or has no target, is a TargetError.
    """
    return _default_loader().load(name, target_for(indexed(device)))


def compile_ops(
    module: str, fc_name: str | None = None, loader: Loader | None = None
) -> Callable[[F], F]:
    """Makes a stub call its compiled namesake with the arguments unchanged.

    Args:
        module: the module's name in the compiler config.
        fc_name: the name in the module, if it is not the stub's.
        loader: where modules come from; None for the package's own.

    Raises:
        TypeError: at decoration, if no parameter is annotated as torch.Tensor; at a call, if the
            first such argument is not a tensor.
        ValueError: at a call, if that tensor is on a device that no target is for.
        JitError: at the first call on a device, as in `Loader.load`.
    """

    def decorate(stub: F) -> F:
        index, parameter = _tensor_parameter(stub)
        name = fc_name or stub.__name__
        bound: dict[int | None, dict[torch.device, Callable[..., Any]]] = {}
        wave_override = cpu_wave_override.get

        def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
            """The function for the tensor's device; found in `bound` but for the first call."""
            if len(args) <= index and parameter not in kwargs:
                raise TypeError(f"{stub.__name__}: expected the argument {parameter}, got none")
            tensor = args[index] if len(args) > index else kwargs[parameter]
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{parameter}: expected a tensor, got {type(tensor).__name__}")
            if tensor.device.type not in DEVICE_TYPES:
                raise ValueError(
                    f"{parameter}: expected a tensor on a cpu or cuda device, got one on"
                    f" {tensor.device}"
                )
            functions = bound.setdefault(wave_override(), {})
            if tensor.device not in functions:
                source = (loader or _default_loader()).load(module, target_for(tensor.device))
                if not hasattr(source, name):
                    raise LoadError(
                        f"module {module}: expected a function {name}, got a module with"
                        f" {', '.join(n for n in dir(source) if n[0] != '_') or 'no names'}"
                    )
                functions[tensor.device] = getattr(source, name)
            return functions[tensor.device]

        @functools.wraps(stub)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                function = bound[wave_override()][args[index].device]
            except (KeyError, IndexError, AttributeError, TypeError):
                function = None
            if function is None:
                function = bind(args, kwargs)
            return function(*args, **kwargs)

        return cast(F, call)

    return decorate


def _default_loader() -> Loader:
    # NOTE: imported late, as `import aiter` should not pay for what only a first call needs.
    from .load import default_loader

    return default_loader()


def _tensor_parameter(stub: Callable[..., Any]) -> tuple[int, str]:
    """Position and name of the first parameter that is annotated as a tensor."""
    for index, parameter in enumerate(inspect.signature(stub).parameters.values()):
        if parameter.annotation in _TENSOR_ANNOTATIONS:
            return index, parameter.name
    raise TypeError(
        f"{stub.__name__}: expected a parameter annotated as torch.Tensor, got"
        f" {inspect.signature(stub)}"
    )


def indexed(device: torch.device | str | int) -> torch.device:
    """`device`, with the current GPU's index if it is a GPU without one.

    Raises:
        TypeError, ValueError: it is nothing that names a device.
        TargetError: it names a GPU that this PyTorch does not see.
    """
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
        raise TypeError(
            f"device: expected a torch.device, a string or an int, got {type(device).__name__}"
        )
    # NOTE: PyTorch refuses a number where it has no accelerator, in words of its own.
    name = f"cuda:{device}" if isinstance(device, int) else device
    try:
        chosen = torch.device(name)
    except (RuntimeError, ValueError):
        raise ValueError(
            f"device: expected a name such as 'cpu' or 'cuda:0', got {device!r}"
        ) from None
    if chosen.type != "cuda":
        return chosen
    count = torch.cuda.device_count()
    if not 0 <= (chosen.index or 0) < count:
        there = ", ".join(f"cuda:{index}" for index in range(count)) or "it sees none"
        raise TargetError(
            f"device: expected a GPU that this PyTorch ({torch.__version__}) sees ({there}), got"
            f" {str(device)!r}"
        )
    return chosen if chosen.index is not None else torch.device("cuda", torch.cuda.current_device())
