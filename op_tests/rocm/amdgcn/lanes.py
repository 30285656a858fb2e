"""How lanes see each other: DPP, SDWA, read and write of single lanes, permutes through registers.

A lane that DPP makes read from outside its row, or from a lane that EXEC leaves out, gets 0 with
`bound_ctrl:1` and is not written without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from amdgcn.assembly import Instruction
from amdgcn.scalar import Operation
from amdgcn.wave import (
    U32,
    Bools,
    Fault,
    Lanes,
    Wave,
    read_lanes,
    read_scalar,
    write_lanes,
    write_scalar,
)

Array = Any
Compute = Callable[[Wave], Array]

_CONTROLS = {
    "row_shr", "row_shl", "row_ror", "row_bcast", "row_newbcast", "row_share", "row_xmask",
    "quad_perm", "row_mirror", "row_half_mirror",
}  # fmt: skip
MODIFIERS = {
    *_CONTROLS, "row_mask", "bank_mask", "bound_ctrl", "fi", "dst_sel",
    "dst_unused", "src0_sel", "src1_sel",
}  # fmt: skip


def applied(function: Callable[..., Array], reads: list[Compute]) -> Compute:
    """`function` of what the readers give."""
    if len(reads) == 1:
        (a,) = reads
        return lambda w: function(a(w))
    if len(reads) == 2:
        a, b = reads
        return lambda w: function(a(w), b(w))
    a, b, c = reads
    return lambda w: function(a(w), b(w), c(w))


def storing(
    instruction: Instruction, destination: str, only: Callable[[Wave], Bools] | None
) -> Callable[[Wave, Array], None]:
    """Writes a result to a vector register, through SDWA's selection or DPP's lane mask."""
    write = write_lanes(destination)
    if only is not None:
        return lambda w, value: write(w, value, only(w))
    if instruction.encoding != "sdwa":
        return lambda w, value: write(w, value, None)
    place = _placing(instruction.modifiers, destination)
    return lambda w, value: write(w, place(w, value.view(np.uint32)), None)


# SDWA selection: (bits to shift, mask)
_PARTS = {
    "DWORD": (0, 0xFFFFFFFF), "WORD_0": (0, 0xFFFF), "WORD_1": (16, 0xFFFF), "BYTE_0": (0, 0xFF),
    "BYTE_1": (8, 0xFF), "BYTE_2": (16, 0xFF), "BYTE_3": (24, 0xFF),
}  # fmt: skip


def select(raw: Callable[[Wave], Lanes], part: str, extend: bool) -> Callable[[Wave], Lanes]:
    """The part of a source that SDWA selects, zero or sign extended."""
    shift, mask = _PARTS[part]
    if part == "DWORD":
        return raw
    sign = np.uint32((mask + 1) >> 1)

    def read(w: Wave) -> Lanes:
        bits: U32 = raw(w).view(np.uint32) >> np.uint32(shift) & np.uint32(mask)
        return (bits ^ sign) - sign if extend else bits

    return read


def _placing(modifiers: dict[str, str], destination: str) -> Callable[[Wave, U32], U32]:
    part = modifiers.get("dst_sel", "DWORD")
    unused = modifiers.get("dst_unused", "UNUSED_PRESERVE")
    shift, mask = _PARTS[part]
    old = read_lanes(destination)
    keep = np.uint32(~(mask << shift) & 0xFFFFFFFF)
    if part == "DWORD":
        return lambda w, value: value
    if unused not in ("UNUSED_PAD", "UNUSED_PRESERVE"):
        raise Fault(f"unknown modifier dst_unused:{unused}")

    def place(w: Wave, value: U32) -> U32:
        moved = (value & np.uint32(mask)) << np.uint32(shift)
        return moved if unused == "UNUSED_PAD" else old(w).view(np.uint32) & keep | moved

    return place


def dpp(
    raw: Callable[[Wave], Lanes], modifiers: dict[str, str], width: int
) -> tuple[Callable[[Wave], Lanes], Callable[[Wave], Bools]]:
    """A source as DPP moves it between lanes, and which lanes are written."""
    source, inside, written = _dpp_table(modifiers, width)
    zero_invalid = "bound_ctrl" in modifiers
    fetch_inactive = modifiers.get("fi", "0") == "1"

    def valid(w: Wave) -> Bools:
        return inside if fetch_inactive else inside & w.mask[source]

    def read(w: Wave) -> Lanes:
        return np.where(valid(w), raw(w)[source], np.uint32(0))

    def only(w: Wave) -> Bools:
        return written if zero_invalid else written & valid(w)

    return read, only


def _dpp_table(modifiers: dict[str, str], width: int) -> tuple[Array, Bools, Bools]:
    """Per lane: the lane it reads, whether that is inside its reach, whether it is written."""
    lane = np.arange(width)
    row, column = lane // 16, lane % 16
    inside = np.ones(width, bool)
    control = next((name for name in modifiers if name in _CONTROLS), None)
    value = modifiers.get(control or "", "")
    if control == "row_shr":
        source, inside = lane - int(value), column >= int(value)
    elif control == "row_shl":
        source, inside = lane + int(value), column + int(value) < 16
    elif control == "row_ror":
        source = row * 16 + (column - int(value)) % 16
    elif control == "row_bcast" and width == 64:
        period = int(value) + 1
        source, inside = lane // period * period - 1, lane >= period
    elif control in ("row_newbcast", "row_share"):
        source = row * 16 + int(value)
    elif control == "row_xmask":
        source = lane ^ int(value)
    elif control == "row_mirror":
        source = row * 16 + 15 - column
    elif control == "row_half_mirror":
        source = lane // 8 * 8 + 7 - lane % 8
    elif control == "quad_perm":
        order = np.array([int(x) for x in value.strip("[]").split(",")])
        source = lane // 4 * 4 + order[lane % 4]
    else:
        raise Fault(f"unknown DPP control {control}:{value} for wave{width}")
    row_mask = int(modifiers.get("row_mask", "0xf"), 0)
    bank_mask = int(modifiers.get("bank_mask", "0xf"), 0)
    written = (row_mask >> row & 1 == 1) & (bank_mask >> column // 4 & 1 == 1)
    return np.clip(source, 0, width - 1), inside, written


def decode_crossing(instruction: Instruction, width: int) -> Operation | None:
    """Instructions that move data between single lanes, or lanes and scalar registers."""
    name, operands = instruction.mnemonic, instruction.operands
    if name == "v_readlane_b32":
        write, read, lane = (
            write_scalar(operands[0]),
            read_lanes(operands[1]),
            read_scalar(operands[2]),
        )
        return lambda w: write(w, int(read(w)[lane(w) % w.width]))
    if name == "v_readfirstlane_b32":
        write, read = write_scalar(operands[0]), read_lanes(operands[1])
        return lambda w: write(w, int(read(w)[int(np.argmax(w.mask))]))
    if name == "v_writelane_b32":
        return _writelane(operands)
    if name in ("v_permlanex16_b32", "v_permlane16_b32"):
        return _permlane16(instruction, crossing="x16" in name)
    if name in ("v_permlane32_swap_b32", "v_permlane16_swap_b32"):
        return _swap(operands, 32 if "32_swap" in name else 16, width)
    return None


def _writelane(operands: list[str]) -> Operation:
    value, lane = read_scalar(operands[1]), read_scalar(operands[2])
    index = int(re.sub(r"\D", "", operands[0]))

    def run(w: Wave) -> None:
        changed = w.v[index].copy()
        changed[lane(w) % w.width] = value(w)
        w.v[index] = changed

    return run


def _permlane16(instruction: Instruction, crossing: bool) -> Operation:
    operands = instruction.operands
    if set(instruction.modifiers) - {"op_sel"}:
        raise Fault(f"unknown modifiers {instruction.modifiers}")
    flags = instruction.modifiers.get("op_sel", "[0,0]").strip("[]").split(",")
    fetch_inactive, zero_invalid = flags[0] == "1", flags[1] == "1"
    read, low, high = read_lanes(operands[1]), read_scalar(operands[2]), read_scalar(operands[3])
    write = write_lanes(operands[0])

    def run(w: Wave) -> None:
        selector = low(w) | high(w) << 32
        picks = np.array([selector >> 4 * i & 15 for i in range(16)])
        lane = np.arange(w.width)
        row = lane // 16 ^ 1 if crossing else lane // 16
        source = row * 16 + picks[lane % 16]
        valid = np.ones(w.width, bool) if fetch_inactive else w.mask[source]
        value = np.where(valid, read(w)[source], np.uint32(0))
        write(w, value, None if zero_invalid else valid)

    return run


def _swap(operands: list[str], distance: int, width: int) -> Operation:
    """v_permlane32_swap, v_permlane16_swap: upper parts of the first, lower of the second."""
    read_a, read_b = (read_lanes(operand) for operand in operands)
    write_a, write_b = (write_lanes(operand) for operand in operands)
    lane = np.arange(width)
    upper = lane & distance != 0

    def run(w: Wave) -> None:
        a, b = read_a(w), read_b(w)
        write_a(w, np.where(upper, b[lane ^ distance], a), None)
        write_b(w, np.where(upper, b, a[lane ^ distance]), None)

    return run
