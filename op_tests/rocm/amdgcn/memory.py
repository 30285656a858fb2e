"""The memories of a launch: global buffers at fake addresses, and the LDS of a workgroup.

Every access is checked. Global memory: it must lie within one buffer, be aligned, and a store needs
a buffer that may be written. LDS: it must lie within what was asked for at the launch, be aligned,
and a load must not read what nobody wrote; an atomic that returns nothing may change it, which leaves
it noise. Both notice races. LDS: two waves that touch the same byte between the same two barriers, at
least one of them writing (atomics among themselves are fine). Buffers: two waves that store to the
same byte with no barrier between them, which waves of two workgroups never have. So a missing barrier
is found whatever the order in which the waves happen to run.

Buffers end shortly after a 4 GiB boundary where they are long enough, so that address arithmetic
that loses a carry leaves its buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from amdgcn.wave import Fault

Bytes = NDArray[np.uint8]
Addresses = NDArray[np.int64]

# Workgroup, wave and epoch: the number of barriers that the wave has passed.
Writer = tuple[int, int, int]

_FIRST_BASE = 0x7F12 << 32
_BEFORE_BOUNDARY = 256


@dataclass
class Buffer:
    """A stretch of global memory."""

    name: str
    base: int
    data: Bytes
    writable: bool

    def __post_init__(self) -> None:
        self.forget_stores()

    def forget_stores(self) -> None:
        """Lets anybody store."""
        # Per byte: who stored to it last; -1 for nobody.
        self._writer = np.full((len(self.data), 3), -1, np.int32)

    def note_store(self, where: Addresses, writer: Writer) -> None:
        """Notes a store to the bytes `where`; raises Fault if another wave's has no order to it."""
        last = self._writer[where]
        workgroup, wave, epoch = writer
        apart = (last[..., 0] != workgroup) | ((last[..., 1] != wave) & (last[..., 2] == epoch))
        race = (last[..., 0] >= 0) & apart
        if race.any():
            at = int(where[race][0])
            raise Fault(
                f"race on {self.name}, byte {at}: wave {wave} of workgroup {workgroup} and wave"
                f" {self._writer[at, 1]} of workgroup {self._writer[at, 0]} store to it with no"
                " barrier between them"
            )
        self._writer[where] = writer


class GlobalMemory:
    """The buffers of a launch."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def begin_launch(self) -> None:
        """Forgets who stored: all that came before a launch is ordered."""
        for buffer in self.buffers:
            buffer.forget_stores()

    def add(
        self, name: str, data: NDArray[np.generic], writable: bool = True, offset: int = 0
    ) -> int:
        """Maps an array; returns its address, `offset` bytes past a multiple of 256."""
        base = _FIRST_BASE + (len(self.buffers) << 34) - _BEFORE_BOUNDARY + offset
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if data.size and not np.shares_memory(raw, data):
            raise ValueError(
                f"buffer {name}: expected a contiguous array, got strides {data.strides}"
            )
        self.buffers.append(Buffer(name, base, raw, writable))
        return base

    def load(self, addresses: Addresses, size: int, align: int) -> Bytes:
        """`size` bytes at each address, as rows."""
        buffer, offsets = self._find(addresses, size, align)
        if buffer is not None:
            return _gather(buffer.data, offsets, size)
        rows = [self.load(addresses[i : i + 1], size, align) for i in range(len(addresses))]
        return np.concatenate(rows)

    def store(
        self, addresses: Addresses, values: Bytes, align: int, writer: Writer | None = None
    ) -> None:
        """Writes the rows of `values` to the addresses, for `writer`; None for an atomic."""
        size = values.shape[1]
        buffer, offsets = self._find(addresses, size, align)
        if buffer is None:
            for i in range(len(addresses)):
                self.store(addresses[i : i + 1], values[i : i + 1], align, writer)
            return
        if not buffer.writable:
            raise Fault(f"store to {buffer.name}, which is read-only, at {_shown(addresses[0])}")
        where = offsets[:, None] + np.arange(size)
        if writer is not None:
            buffer.note_store(where, writer)
        buffer.data[where] = values

    def _find(self, addresses: Addresses, size: int, align: int) -> tuple[Buffer | None, Addresses]:
        """The buffer that holds all the accesses, None if there are several; raises Fault."""
        misaligned = addresses % align != 0
        if misaligned.any():
            lane = int(np.argmax(misaligned))
            raise Fault(
                f"address {_shown(addresses[lane])} (access {lane} of the active lanes): expected"
                f" a multiple of {align}"
            )
        low, high = int(addresses.min()), int(addresses.max())
        for buffer in self.buffers:
            end = buffer.base + len(buffer.data)
            if buffer.base <= low and high + size <= end:
                return buffer, addresses - buffer.base
        if len(addresses) > 1:
            return None, addresses
        near = min(
            self.buffers, key=lambda b: min(abs(b.base - low), abs(b.base + len(b.data) - low))
        )
        raise Fault(
            f"address {_shown(low)}, {size} bytes: expected an address in a buffer, got one outside"
            f" all of them; the nearest is {near.name}, {len(near.data)} bytes at {_shown(near.base)}"
            f" ({low - near.base:+d})"
        )


class Lds:
    """The LDS of one workgroup: noise, until written.

    Args:
        size: bytes, static and dynamic.
        rng: for the noise.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.data: Bytes = rng.integers(0, 256, size, dtype=np.uint8)
        self._written = np.zeros(size, bool)
        # Per byte and kind of access: the epoch of the last one, its wave, -1 for several waves.
        self._epoch = {kind: np.full(size, -1, np.int32) for kind in ("load", "store", "atomic")}
        self._wave = {kind: np.zeros(size, np.int32) for kind in ("load", "store", "atomic")}

    def load(self, offsets: Addresses, size: int, wave: int, epoch: int) -> Bytes:
        """`size` bytes at each offset, as rows."""
        where = self._check(offsets, size)
        self._require_written(where)
        self._note("load", where, wave, epoch, against=("store", "atomic"))
        return self.data[where]

    def store(self, offsets: Addresses, values: Bytes, wave: int, epoch: int) -> None:
        """Writes the rows of `values` to the offsets; equal offsets must get equal values."""
        where = self._check(offsets, values.shape[1])
        self._note("store", where, wave, epoch, against=("load", "store", "atomic"))
        self.data[where] = values
        self._written[where] = True
        if not np.array_equal(self.data[where], values):
            raise Fault("LDS store: expected one value per byte, got two lanes that disagree")

    def atomic(
        self, offsets: Addresses, wave: int, epoch: int, returns: bool
    ) -> NDArray[np.uint32]:
        """Checks 32-bit atomics and returns the whole LDS as words, for the caller to change.

        Those that return nothing may change noise: it stays noise, which no load may read.
        """
        where = self._check(offsets, 4)
        if returns:
            self._require_written(where)
        self._note("atomic", where, wave, epoch, against=("load", "store"))
        return self.data[: len(self.data) // 4 * 4].view(np.uint32)

    def _require_written(self, where: Addresses) -> None:
        if not self._written[where].all():
            at = int(where.reshape(-1)[np.argmin(self._written[where].reshape(-1))])
            raise Fault(f"LDS byte {at}: expected a byte that was written, got one that never was")

    def _check(self, offsets: Addresses, size: int) -> Addresses:
        # NOTE: 16 bytes come only from types that are aligned to them.
        misaligned = offsets % (16 if size == 16 else min(size, 4)) != 0
        bad = (offsets < 0) | (offsets + size > len(self.data)) | misaligned
        if bad.any():
            lane = int(np.argmax(bad))
            raise Fault(
                f"LDS offset {int(offsets[lane])} (access {lane} of the active lanes), {size} bytes:"
                f" expected an aligned one within the workgroup's {len(self.data)} bytes"
            )
        return offsets[:, None] + np.arange(size)

    def _note(
        self, kind: str, where: Addresses, wave: int, epoch: int, against: tuple[str, ...]
    ) -> None:
        for other in against:
            race = (self._epoch[other][where] == epoch) & (self._wave[other][where] != wave)
            if race.any():
                at = int(where.reshape(-1)[np.argmax(race.reshape(-1))])
                raise Fault(
                    f"race on LDS byte {at}: wave {wave} has a {kind} and wave"
                    f" {self._wave[other][at]} a {other} with no barrier between them"
                )
        several = (self._epoch[kind][where] == epoch) & (self._wave[kind][where] != wave)
        self._wave[kind][where] = np.where(several, -1, wave)
        self._epoch[kind][where] = epoch


def _gather(data: Bytes, offsets: Addresses, size: int) -> Bytes:
    rows: Bytes = data[offsets[:, None] + np.arange(size)]
    return rows


def _shown(address: int | np.int64) -> str:
    return f"{int(address):#x}"
