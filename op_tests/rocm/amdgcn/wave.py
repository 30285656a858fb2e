"""The state of one wave, and how an instruction's operands read and write it.

A vector register is an immutable array of `width` lanes; a write makes a new one, merged under EXEC.
Scalar registers are Python ints in one list, with AMD's own numbers for VCC, EXEC and the trap
registers. Everything starts with noise, so that code which reads what it never wrote shows.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from amdgcn.trace import Trace

U32 = NDArray[np.uint32]
Lanes = NDArray[np.generic]
Bools = NDArray[np.bool_]

VCC, TTMP, M0, EXEC, NULL = 106, 108, 124, 126, 128
NUM_SGPRS = 130
ALL_ONES = 0xFFFFFFFF

_SCALAR_NAMES = {
    "vcc": VCC, "vcc_lo": VCC, "vcc_hi": VCC + 1, "exec": EXEC, "exec_lo": EXEC,
    "exec_hi": EXEC + 1, "m0": M0, "null": NULL,
}  # fmt: skip


class Fault(Exception):
    """The machine code did something that is an error, or that the interpreter does not know."""


FIRST_ACCUMULATION, NUM_ACCUMULATION = 512, 256  # a0 in Wave.v, and how many there are


class Wave:
    """Registers and progress of one wave.

    Attributes:
        width: lanes.
        s: scalar registers.
        v: vector registers, each an array of uint32; accumulation registers follow from
            FIRST_ACCUMULATION on, where the kernel uses any.
        scc: the scalar condition code.
        mask: EXEC as an array; `full` says whether it is all ones.
        pc: index of the next instruction.
        epoch: barriers passed so far.
        done: whether it has ended.
        in_flight: vector memory accesses that no wait has ended, oldest first: True for a load.
        round_trips: waits so far that had to wait for a load.
        trace: what it executed, if the launch asked for it.
    """

    __slots__ = (
        "done", "epoch", "full", "in_flight", "index", "mask", "pc", "round_trips", "s", "scc", "trace",
        "v", "width",
    )  # fmt: skip

    def __init__(
        self,
        width: int,
        index: int,
        num_vgprs: int,
        rng: np.random.Generator,
        uses_accumulation: bool = False,
    ) -> None:
        self.width = width
        self.index = index
        noise = rng.integers(0, 2**32, (num_vgprs + 1, width), dtype=np.uint32)
        self.v: list[U32] = list(noise)
        if uses_accumulation:
            rows = (FIRST_ACCUMULATION + NUM_ACCUMULATION - len(self.v), width)
            self.v += list(rng.integers(0, 2**32, rows, dtype=np.uint32))
        self.s: list[int] = [int(x) for x in rng.integers(0, 2**32, NUM_SGPRS, dtype=np.uint32)]
        self.scc = 0
        self.pc = 0
        self.epoch = 0
        self.done = False
        self.in_flight: list[bool] = []
        self.round_trips = 0
        self.trace: Trace = []
        self.set_exec((1 << width) - 1)

    def set_exec(self, value: int) -> None:
        """Sets EXEC."""
        self.s[EXEC], self.s[EXEC + 1] = value & ALL_ONES, value >> 32
        self.mask = lanes_of(value & ((1 << self.width) - 1), self.width)
        self.full = bool(self.mask.all())

    def refresh_exec(self) -> None:
        """After a write to one of EXEC's registers."""
        self.set_exec(self.s[EXEC] | self.s[EXEC + 1] << 32)


@lru_cache(maxsize=65536)
def lanes_of(value: int, width: int) -> Bools:
    """A lane mask as an array; bits above the wave are ignored."""
    raw = np.frombuffer(value.to_bytes(8, "little"), np.uint8)
    lanes = np.unpackbits(raw, bitorder="little")[:width].astype(bool)
    lanes.setflags(write=False)
    return lanes


def int_of(lanes: Bools) -> int:
    """The inverse of `lanes_of`."""
    return int.from_bytes(np.packbits(lanes, bitorder="little").tobytes(), "little")


def scalar_index(operand: str) -> int | None:
    """The number of the scalar register (or of the first of a range) that `operand` names."""
    if operand in _SCALAR_NAMES:
        return _SCALAR_NAMES[operand]
    match = re.fullmatch(r"(s|ttmp)(?:(\d+)|\[(\d+):\d+\])", operand)
    if match is None:
        return None
    return int(match[2] or match[3]) + (TTMP if match[1] == "ttmp" else 0)


def vector_index(operand: str) -> int | None:
    """The number of the vector register (or of the first of a range), None if it is none."""
    match = re.fullmatch(r"([va])(?:(\d+)|\[(\d+):\d+\])(?:\.[lh])?", operand)
    if match is None:
        return None
    return int(match[2] or match[3]) + (FIRST_ACCUMULATION if match[1] == "a" else 0)


def constant(operand: str, bits: int = 32) -> int | None:
    """The bits of an integer or float constant as an operand of `bits` bits; None if it is none."""
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", operand):
        return int(operand, 0) & ((1 << bits) - 1)
    if re.fullmatch(r"-?\d+\.\d+(e[-+]\d+)?", operand):
        if bits == 64:
            raise Fault(f"float constant {operand}: expected one of 16 or 32 bits, got 64")
        code = {16: "<e", 32: "<f"}[bits]
        return int.from_bytes(struct.pack(code, float(operand)), "little")
    return None


def read_scalar(operand: str, bits: int = 32) -> Callable[[Wave], int]:
    """A function that gives a scalar operand's value as an unsigned integer of `bits` bits."""
    value = constant(operand, bits)
    if value is not None:
        return lambda w: value
    if operand in ("scc", "src_scc"):
        return lambda w: w.scc
    index = scalar_index(operand)
    if index is None:
        raise Fault(f"scalar operand: expected a register or a constant, got {operand!r}")
    if index == NULL:
        return lambda w: 0
    if bits == 32:
        return lambda w: w.s[index]
    return lambda w: w.s[index] | w.s[index + 1] << 32


def write_scalar(operand: str, bits: int = 32) -> Callable[[Wave, int], None]:
    """A function that writes a scalar register, or a pair for 64 bits."""
    index = scalar_index(operand)
    if index is None:
        raise Fault(f"scalar destination: expected a register, got {operand!r}")
    if index == NULL:
        return lambda w, value: None

    def write32(w: Wave, value: int) -> None:
        w.s[index] = value

    def write64(w: Wave, value: int) -> None:
        w.s[index] = value & ALL_ONES
        w.s[index + 1] = value >> 32

    write = write32 if bits == 32 else write64
    if not EXEC <= index <= EXEC + 1:
        return write

    def write_exec(w: Wave, value: int) -> None:
        write(w, value)
        w.refresh_exec()

    return write_exec


def mask_bits(operand: str) -> int:
    """How many bits a lane mask operand has: 64 for pairs and `vcc`, 32 for wave32's registers."""
    return 64 if operand in ("vcc", "exec") or "[" in operand else 32


def read_mask(operand: str) -> Callable[[Wave], Bools]:
    """A function that gives a lane mask in scalar registers as an array."""
    read = read_scalar(operand, mask_bits(operand))
    return lambda w: lanes_of(read(w), w.width)


def write_mask(operand: str) -> Callable[[Wave, Bools], None]:
    """A function that writes an array to a lane mask, 0 for lanes that EXEC leaves out."""
    write = write_scalar(operand, mask_bits(operand))
    return lambda w, lanes: write(w, int_of(lanes & w.mask))


def read_lanes(operand: str, bits: int = 32) -> Callable[[Wave], Lanes]:
    """A function that gives an operand's bits in every lane: uint16, uint32 or uint64 arrays."""
    index = vector_index(operand)
    if index is None:
        return _broadcast(operand, bits)
    if bits == 64:
        return lambda w: w.v[index].astype(np.uint64) | w.v[index + 1].astype(np.uint64) << 32
    if bits == 32:
        return lambda w: w.v[index]
    half = 1 if operand.endswith(".h") else 0
    return lambda w: w.v[index].view(np.uint16)[half::2]


def _broadcast(operand: str, bits: int) -> Callable[[Wave], Lanes]:
    dtype = {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
    value = constant(operand, bits)
    if value is not None:
        full = {width: np.full(width, value, dtype) for width in (32, 64)}
        return lambda w: full[w.width]
    read = read_scalar(operand, max(bits, 32))
    limit = (1 << bits) - 1
    return lambda w: np.full(w.width, read(w) & limit, dtype)


def write_lanes(operand: str) -> Callable[[Wave, Lanes, Bools | None], None]:
    """A function that writes a vector register (or pair, or half) under EXEC and a further mask.

    The array's item size says which; without `.l` or `.h` a 16-bit result leaves noise in the high
    half, as generations differ in what they do there.
    """
    index = vector_index(operand)
    if index is None:
        raise Fault(f"vector destination: expected a register, got {operand!r}")
    high_half = operand.endswith(".h")
    named_half = operand.endswith((".l", ".h"))

    def merge(w: Wave, register: int, value: U32, only: Bools | None) -> None:
        if only is not None:
            w.v[register] = np.where(w.mask & only, value, w.v[register])
        else:
            w.v[register] = value if w.full else np.where(w.mask, value, w.v[register])

    def write(w: Wave, value: Lanes, only: Bools | None = None) -> None:
        if value.itemsize == 4:
            merge(w, index, value.view(np.uint32), only)
        elif value.itemsize == 8:
            pair = value.view(np.uint32)
            merge(w, index, pair[0::2], only)
            merge(w, index + 1, pair[1::2], only)
        else:
            wide = value.view(np.uint16).astype(np.uint32)
            rest = w.v[index] if named_half else np.full(w.width, 0xA5A5A5A5, np.uint32)
            low = rest & 0xFFFF | wide << 16 if high_half else rest & 0xFFFF0000 | wide
            merge(w, index, low.astype(np.uint32), only)

    return write
