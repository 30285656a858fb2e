"""Did an op write exactly what it may? Poisoned outputs between guard bytes, frozen inputs.

Every output is a slice of a larger allocation. The guards around it must survive the call, and the
poison inside it must be replaced wherever the contract defines a value: a value left unwritten
then differs from any right answer. Bytes are compared, so NaN and -0.0 are no blind spots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

GUARD_BYTES = 1 << 15
"""More than a row of the widest model, so that one row too many is caught and does no harm."""
POISON = 0xA5


class Mismatch(AssertionError):
    """An op's result or side effect differs from the contract."""


def require(holds: bool, message: str) -> None:
    """Raise :class:`Mismatch` unless ``holds``; unlike ``assert`` also under ``python -O``."""
    if not holds:
        raise Mismatch(message)


class GuardedBuffer:
    """A poisoned contiguous tensor, ``offset`` bytes past a 256-byte boundary, between guards."""

    def __init__(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, device: str, offset: int = 0
    ) -> None:
        count = 1
        for size in shape:
            count *= size
        self.name = name
        self._num_bytes = count * dtype.itemsize
        self._first = GUARD_BYTES + offset
        total = self._first + self._num_bytes + GUARD_BYTES
        self._raw = torch.full((total,), POISON, dtype=torch.uint8, device=device)
        inside = self._raw[self._first : self._first + self._num_bytes]
        self.tensor = inside.view(dtype).view(tuple(shape))

    def poison(self) -> None:
        """Forget what was written, on the current stream."""
        self._raw.fill_(POISON)

    def check_guards(self) -> None:
        """Both guards hold their poison."""
        raw = self._raw.cpu()
        require_poison(f"bytes before {self.name}", raw[: self._first])
        require_poison(f"bytes past the end of {self.name}", raw[self._first + self._num_bytes :])

    def check_untouched(self) -> None:
        """Guards and contents hold their poison."""
        require_poison(f"{self.name} and the bytes around it", self._raw.cpu())

    def check_untouched_from(self, first: int) -> None:
        """The items from ``first`` on hold their poison."""
        inside = self._raw.cpu()[self._first : self._first + self._num_bytes]
        rest = inside[first * self.tensor.dtype.itemsize :]
        require_poison(f"{self.name} from item {first} on", rest)

    def check_zero_then_untouched(self, num_rows: int) -> None:
        """The first ``num_rows`` rows are zero bytes, the others hold their poison."""
        rows = self.tensor.shape[0]
        inside = self._raw.cpu()[self._first : self._first + self._num_bytes]
        split = self._num_bytes // rows * num_rows if rows else 0
        nonzero = inside[:split].nonzero()
        if nonzero.numel():
            at = int(nonzero[0])
            raise Mismatch(
                f"{self.name}: expected zero bytes in rows 0..{num_rows - 1}, got "
                f"{int(inside[at]):#04x} at byte {at} of {split}, {nonzero.numel()} such bytes"
            )
        require_poison(f"{self.name} rows from {num_rows} on", inside[split:])


def require_poison(what: str, data: Tensor) -> None:
    """``data`` (uint8) was not written."""
    written = (data != POISON).nonzero()
    if written.numel():
        at = int(written[0])
        raise Mismatch(
            f"{what}: expected untouched, got {int(data[at]):#04x} at byte {at} of {len(data)}, "
            f"{written.numel()} bytes changed"
        )


class FrozenInputs:
    """Copies of the inputs, to show afterwards that the op left them alone."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._before = {name: storage_bytes(tensor).clone() for name, tensor in tensors.items()}

    def check(self) -> None:
        """Every byte of every input's storage, gaps between rows included, is as before."""
        for name, before in self._before.items():
            require(
                torch.equal(storage_bytes(self._tensors[name]), before),
                f"{name}: expected the input unchanged, got other bytes after the call",
            )


def storage_bytes(tensor: Tensor) -> Tensor:
    """The whole storage behind ``tensor`` as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def check_untouched(buffers: Iterable[GuardedBuffer]) -> None:
    """No buffer was written at all."""
    for buffer in buffers:
        buffer.check_untouched()
