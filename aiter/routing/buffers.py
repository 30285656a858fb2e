"""Which tensors does a routing call write to: new ones or the caller's?

New ones are separate tensors, as a caller may keep one and drop the others; allocating them is most
of the host time of a call. torch.empty spends more on its arguments and on PyTorch's dispatcher
than on the memory, so an eager call takes the allocators that PyTorch made for the code that
torch.compile generates. What these do not do, the dispatched function does instead: memory on a
device that is not the current one, the filling of new memory under
`torch.use_deterministic_algorithms`, the refusal of quantised dtypes, and everything in a PyTorch
without them.

`python -m timeit` on the CPU of an AMD EPYC, Python 3.11, PyTorch 2.13, 2026-11-23, a tensor each:
the allocator used 0.4 us; torch.empty of an int 1.0 us, of a tuple 1.5 us; torch.empty_strided 1.0
us, in two dimensions 1.1 us; a bound new_empty of an int 0.8 us, of a tuple 1.3 us;
torch.empty_like 0.8 us. Rejected: one allocation with views of it as outputs, 14 us for the five
(`op_tests/bench_host.py`), and outputs that share a storage; memory made by DLPack's exchange API,
as `Tensor.record_stream` passes over what PyTorch's allocator did not make; outputs kept for later
calls, whose memory would have to be guarded across streams, threads and graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .arguments import check_int, check_strided, first_sharing

SortedBuffers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
TopkOut = tuple[Tensor, Tensor]  # weights float32 [M, K], ids int32 [M, K]
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype
Allocator = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]

TOKEN_BITS = 24
"""`sorted_ids` holds the token in bits 0..23 and the slot in bits 24..31."""

TOKEN_MASK = (1 << TOKEN_BITS) - 1

BUFFER_NAMES = ("sorted_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids", "moe_buf")
TOPK_NAMES = ("topk_out[0]", "topk_out[1]")

_QUANTISED = frozenset(
    getattr(torch, name)
    for name in ("quint8", "qint8", "qint32", "quint4x2", "quint2x4")
    if hasattr(torch, name)
)
_native: Any = torch._C
_quick: Any = getattr(getattr(_native, "_dynamo", None), "guards", None)
_quick_cpu: Allocator | None = getattr(_quick, "_empty_strided_cpu", None)
_quick_gpu: Allocator | None = getattr(_quick, "_empty_strided_cuda", None)
_current_gpu: Callable[[], int] | None = getattr(_native, "_cuda_getDevice", None)
_deterministic: Callable[[], bool] = _native._get_deterministic_algorithms


class Buffers(NamedTuple):
    """The sizes of a call's outputs: numbers of items, the shape and the dtype of moe_buf."""

    slots: int  # of sorted_ids: S = M*K + E*B - K
    weights: int  # of sorted_weights: S
    blocks: int  # of sorted_expert_ids: S / B, rounded up
    moe_buf: tuple[int, int]
    moebuf_dtype: torch.dtype

    @classmethod
    def of(
        cls,
        tokens: int,
        topk: int,
        num_experts: int,
        model_dim: int,
        moebuf_dtype: torch.dtype,
        block_size: int,
    ) -> Buffers:
        """The sizes for M tokens of `topk` slots each; nothing is checked."""
        slots, blocks = sorted_sizes(tokens, topk, num_experts, block_size)
        return cls(slots, slots, blocks, (tokens, model_dim), moebuf_dtype)


class Layouts(NamedTuple):
    """Tensors as they are allocated, and the quick allocator if there is one for them."""

    quick: Allocator | None
    tensors: tuple[Layout, ...]


def sorted_sizes(tokens: int, topk: int, num_experts: int, block_size: int) -> tuple[int, int]:
    """S = M*K + E*B - K slots of the sorted buffers, and ceil(S / B) blocks."""
    slots = tokens * topk + num_experts * block_size - topk
    return slots, (slots + block_size - 1) // block_size


def check_size(name: str, value: int, low: int = 1) -> None:
    """Raises TypeError for what is not an int, ValueError for an int that is no size."""
    check_int(name, value)
    if not low <= value < 2**31:
        raise ValueError(f"{name}: expected a value from {low} to {2**31 - 1}, got {value}")


def checked_buffers(
    tokens: int,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int,
) -> Buffers:
    """As `Buffers.of`, with a check of what the sizes are computed from; the ops check the rest."""
    check_size("topk", topk)
    check_size("num_experts", num_experts)
    check_size("block_size", block_size)
    check_size("model_dim", model_dim, low=0)
    if topk > num_experts:
        raise ValueError(f"topk: expected at most num_experts = {num_experts}, got {topk}")
    if not isinstance(moebuf_dtype, torch.dtype):
        raise TypeError(f"moebuf_dtype: expected a torch.dtype, got {type(moebuf_dtype).__name__}")
    if moebuf_dtype in _QUANTISED:
        raise ValueError(f"moebuf_dtype: expected one that is not quantised, got {moebuf_dtype}")
    buffers = Buffers.of(tokens, topk, num_experts, model_dim, moebuf_dtype, block_size)
    if buffers.slots >= 2**31:
        raise ValueError(
            f"block_size: expected M*topk + num_experts*block_size - topk below {2**31}, got"
            f" {buffers.slots}"
        )
    return buffers


def sorted_layouts(buffers: Buffers, device: torch.device) -> Layouts:
    """How the five outputs of these sizes are allocated on `device`."""
    return _layouts(
        device,
        ((buffers.slots,), torch.int32),
        ((buffers.weights,), torch.float32),
        ((buffers.blocks,), torch.int32),
        ((2,), torch.int32),
        (buffers.moe_buf, buffers.moebuf_dtype),
    )


def chain_layouts(tokens: int, topk: int, workspace_bytes: int, device: torch.device) -> Layouts:
    """How what the chain keeps between its launches is allocated on `device`.

    Weights float32 [M, K], ids int32 [M, K], and the workspace if there is one.
    """
    chosen = (tokens, topk)
    workspace = [((workspace_bytes,), torch.uint8)] if workspace_bytes else []
    return _layouts(device, (chosen, torch.float32), (chosen, torch.int32), *workspace)


def logits_layouts(tokens: int, width: int, device: torch.device) -> Layouts:
    """How the logits float32 [tokens, width] of a router are allocated on `device`."""
    return _layouts(device, ((tokens, width), torch.float32))


def scratch_layouts(num_bytes: int, device: torch.device) -> Layouts:
    """How `num_bytes` of scratch are allocated on `device`."""
    return _layouts(device, ((num_bytes,), torch.uint8))


def _layouts(device: torch.device, *tensors: tuple[tuple[int, ...], torch.dtype]) -> Layouts:
    """Contiguous tensors of one or two dimensions, by shape and dtype."""
    quick = None
    if not any(dtype in _QUANTISED for _, dtype in tensors):
        if device.type == "cpu":
            quick = _quick_cpu
        elif device.type == "cuda" and device.index is not None and _current_gpu is not None:
            quick = _quick_gpu
    return Layouts(
        quick,
        tuple(
            (shape, (1,) if len(shape) == 1 else (shape[1] or 1, 1), dtype)
            for shape, dtype in tensors
        ),
    )


def allocate(layouts: Layouts, device: torch.device) -> list[Tensor]:
    """The tensors, uninitialised, on `device`, that of the layouts; not under a tracer."""
    quick, tensors = layouts
    if (
        quick is None
        or _deterministic()
        or (quick is _quick_gpu and _current_gpu is not None and _current_gpu() != device.index)
    ):
        return empty(layouts, device)
    return [quick(*layout) for layout in tensors]


def empty(layouts: Layouts, device: torch.device) -> list[Tensor]:
    """As `allocate`, through PyTorch's dispatcher, which tracers see."""
    return [
        torch.empty_strided(shape, strides, dtype=dtype, device=device)
        for shape, strides, dtype in layouts.tensors
    ]


def empty_topk(tokens: int, topk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights float32 [M, K] and ids int32 [M, K], uninitialised; also under a tracer."""
    shape = (tokens, topk)
    weights = torch.empty(shape, dtype=torch.float32, device=device)
    return weights, torch.empty(shape, dtype=torch.int32, device=device)


def five(tensors: Sequence[Tensor]) -> SortedBuffers:
    """The outputs as a tuple."""
    ids, weights, experts, num_valid, moe_buf = tensors
    return ids, weights, experts, num_valid, moe_buf


def given(out: SortedBuffers, expected: Buffers) -> SortedBuffers:
    """The caller's outputs, if they have the sizes of the call; the ops check everything else."""
    try:
        # NOTE: the first two are told 0.3 us sooner than that they are sequences.
        if not isinstance(out, (tuple, list, Sequence)):
            raise TypeError
        ids, weights, experts, _, moe_buf = out
        sizes = (ids.numel(), weights.numel(), experts.numel(), moe_buf.shape, moe_buf.dtype)
        fits = sizes == expected
    except (AttributeError, RuntimeError, TypeError, ValueError):  # RuntimeError of a nested tensor
        fits = False
    if not fits:
        _refuse_out(out, expected)
    return out


def given_topk(topk_out: TopkOut, like: Tensor) -> None:
    """Raises unless `topk_out` is weights float32 and ids int32 of the shape and device of `like`."""
    if not isinstance(topk_out, tuple) or len(topk_out) != 2:
        got = f"{len(topk_out)}" if isinstance(topk_out, tuple) else type(topk_out).__name__
        raise TypeError(f"topk_out: expected a tuple of two tensors or None, got {got}")
    for i, (tensor, dtype) in enumerate(zip(topk_out, (torch.float32, torch.int32), strict=True)):
        name = TOPK_NAMES[i]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if (tensor.shape, tensor.dtype, tensor.device) != (like.shape, dtype, like.device):
            raise ValueError(
                f"{name}: expected {dtype} {list(like.shape)} on {like.device}, got"
                f" {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def check_topk_memory(topk_out: TopkOut, others: Mapping[str, Tensor | None]) -> None:
    """Raises unless `topk_out` are rows that share no memory, with each other or `others`, by name."""
    for name, tensor in zip(TOPK_NAMES, topk_out, strict=True):
        if not tensor.numel():
            continue
        rows, slots = tensor.shape
        if slots > 1 and tensor.stride(1) != 1:
            raise ValueError(f"{name}: expected inner stride 1, got {tensor.stride(1)}")
        if rows > 1 and tensor.stride(0) < slots:
            raise ValueError(
                f"{name}: expected rows that do not overlap, of stride {slots} or more, got"
                f" {tensor.stride(0)}"
            )
    named = {**dict(zip(TOPK_NAMES, topk_out, strict=True)), **others}
    for name, tensor in zip(TOPK_NAMES, topk_out, strict=True):
        del named[name]
        other = first_sharing(tensor, named)
        if other is not None:
            raise ValueError(
                f"{name}: expected memory of its own, got memory that overlaps with {other}"
            )


def _refuse_out(out: object, expected: Buffers) -> NoReturn:
    """Raises what is wrong with `out`."""
    if not isinstance(out, Sequence) or len(out) != len(BUFFER_NAMES):
        got = f"{len(out)} of them" if isinstance(out, Sequence) else type(out).__name__
        raise TypeError(f"out: expected {len(BUFFER_NAMES)} tensors or None, got {got}")
    shapes = ([expected.slots], [expected.slots], [expected.blocks], [2], list(expected.moe_buf))
    for name, tensor, shape in zip(BUFFER_NAMES, out, shapes, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"out: expected a tensor as {name}, got {type(tensor).__name__}")
        check_strided(name, tensor)
        if list(tensor.shape) != shape:
            raise ValueError(f"out: expected {name} of shape {shape}, got {list(tensor.shape)}")
    raise ValueError(f"out: expected moe_buf of dtype {expected.moebuf_dtype}, got {out[4].dtype}")
