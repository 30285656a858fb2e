"""What does the fuzzer put in place of an argument?

One function per way to be wrong, or to be odd but right. Nothing here knows an op.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]

INTS = (0, -1, 1, 2, 2**15, 2**24, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**30)
NOT_INTS = (None, 1.5, "4", [3], True, float("nan"), b"1", object())
NOT_TENSORS = (None, 0, 1.0, "tensor", [1, 2], (3,), object(), torch.float32, bytearray(64))


def changed(rng: random.Random, arguments: Arguments, name: str) -> Any:
    """Something else in place of an argument."""
    value = arguments[name]
    if isinstance(value, bool):
        return rng.choice((None, 0, 1, "yes", 1.0, not value, torch.tensor(True)))
    if isinstance(value, int):
        if rng.random() < 0.3:
            return rng.choice(NOT_INTS)
        return rng.choice(
            (value + 1, value - 1, -value, torch.tensor(min(value, 9)), *_edges(name))
        )
    if isinstance(value, Tensor):
        if rng.random() < 0.15:
            return rng.choice(NOT_TENSORS)
        return rng.choice(_TENSOR_CHANGES)(rng, value, arguments)
    if isinstance(value, torch.dtype):
        return rng.choice((None, "float32", 4, torch.float16, torch.int8))
    if value is None:
        return rng.choice((0, "none", [], torch.zeros(3, dtype=torch.int32), torch.zeros(1)))
    raise TypeError(f"no change for {name} = {value!r}")


def _edges(name: str) -> tuple[int, ...]:
    # NOTE: where the op allocates what an int asks for, it is not asked for gigabytes.
    return tuple(i for i in INTS if i < 8 or i >= 2**31) if name in _ALLOCATING else INTS


_ALLOCATING = ("block_size", "model_dim", "topk", "num_experts")


def _other_device(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    return tensor.to("meta")


def _other_dtype(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    dtypes = (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16,
              torch.bool, torch.complex64, torch.uint8, torch.bfloat16)  # fmt: skip
    return tensor.to(rng.choice(dtypes))


def _same_bits(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    """The same memory under another dtype of the same size."""
    kinds = {4: (torch.int32, torch.float32), 2: (torch.float16, torch.bfloat16, torch.int16)}
    return tensor.view(rng.choice(kinds.get(tensor.dtype.itemsize, (tensor.dtype,))))


def _other_rank(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    which = rng.randrange(4)
    if which == 0:
        return tensor[None]
    if which == 1:
        return tensor.reshape(-1)
    if which == 2:
        return tensor.reshape((1,) * rng.choice((9, 30)) + tuple(tensor.shape))
    return tensor.reshape(-1)[:1].reshape(()) if tensor.numel() else tensor[None]


def _other_size(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        return tensor.new_zeros((3,))
    which = rng.randrange(4)
    if which == 0:
        return tensor[..., :-1]
    if which == 1:
        return tensor[:-1] if tensor.shape[0] else tensor
    if which == 2:
        return torch.cat((tensor, tensor))
    return tensor[..., :0]


def _spread(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    """The same shape over other memory, with gaps or with the axes' order changed."""
    if rng.random() < 0.5 or tensor.dim() < 2:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor.t().contiguous().t()


def _expanded(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    """One item or row for all, or for very many."""
    if tensor.numel() == 0:
        return tensor
    if rng.random() < 0.5 or tensor.dim() != 2:
        return tensor.reshape(-1)[:1].expand(tensor.numel()).reshape(tensor.shape)
    return tensor[:1].expand(rng.choice((2**24, 2**31, 2**40)), tensor.shape[1])


def _overlapping(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    """Another argument's memory, or rows that overlap each other."""
    others = [t for t in arguments.values() if isinstance(t, Tensor) and t.numel()]
    if rng.random() < 0.3 and tensor.dim() == 2 and tensor.is_contiguous():
        return tensor.as_strided(tensor.shape, (1, 1), tensor.storage_offset())
    other = rng.choice(others) if others else tensor
    shift = rng.choice((0, 0, 1))
    if other.dtype == tensor.dtype and other.numel() >= tensor.numel() + shift:
        return other.reshape(-1)[shift : shift + tensor.numel()].reshape(tensor.shape)
    return other


def misaligned(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    """The same values, one byte past where they may lie."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or not tensor.is_contiguous():
        return tensor
    memory = torch.zeros(tensor.numel() * tensor.dtype.itemsize + 1, dtype=torch.uint8)
    moved = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, offset=1, count=tensor.numel())
    return moved.reshape(tensor.shape).copy_(tensor)


def emptied(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    """A tensor whose memory was given back, as sharding does with parameters."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def _odd_kind(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Any:
    """Things that are nearly tensors."""
    which = rng.randrange(3)
    if which == 0:
        return tensor.cpu().float().numpy()
    if which == 1 and tensor.is_floating_point():
        return torch.nn.Parameter(tensor)
    return tensor.to_sparse() if tensor.dim() else tensor


def _other_values(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    """Values from anywhere, where the op has to read them."""
    if tensor.dtype == torch.int32:
        values = rng.choices((0, 1, 2, -1, 5, 2**31 - 1, -(2**31)), k=tensor.numel())
        return torch.tensor(values, dtype=torch.int32, device=tensor.device).reshape(tensor.shape)
    return tensor


_TENSOR_CHANGES = (
    _other_device, _other_dtype, _same_bits, _other_rank, _other_size, _spread, _expanded,
    _overlapping, misaligned, emptied, _odd_kind, _other_values,
)  # fmt: skip
