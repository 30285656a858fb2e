"""Which products of a layer are those of `triton_hopper`, and how are these launched?

A tile asks for it (`Tile.specialised`), and the device and the layer have to allow it: compute
capability 9.0, Triton with Gluon, gated Silu or Swiglu in 16 bits, blocks of as many slots as a tile has
rows, weights that are one matrix over all experts, rows that cp.async and descriptors can read. Where
they do not, the same tile is one of `triton_kernels`.

What a descriptor's store writes to is scratch of the call, so its descriptor is made with the call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from .triton_call import Call
from .triton_configs import Tile
from .triton_launch import ALIGNMENT, TYPES, Kernel, Place
from .types import ActivationType

ROWS = 128
INNER = 64
NAME = "hopper_product"
OLDEST = (3, 6)  # of Triton: `warp_specialize` took its arguments in another form before


@cache
def _gluon() -> bool:
    """Whether Triton brings the Gluon that `triton_hopper` is written in; its names come and go."""
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return False
    try:
        from . import triton_hopper  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def allowed(call: Call, tile: Tile, first: bool, capability: int) -> bool:
    """Whether a product is done by `triton_hopper`, on a device of a major compute capability."""
    shape, strides = (call.shape1, call.strides1) if first else (call.shape2, call.strides2)
    _, columns, inner = shape
    outer = columns * strides[1] if strides[2] == 1 else inner * strides[2]
    bias = call.bias1 if first else call.bias2
    return (
        capability == 9
        and call.dtype.itemsize == 2
        and tile.rows == call.block == ROWS
        and tile.inner == INNER
        and call.shape1[1] == 2 * call.shape2[2]
        and call.activation in (ActivationType.Silu, ActivationType.Swiglu)
        and not call.weight_first
        and call.aligned
        and call.hidden_strides[1] == 1
        and call.hidden_strides[0] * call.dtype.itemsize % ALIGNMENT == 0
        and min(strides[1:]) == 1
        and strides[0] == outer
        and inner % INNER == 0
        and columns % (ALIGNMENT // call.dtype.itemsize) == 0
        and (bias is None or bias[1][1] == 1)
        and _gluon()
    )


def hopper_kernel(call: Call, tile: Tile, first: bool) -> tuple[Kernel, Callable[[Tensor], Any]]:
    """The product as `hopper_product`, and what makes its weights' argument."""
    shape, strides = (call.shape1, call.strides1) if first else (call.shape2, call.strides2)
    bias = call.bias1 if first else call.bias2
    _, columns, inner = shape
    by_inner = strides[2] == 1
    two = first and not call.interleaved
    width = tile.columns * (2 if first and not two else 1)
    box = [width, tile.inner] if by_inner else [tile.inner, width]
    kind = TYPES[call.dtype]
    pointer = f"*{kind}"

    def describe(weight: Tensor) -> Any:
        view = weight if by_inner else weight.transpose(1, 2)
        return _descriptor(
            Place(weight.data_ptr(), weight.dtype), list(view.flatten(0, 1).shape), box
        )

    kernel = Kernel(
        NAME,
        (
            pointer, _boxes_type(kind, box), pointer if bias is None else f"*{TYPES[bias[0]]}",
            "*i32", "*i32", "*i32", _boxes_type(kind, [tile.rows, tile.columns]), "*i32", "i32",
        ),
        (True, False, False, True, True, True, False, True, False),
        (
            ("FIRST", first), ("INNER", inner), ("COLUMNS", columns // 2 if first else columns),
            ("TOPK", call.topk), ("ROW", call.hidden_strides[0] if first else inner),
            ("BIAS_E", 0 if bias is None else bias[1][0]), ("HAS_BIAS", bias is not None),
            ("ACTIVATION", call.activation),
            ("LIMIT", call.limit if call.activation == ActivationType.Swiglu else 0.0),
            ("BY_INNER", by_inner), ("TWO", two), ("COMPLETE", call.complete), ("BM", tile.rows),
            ("WIDTH", width), ("BK", tile.inner), ("OUT", tile.columns), ("GROUP", tile.group),
            ("STAGES", tile.stages), ("HALVES", tile.halves and not first),
        ),
        (("num_warps", tile.warps), ("enable_fp_fusion", True), ("launch_pdl", True)),
    )  # fmt: skip
    return kernel, describe


def first_launch(
    launch: Callable[..., None], call: Call, tile: Tile, slots: int
) -> Callable[..., None]:
    """The launch with the arguments of `first_product`."""
    inter, box = call.shape2[2], [tile.rows, tile.columns]

    def first(
        stream: int, hidden: Any, w1: Any, bias1: Any, ids: Any, weights: Any, experts: Any,
        valid: Any, middle: int, place: Any, entries: int,
    ) -> None:  # fmt: skip
        to = _descriptor(Place(middle, call.dtype), [slots, inter], box)
        launch(stream, hidden, w1, bias1, ids, experts, valid, to, place, entries)

    return first


def second_launch(
    launch: Callable[..., None], call: Call, tile: Tile, slots: int
) -> Callable[..., None]:
    """The launch with the arguments of `second_product`."""
    model_dim, box = call.shape2[1], [tile.rows, tile.columns]

    def second(
        stream: int, middle: Any, w2: Any, bias2: Any, ids: Any, experts: Any, valid: Any,
        entry: int, place: Any,
    ) -> None:  # fmt: skip
        to = _descriptor(Place(entry, call.dtype), [slots, model_dim], box)
        launch(stream, middle, w2, bias2, ids, experts, valid, to, place, 0)

    return second


def _layout() -> Any:
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(128, 16, 2)


def _boxes_type(kind: str, box: list[int]) -> str:
    return f"tensordesc<{kind}{box},{_layout()!r}>"


def _descriptor(base: Any, shape: list[int], box: list[int]) -> Any:
    """Of a dense matrix."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(base, shape, [shape[1], 1], box, _layout())
