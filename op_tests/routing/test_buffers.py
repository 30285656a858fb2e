"""Are the outputs that a call allocates those that torch.empty would have made?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from torch import Tensor

from aiter import fused_moe
from aiter.routing import buffers as moe_buffers
from aiter.routing.buffers import Buffers, Layouts

SHAPES = ((6, 5), (0, 5), (6, 0), (1, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.complex64)
CPU = torch.device("cpu")


def devices() -> list[torch.device]:
    return [CPU, *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def layouts(
    device: torch.device,
    shape: tuple[int, int] = (6, 5),
    dtype: torch.dtype = torch.float32,
) -> Layouts:
    return moe_buffers.sorted_layouts(Buffers(40, 40, 5, shape, dtype), device)


def traits(tensor: Tensor) -> tuple[object, ...]:
    storage = tensor.untyped_storage()
    return (
        type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.layout,
        tensor.storage_offset(), tensor.requires_grad, tensor.is_inference(), tensor.is_leaf,
        storage.nbytes(), storage.resizable(),
    )  # fmt: skip


@pytest.mark.parametrize("inference", (False, True))
@pytest.mark.parametrize("device", devices(), ids=str)
def test_are_those_of_torch_empty(device: torch.device, inference: bool) -> None:
    """Also where another device is the current one."""
    for shape in SHAPES:
        for dtype in DTYPES:
            wanted = layouts(device, shape, dtype)
            with torch.inference_mode(inference):
                made = moe_buffers.allocate(wanted, device)
                for tensor, (size, _, item) in zip(made, wanted.tensors, strict=True):
                    expected = torch.empty(size, dtype=item, device=device)
                    assert traits(tensor) == traits(expected)


@pytest.mark.parametrize("device", devices(), ids=str)
def test_share_no_storage(device: torch.device) -> None:
    made = moe_buffers.allocate(layouts(device), device)
    assert len({tensor.untyped_storage().data_ptr() for tensor in made}) == 5


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("device", devices(), ids=str)
def test_are_filled_where_pytorch_fills_new_memory(device: torch.device) -> None:
    with deterministic():
        ids, weights, experts, num_valid, moe_buf = moe_buffers.allocate(layouts(device), device)
    for integers in (ids, experts, num_valid):
        assert bool((integers == torch.iinfo(torch.int32).max).all())
    assert bool(weights.isnan().all()) and bool(moe_buf.isnan().all())


def test_a_quantised_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="moebuf_dtype: expected .* not quantised, got .*quint8"):
        fused_moe.topk_softmax_sorting(torch.zeros(2, 4), 1, 4, 8, torch.quint8)


def test_allocates_in_a_pytorch_without_the_quick_allocators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert layouts(CPU).quick is not None, "this PyTorch has none: calls pay for torch.empty"
    monkeypatch.setattr(moe_buffers, "_quick_cpu", None)
    monkeypatch.setattr(moe_buffers, "_quick_gpu", None)
    for device in devices():
        wanted = layouts(device)
        assert wanted.quick is None
        made: Any = moe_buffers.allocate(wanted, device)
        assert [tensor.shape for tensor in made] == [size for size, _, _ in wanted.tensors]


def test_new_buffers_are_seen_by_a_tracer() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        made = fused_moe.empty_sorted_buffers(6, 2, 4, 5, torch.float32, 8, device="cpu")
    assert all(isinstance(tensor, FakeTensor) for tensor in made)
