"""Which launches are a layer on the Triton backend? A pure function of what its tensors are like.

A `Call` is everything that decides (`triton_call`), a `Plan` the launches with their grids and layout of
what lies between them: made once per call's shape, found again by one lookup. It depends on M through
the grids alone, which are upper bounds, and through the row of tiles that M leads to (`triton_configs`).
So a server compiles as many variants as there are rows, and plans are cheap: they share the compiled
kernels.

Sizes and strides are constants of the kernels: all layers of a model have the same, and the compiler
leaves out masks, folds the multiplications away and sees which loads are contiguous. M is none.

Long because every kernel's constants are written out where its launch is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..routing.buffers import Layouts, scratch_layouts
from . import triton_configs, triton_specialised, triton_tuned
from .triton_call import Call as Call
from .triton_call import Choice as Choice
from .triton_configs import Family, Layout, Row, Tile
from .triton_launch import ALIGNMENT, TYPES, Kernel, Place, address, itself, make_launch
from .types import ActivationType

MOST_PLANS = 4096
SUM_COLUMNS = 1024  # of a program of `sum_over_slots`
INT32 = 2**31
SCRATCH_ALIGNMENT = 256  # bytes, between the parts of a plan's scratch


@cache
def arch_of(device: torch.device) -> str:
    """The architecture that the configurations go by; "interpreter" on the CPU."""
    from ..jit.target import device_arch

    return "interpreter" if device.type == "cpu" else device_arch(device)


def layout_of(strides: tuple[int, ...]) -> Layout:
    """How a weight [E, columns, inner] lies in memory."""
    return "columns" if strides[1] < strides[2] else "inner"


def family_for(device: torch.device, shape1: tuple[int, ...], strides1: tuple[int, ...]) -> Family:
    """The tiles for weights w1 of a shape and strides: those measured on the device, or the table's."""
    layout = layout_of(strides1)
    if device.type == "cuda":
        num_experts, rows, inner = shape1
        found = triton_tuned.families(device).get((num_experts, rows, inner, layout))
        if found is not None:
            return found
    return triton_configs.family_of(arch_of(device), layout)


class Plan(NamedTuple):
    """The launches of a call and what lies between them.

    Attributes:
        first, second, last: called with the stream and the kernel's arguments; `last` is None for one
            token, where `second` writes the output.
        scratch: how the memory for `middle`, `entry` and `place` is allocated, as one.
        entry_at, place_at: where `entry` and `place` begin in it, in bytes.
        entries: M * K.
        describe1, describe2: make the argument for the weights from a tensor.
        views: in the interpreter, which takes no addresses: shapes and dtypes of the three.
    """

    first: Callable[..., None]
    second: Callable[..., None]
    last: Callable[..., None] | None
    scratch: Layouts
    entry_at: int
    place_at: int
    entries: int
    describe1: Callable[[Tensor], Any]
    describe2: Callable[[Tensor], Any]
    views: tuple[tuple[tuple[int, ...], torch.dtype], ...] | None


def _assemble(
    call: Call,
    launches: tuple[Callable[..., None], Callable[..., None], Callable[..., None] | None],
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    entry_dtype: torch.dtype,
    describe: tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]],
) -> Plan:
    """A plan from its launches and the shapes of `middle`, `entry` and `place`."""
    views = tuple(zip(shapes, (call.dtype, entry_dtype, torch.int32), strict=True))
    ends = [0]
    for shape, dtype in views:
        size = math.prod(shape) * dtype.itemsize
        ends.append(ends[-1] + -(-size // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT)
    return Plan(
        *launches,
        scratch_layouts(ends[3], call.device),
        ends[1],
        ends[2],
        call.tokens * call.topk,
        *describe,
        views if call.device.type == "cpu" else None,
    )


@lru_cache(MOST_PLANS)
def make_plan(call: Call) -> Plan:
    """The plan of a call; compiles what is not compiled."""
    if call.choice is None:
        num_experts = max(1, (call.slots - (call.tokens - 1) * call.topk) // call.block)
        entries = call.tokens * call.topk / num_experts
        family = family_for(call.device, call.shape1, call.strides1)
        row = triton_configs.row_for(family, entries, call.block, call.dtype.itemsize)
    else:
        family, row = call.choice
    if call.tokens == 1 and call.block == 1:
        return _plan_one(call, family)
    return _plan_tiles(call, row)


def _plan_tiles(call: Call, row: Row) -> Plan:
    entries = call.tokens * call.topk
    # NOTE: an expert without a token has no block, so there are no more blocks than entries.
    blocks = min(call.slots // call.block, entries)
    _, model_dim, inter = call.shape2
    first_tile = row.first
    if first_tile.desc and not _describable(call, call.strides1):
        # NOTE: with addresses of the weights beside them, the sums of 128 x 256 do not fit in registers.
        first_tile = replace(first_tile, columns=first_tile.columns // 2, desc=False)
    first, describe1 = first_kernel(call, first_tile)
    second, describe2 = second_kernel(call, row.second)
    by_slot = second.name == triton_specialised.NAME
    columns = min(SUM_COLUMNS, _power(model_dim))
    last = Kernel(
        "sum_over_slots",
        (_pointer(call.dtype), "*i32", "*fp32", _pointer(call.out_dtype)),
        (True,) * 4,
        (
            ("D", model_dim), ("TOPK", call.topk), ("WEIGHT_FIRST", call.weight_first),
            ("COMPLETE", call.complete), ("BY_SLOT", by_slot), ("OVERLAP", overlaps(call.device)),
            ("BN", columns),
        ),
        _options(call.device, 4, 1),
    )  # fmt: skip

    def launch(kernel: Kernel, tile: Tile, width: int) -> Callable[..., None]:
        programs = blocks * _tiles(call.block, tile.rows) * _tiles(width, tile.columns)
        shared = kernel.name == triton_specialised.NAME or tile.persistent
        if shared:
            programs = min(programs, max(1, tile.persistent) * processors(call.device))
        return make_launch(kernel, programs, call.device)

    first_launch = launch(first, first_tile, inter)
    second_launch = launch(second, row.second, model_dim)
    slots = blocks * call.block
    if first.name == triton_specialised.NAME:
        first_launch = triton_specialised.first_launch(first_launch, call, first_tile, slots)
    if by_slot:
        second_launch = triton_specialised.second_launch(second_launch, call, row.second, slots)
    return _assemble(
        call,
        (
            first_launch,
            second_launch,
            make_launch(last, call.tokens * _tiles(model_dim, columns), call.device),
        ),
        ((slots, inter), (slots if by_slot else entries, model_dim), (entries,)),
        call.dtype,
        (describe1, describe2),
    )


def first_kernel(call: Call, tile: Tile) -> tuple[Kernel, Callable[[Tensor], Any]]:
    """`first_product` for a call, and what makes its weights' argument."""
    if tile.specialised and triton_specialised.allowed(call, tile, True, _capability(call.device)):
        return triton_specialised.hopper_kernel(call, tile, True)
    _, width, model_dim = call.shape1
    inter = call.shape2[2]
    gated = width == 2 * inter
    desc = tile.desc and _describable(call, call.strides1)
    two = gated and not call.interleaved and (desc or call.strides1[2] != 1)
    columns = tile.columns * (2 if gated and not two else 1)
    weight, describe = _weight(call, call.strides1, columns, tile.inner, desc)
    pointer = _pointer(call.dtype)
    bias, bias_strides = _bias(call.dtype, call.bias1)
    kernel = Kernel(
        "first_product",
        (pointer, weight, bias, "*i32", "*fp32", "*i32", "*i32", pointer, "*i32", "i32"),
        (call.aligned, call.aligned and not desc, False, *(True,) * 6, False),
        (
            ("D", model_dim), ("INTER", inter), ("TOPK", call.topk), ("SLOTS", call.block),
            ("HIDDEN_ROW", call.hidden_strides[0]), ("HIDDEN_COLUMN", call.hidden_strides[1]),
            *_weight_constants(call.shape1, call.strides1), *bias_strides,
            ("GATED", gated), ("INTERLEAVED", call.interleaved), *_activation(call),
            ("WEIGHT_FIRST", call.weight_first), ("COMPLETE", call.complete), ("TWO", two),
            ("DESC", desc), ("OVERLAP", overlaps(call.device)), ("PRECISION", _precision(call)),
            ("BM", tile.rows), ("BN", tile.columns), ("BK", tile.inner), ("GROUP", tile.group),
            ("PERSISTENT", bool(tile.persistent)), ("HALVES", _halves(call, tile)),
        ),
        _options(call.device, tile.warps, tile.stages),
    )  # fmt: skip
    return kernel, describe


def second_kernel(call: Call, tile: Tile) -> tuple[Kernel, Callable[[Tensor], Any]]:
    """`second_product` for a call, and what makes its weights' argument."""
    if tile.specialised and triton_specialised.allowed(call, tile, False, _capability(call.device)):
        return triton_specialised.hopper_kernel(call, tile, False)
    _, model_dim, inter = call.shape2
    desc = tile.desc and _describable(call, call.strides2)
    weight, describe = _weight(call, call.strides2, tile.columns, tile.inner, desc)
    pointer = _pointer(call.dtype)
    bias, bias_strides = _bias(call.dtype, call.bias2)
    kernel = Kernel(
        "second_product",
        (pointer, weight, bias, "*i32", "*i32", "*i32", pointer, "*i32"),
        (True, call.aligned and not desc, False, *(True,) * 5),
        (
            ("D", model_dim), ("INTER", inter), ("TOPK", call.topk), ("SLOTS", call.block),
            *_weight_constants(call.shape2, call.strides2), *bias_strides, ("DESC", desc),
            ("OVERLAP", overlaps(call.device)), ("PREFETCH", _prefetch(call, tile)),
            ("PRECISION", _precision(call)),
            ("BM", tile.rows), ("BN", tile.columns), ("BK", tile.inner), ("GROUP", tile.group),
            ("PERSISTENT", bool(tile.persistent)), ("HALVES", _halves(call, tile)),
            ("TAIL", 0 if desc else _tail(model_dim, tile)),
        ),
        _options(call.device, tile.warps, tile.stages),
    )  # fmt: skip
    return kernel, describe


def _plan_one(call: Call, family: Family) -> Plan:
    _, width, model_dim = call.shape1
    inter = call.shape2[2]
    first, second = family.one_first, family.one_second
    gated = width == 2 * inter
    split = call.topk if family.split else 1
    counters = _tiles(model_dim, second.columns)
    pointer = _pointer(call.dtype)
    bias1, strides1 = _bias(call.dtype, call.bias1)
    bias2, strides2 = _bias(call.dtype, call.bias2)
    one_first = Kernel(
        "first_vector",
        (pointer, pointer, bias1, "*fp32", "*i32", "*i32", pointer, "*i32"),
        (call.aligned, call.aligned, False, *(True,) * 5),
        (
            ("D", model_dim), ("INTER", inter), ("HIDDEN_COLUMN", call.hidden_strides[1]),
            *_weight_constants(call.shape1, call.strides1), *strides1,
            ("GATED", gated), ("INTERLEAVED", call.interleaved), *_activation(call),
            ("WEIGHT_FIRST", call.weight_first),
            ("TWO", gated and not call.interleaved and call.strides1[2] != 1),
            ("OVERLAP", overlaps(call.device)), ("COUNTERS", counters if split > 1 else 0),
            ("BN", first.columns), ("BK", first.inner), ("STAGES", first.stages),
        ),
        _options(call.device, first.warps, first.stages),
    )  # fmt: skip
    one_second = Kernel(
        "second_vector",
        (pointer, pointer, bias2, "*fp32", "*i32", "*i32", "*fp32", "*i32",
         _pointer(call.out_dtype)),
        (True, call.aligned, False, *(True,) * 6),
        (
            ("D", model_dim), ("INTER", inter),
            *_weight_constants(call.shape2, call.strides2), *strides2,
            ("WEIGHT_FIRST", call.weight_first), ("OVERLAP", overlaps(call.device)),
            ("PREFETCH", _prefetch(call, second)), ("SPLIT", split),
            ("BN", second.columns), ("BK", second.inner), ("STAGES", second.stages),
        ),
        _options(call.device, second.warps, second.stages),
    )  # fmt: skip
    as_argument = itself if call.device.type == "cpu" else address
    return _assemble(
        call,
        (
            make_launch(one_first, call.topk * _tiles(inter, first.columns), call.device),
            make_launch(one_second, split * counters, call.device),
            None,
        ),
        ((call.topk, inter), (split, model_dim), (counters,)),
        torch.float32,
        (as_argument, as_argument),
    )


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, 1 of the interpreter."""
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _capability(device: torch.device) -> int:
    """Major compute capability of an NVIDIA GPU, 0 of everything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0]


def overlaps(device: torch.device) -> bool:
    """Whether a launch may start up before the one in front of it is over."""
    return _capability(device) >= 9


def _options(device: torch.device, warps: int, stages: int) -> tuple[tuple[str, Any], ...]:
    options: tuple[tuple[str, Any], ...] = (
        ("num_warps", warps), ("num_stages", stages), ("enable_fp_fusion", True),
    )  # fmt: skip
    return (*options, ("launch_pdl", True)) if overlaps(device) else options


def _halves(call: Call, tile: Tile) -> bool:
    """Whether a row tile whose second half is padding is multiplied as half a tile.

    Not where a block ends within the tile; and a product has 16 rows at least.
    """
    return tile.halves and not tile.persistent and tile.rows >= 32 and call.block % tile.rows == 0


def _tail(width: int, tile: Tile) -> int:
    """Columns of a narrower last tile; 0 if it needs more than half of the others' columns."""
    rest = max(16, _power(width % tile.columns))
    if not tile.tails or tile.persistent or not width % tile.columns or 2 * rest > tile.columns:
        return 0
    return rest


def _prefetch(call: Call, tile: Tile) -> int:
    """Lines that the second product asks for early; none where that could ask past the weights."""
    _, model_dim, inter = call.shape2
    if not overlaps(call.device) or model_dim % tile.columns:
        return 0
    rows = 64 if call.strides2[2] == 1 else tile.columns  # of the inner dimension, per line
    most = inter // rows
    return min(tile.prefetch, 1 << (most.bit_length() - 1)) if most else 0


def _weight(
    call: Call, strides: tuple[int, ...], columns: int, inner: int, desc: bool
) -> tuple[str, Callable[[Tensor], Any]]:
    """The type of a weight's argument, and what makes the argument from the tensor."""
    if not desc:
        return _pointer(call.dtype), itself if call.device.type == "cpu" else address
    by_inner = strides[2] == 1
    box = [1, columns, inner] if by_inner else [1, inner, columns]

    def describe(weight: Tensor) -> Any:
        from triton.tools.tensor_descriptor import TensorDescriptor

        view = weight if by_inner else weight.transpose(1, 2)
        place = Place(weight.data_ptr(), weight.dtype)
        return TensorDescriptor(place, list(view.shape), list(view.stride()), box)

    return f"tensordesc<{TYPES[call.dtype]}{box}>", describe


def _describable(call: Call, strides: tuple[int, ...]) -> bool:
    """Whether tensor descriptors may name a weight: compute capability 9, one dense dimension."""
    if not overlaps(call.device) or not call.aligned:
        return False
    dense, *others = sorted(strides)
    return dense == 1 and not any(other * call.dtype.itemsize % ALIGNMENT for other in others)


def _weight_constants(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[str, Any], ...]:
    wide = (shape[1] + 1024) * strides[1] + (shape[2] + 1024) * strides[2] >= INT32
    return ("W_E", strides[0]), ("W_N", strides[1]), ("W_K", strides[2]), ("WIDE", wide)


def _bias(
    dtype: torch.dtype, bias: tuple[Any, ...] | None
) -> tuple[str, tuple[tuple[str, Any], ...]]:
    if bias is None:
        return _pointer(dtype), (("BIAS_E", 0), ("BIAS_N", 0), ("HAS_BIAS", False))
    kind, (outer, inner) = bias
    return _pointer(kind), (("BIAS_E", outer), ("BIAS_N", inner), ("HAS_BIAS", True))


def _pointer(dtype: torch.dtype) -> str:
    return f"*{TYPES[dtype]}"


def _activation(call: Call) -> tuple[tuple[str, Any], ...]:
    # NOTE: a limit that nothing looks at makes no other kernel.
    is_swiglu = call.activation == ActivationType.Swiglu
    return ("ACTIVATION", call.activation), ("LIMIT", call.limit if is_swiglu else 0.0)


def _precision(call: Call) -> str:
    """float32 is multiplied as it is, and bfloat16 as float32 by the interpreter."""
    widened = call.device.type == "cpu" and call.dtype is torch.bfloat16
    return "interpreted" if widened else "ieee"


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
