"""How is a Triton kernel compiled for known constants, and launched with little host time?

A `Launch` is one kernel with all of its constants and options, compiled for the device it is used on
and called with pointers. Triton's own call looks at every argument each time to find out which variant
it needs: 10 to 20 us of host time for a kernel. Here the constants follow from the layer's plan,
which is looked up once per call (`triton_experts`), and a launch goes to the compiled kernel's own
launcher with plain integers, as Triton's call does in the end.

Variants are compiled by `triton.compile` from a signature that is written out here, the same way for a
device that is there and for one that is not (`compile_for`, which tests and `rocm` checks use); Triton
keeps what it compiled in its cache folder. In Triton's interpreter nothing is compiled, and tensors
are passed as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; what Triton may assume of a pointer that is said to be aligned
SLOW_SECONDS = 1.0  # a compilation that takes longer is logged

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}


class Kernel(NamedTuple):
    """A kernel and everything that its machine code depends on; hashable.

    Attributes:
        name: of a function in `triton_kernels`, or in `triton_hopper`.
        types: Triton's type of every argument that is not a constant: "*bf16", "i32", ...
        aligned: which of them are pointers to multiples of ALIGNMENT.
        constants: the arguments that are constants, by name, in the function's order.
        options: num_warps, num_stages and more of Triton's compiler.
    """

    name: str
    types: tuple[str, ...]
    aligned: tuple[bool, ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


def function_of(kernel: Kernel) -> Any:
    """The Triton function."""
    from . import triton_kernels

    if kernel.name.startswith("hopper"):
        from . import triton_hopper

        return getattr(triton_hopper, kernel.name)
    return getattr(triton_kernels, kernel.name)


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter (TRITON_INTERPRET=1)."""
    from triton.runtime.interpreter import InterpretedFunction

    from . import triton_kernels

    return isinstance(triton_kernels.first_product, InterpretedFunction)


def compile_for(kernel: Kernel, target: Any = None) -> Any:
    """The compiled kernel for a `triton.backends.compiler.GPUTarget`; None for the current device."""
    import triton
    from triton.compiler import ASTSource

    function = function_of(kernel)
    names = function.arg_names
    constants = dict(kernel.constants)
    kinds = dict(zip((n for n in names if n not in constants), kernel.types, strict=True))
    signature = {name: kinds.get(name, "constexpr") for name in names}
    aligned = dict(zip(kinds, kernel.aligned, strict=True))
    attributes = {
        (index,): [["tt.divisibility", ALIGNMENT]]
        for index, name in enumerate(names)
        if aligned.get(name)
    }
    if getattr(function, "is_gluon", bool)():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options=dict(kernel.options))


@cache
def _compiled(kernel: Kernel, device: torch.device) -> Any:
    """The kernel for a device, which is the current one; loaded."""
    from ..jit.log import get_logger

    start = time.monotonic()
    compiled = compile_for(kernel)
    compiled._init_handles()
    seconds = time.monotonic() - start
    if seconds > SLOW_SECONDS:
        get_logger().info("compiled the Triton kernel %s in %.1f s", kernel.name, seconds)
    return compiled


def make_launch(kernel: Kernel, programs: int, device: torch.device) -> Callable[..., None]:
    """A function of (stream, *arguments) that launches `programs` programs of a kernel.

    Arguments are tensors in the interpreter, else addresses and integers; tensor descriptors in both.
    """
    function = function_of(kernel)
    if interpreted():
        constants: Mapping[str, Any] = dict(kernel.constants)

        def interpret(stream: int, *arguments: Any) -> None:
            function[(programs,)](*arguments, **constants)

        return interpret
    with torch.cuda.device(device):
        compiled = _compiled(kernel, device)
    run, handle, metadata = compiled.run, compiled.function, compiled.packed_metadata
    constant_values = tuple(value for _, value in kernel.constants)

    def launch(stream: int, *arguments: Any) -> None:
        run(
            programs, 1, 1, stream, handle, metadata, None, None, None, *arguments, *constant_values
        )

    return launch


class Place:
    """Where a tensor lies and of what it is, all that a tensor descriptor asks; keeps no memory."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def address(tensor: Tensor) -> int:
    """What a compiled kernel is given for a tensor."""
    return tensor.data_ptr()


def itself(tensor: Tensor) -> Tensor:
    """What an interpreted kernel is given for a tensor."""
    return tensor
