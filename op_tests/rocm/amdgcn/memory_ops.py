"""What memory instructions do: scalar loads, global loads and stores, LDS.

A wave's accesses take effect at once and in program order, which is one of the orders that the
hardware may choose; what another order could change shows as a race in `memory.Lds`.

Long because every kind of access is a function here, and all look into the same memories.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amdgcn.assembly import Instruction
from amdgcn.banks import BankTally, passes
from amdgcn.memory import GlobalMemory, Lds
from amdgcn.orders import step_of
from amdgcn.scalar import PAUSE, Operation
from amdgcn.trace import LdsAccess, Trace, segments_of
from amdgcn.wave import (
    VCC,
    Fault,
    Wave,
    read_lanes,
    read_scalar,
    scalar_index,
    vector_index,
    write_lanes,
)

Array = Any
_CACHE_POLICIES = {"sc0", "sc1", "nt", "glc", "slc", "dlc", "th", "scope"}


class Memories:
    """What a running workgroup sees; replaced for every launch and every workgroup.

    Attributes:
        memory: the buffers of the launch.
        workgroup: the running one's index.
        lds: of the running workgroup.
        banks: where the passes of LDS accesses are counted, by line; None for nowhere.
        trace: where the running wave's accesses are noted (`amdgcn.timing`); None for nowhere.
        signed_offsets: whether the 32-bit offset beside a scalar address is signed (gfx1250).
        waits_for_stores: whether vmcnt counts stores as well (gfx9).
    """

    def __init__(self, memory: GlobalMemory, arch: str = "") -> None:
        self.memory = memory
        self.signed_offsets = arch == "gfx1250"
        self.waits_for_stores = arch.startswith("gfx9")
        self.workgroup = 0
        self.lds: Lds | None = None
        self.banks: dict[int, BankTally] | None = None
        self.trace: Trace | None = None

    def note_banks(
        self, line: int, w: Wave, offsets: Array, size: int, is_atomic: bool = False
    ) -> None:
        """Counts the passes of an LDS access, if the launch asked for it."""
        if self.banks is None and self.trace is None:
            return
        needed = passes(offsets, np.flatnonzero(w.mask), size, is_atomic)
        if self.banks is not None:
            self.banks.setdefault(line, BankTally()).note(needed)
        if self.trace is not None:
            self.trace.append(LdsAccess(sum(needed)))

    def noted(self, addresses: Array, size: int) -> Array:
        """The addresses of an access to global memory, noted if the launch asked for a trace."""
        if self.trace is not None:
            self.trace.append(segments_of(addresses, size))
        return addresses

    def local(self) -> Lds:
        """The LDS of the running workgroup."""
        if self.lds is None:
            raise Fault("LDS access: expected a running workgroup, got none")
        return self.lds


def decode_step(instruction: Instruction, memories: Memories, operation: Operation) -> Operation:
    """An operation that may be a step of a hand-over (`orders`), noted as such."""
    kind = step_of(instruction.text)
    if not kind:
        return operation

    def run(w: Wave) -> int | None:
        operation(w)
        memories.memory.orders.step(kind, (memories.workgroup, w.index), w.epoch)
        return None if kind == "wait" else PAUSE

    return run


def decode_memory(instruction: Instruction, memories: Memories) -> Operation:
    """The function of a memory instruction; raises Fault for one that is not known."""
    name = instruction.mnemonic
    if name.startswith("s_load_"):
        return _scalar_load(instruction, memories)
    if name in ("ds_swizzle_b32", "ds_bpermute_b32", "ds_permute_b32"):
        return _permute(instruction)
    for prefix, decode in (
        ("global_read_", _global_load), ("global_write_", _global_store),
        ("global_atomic_", _global_atomic), ("ds_read_", _lds_load),
        ("ds_write_", _lds_store), ("ds_", _lds_atomic),
    ):  # fmt: skip
        if name.startswith(prefix):
            return decode(instruction, name.removeprefix(prefix), memories)
    raise Fault(f"unknown instruction {name}")


def _number(instruction: Instruction, key: str) -> int:
    return int(instruction.modifiers.get(key, "0"), 0)


def _only(instruction: Instruction, *known: str) -> None:
    strange = set(instruction.modifiers) - {*known, *_CACHE_POLICIES}
    if strange:
        raise Fault(f"unknown modifier {sorted(strange)[0]!r}")


def _scalar_load(instruction: Instruction, memories: Memories) -> Operation:
    _only(instruction, "offset", "scale_offset", "nv")
    destination = scalar_index(instruction.operands[0])
    base = read_scalar(instruction.operands[1], 64)
    offset = read_scalar(instruction.operands[2]) if len(instruction.operands) > 2 else lambda w: 0
    extra = _number(instruction, "offset")
    kind = instruction.mnemonic.removeprefix("s_load_")
    size = _bytes_of(kind)
    scale = size if "scale_offset" in instruction.modifiers else 1
    count = (size + 3) // 4
    if destination is None or destination + count > VCC + 2:
        raise Fault(f"scalar load: expected s registers or vcc, got {instruction.operands[0]}")

    def run(w: Wave) -> None:
        address = memories.noted(np.array([base(w) + offset(w) * scale + extra], np.int64), size)
        words = _unpack(memories.memory.load(address, size, min(size, 4)), kind)
        w.s[destination : destination + count] = [int(word[0]) for word in words]

    return run


def _global_addresses(
    instruction: Instruction, position: int, size: int, memories: Memories
) -> Callable[[Wave], Array]:
    """The addresses of the active lanes, of `size` bytes each, which `scale_offset` multiplies by."""
    _only(instruction, "offset", "scale_offset", "nv")
    vector, scalar = instruction.operands[position], instruction.operands[-1]
    offset = np.int64(_number(instruction, "offset"))
    is_scaled = "scale_offset" in instruction.modifiers
    if scalar == "off":
        if is_scaled:
            raise Fault("scale_offset: expected a scalar address beside the offset, got off")
        wide = read_lanes(vector, 64)
        return lambda w: memories.noted(wide(w)[w.mask].view(np.int64) + offset, size)
    base, narrow = read_scalar(scalar, 64), read_lanes(vector, 32)
    scale = np.int64(size if is_scaled else 1)
    kind = np.int32 if memories.signed_offsets else np.uint32

    def addresses(w: Wave) -> Array:
        steps = narrow(w)[w.mask].view(kind).astype(np.int64)
        return memories.noted(steps * scale + (np.int64(base(w)) + offset), size)

    return addresses


# Loads below 32 bits: (bytes, whether signed)
_NARROW = {"u8": (1, False), "i8": (1, True), "u16": (2, False), "i16": (2, True)}


def _unpack(rows: NDArray[np.uint8], kind: str) -> list[Array]:
    """Loaded rows as one array per destination register."""
    if kind in _NARROW:
        size, is_signed = _NARROW[kind]
        dtype = np.dtype(f"{'i' if is_signed else 'u'}{size}")
        wide = rows.reshape(-1).view(dtype).astype(np.int64)
        return [(wide & 0xFFFFFFFF).astype(np.uint32)]
    words = np.ascontiguousarray(rows).view(np.uint32)
    return [words[:, i] for i in range(words.shape[1])]


def _writer(operand: str, kind: str) -> Callable[[Wave, NDArray[np.uint8]], None]:
    """Puts loaded rows into the active lanes of the destination."""
    index = vector_index(operand)
    if index is None:
        raise Fault(f"load destination: expected a vector register, got {operand!r}")
    if kind.startswith("d16"):
        half = write_lanes(f"v{index}.{'h' if 'hi' in kind else 'l'}")

        def write_half(w: Wave, rows: NDArray[np.uint8]) -> None:
            value = np.zeros(w.width, np.uint16)
            value[w.mask] = rows.reshape(-1).view(np.uint16)
            half(w, value, None)

        return write_half

    def write(w: Wave, rows: NDArray[np.uint8]) -> None:
        for i, part in enumerate(_unpack(rows, kind)):
            changed = w.v[index + i].copy()
            changed[w.mask] = part
            w.v[index + i] = changed

    return write


def _bytes_of(kind: str) -> int:
    if kind in _NARROW:
        return _NARROW[kind][0]
    match = re.fullmatch(r"(?:d16_(?:hi_)?)?b(\d+)", kind)
    if match is None:
        raise Fault(f"unknown kind of access {kind!r}")
    return int(match[1]) // 8


def _alignment(size: int) -> int:
    """Of an access to global memory; 16 bytes come only from types that are aligned to them."""
    return 16 if size == 16 else min(size, 4)


def _global_load(instruction: Instruction, kind: str, memories: Memories) -> Operation:
    size = _bytes_of(kind)
    addresses = _global_addresses(instruction, 1, size, memories)
    write = _writer(instruction.operands[0], kind)
    align = _alignment(size)

    def run(w: Wave) -> None:
        if w.mask.any():
            w.in_flight.append(True)
            reader = (memories.workgroup, w.index, w.epoch)
            write(w, memories.memory.load(addresses(w), size, align, reader))

    return run


def _source_rows(operand: str, size: int) -> Callable[[Wave], NDArray[np.uint8]]:
    """The bytes that the active lanes store."""
    index = vector_index(operand)
    if index is None:
        raise Fault(f"store source: expected a vector register, got {operand!r}")
    first = 2 if operand.endswith(".h") else 0
    count = (size + 3) // 4

    def read(w: Wave) -> NDArray[np.uint8]:
        words = np.stack([w.v[index + i][w.mask] for i in range(count)], axis=1)
        return words.view(np.uint8)[:, first : first + size]

    return read


def _global_store(instruction: Instruction, kind: str, memories: Memories) -> Operation:
    size = _bytes_of(kind.replace("d16_hi_", "").replace("d16_", ""))
    addresses = _global_addresses(instruction, 0, size, memories)
    high = ".h" if "d16_hi" in kind else ""
    rows = _source_rows(instruction.operands[1] + high, size)
    align = _alignment(size)

    def run(w: Wave) -> None:
        if w.mask.any():
            if memories.waits_for_stores:
                w.in_flight.append(False)
            writer = (memories.workgroup, w.index, w.epoch)
            memories.memory.store(addresses(w), rows(w), align, writer)

    return run


def _lds_offsets(operand: str, offset: int) -> Callable[[Wave], Array]:
    read = read_lanes(operand)
    return lambda w: read(w)[w.mask].astype(np.int64) + offset


def _pair_offsets(instruction: Instruction, kind: str, size: int) -> list[int]:
    """The byte offsets of a double access, or of the single one."""
    if kind.startswith("2"):
        _only(instruction, "offset0", "offset1")
        scale = size * (64 if "st64" in kind else 1)
        return [_number(instruction, "offset0") * scale, _number(instruction, "offset1") * scale]
    _only(instruction, "offset")
    return [_number(instruction, "offset")]


def _lds_load(instruction: Instruction, kind: str, memories: Memories) -> Operation:
    single = kind.split("_", 1)[1] if kind.startswith("2") else kind
    size = _bytes_of(single)
    parts = [
        _lds_offsets(instruction.operands[1], offset)
        for offset in _pair_offsets(instruction, kind, size)
    ]
    write = _writer(instruction.operands[0], single)

    def run(w: Wave) -> None:
        if w.mask.any():
            places = [part(w) for part in parts]
            rows = [memories.local().load(place, size, w.index, w.epoch) for place in places]
            for place in places:
                memories.note_banks(instruction.line, w, place, size)
            write(w, np.concatenate(rows, axis=1))

    return run


def _lds_store(instruction: Instruction, kind: str, memories: Memories) -> Operation:
    single = kind.split("_", 1)[1] if kind.startswith("2") else kind
    high = ".h" if "d16_hi" in single else ""
    size = _bytes_of(single.replace("d16_hi_", "").replace("d16_", ""))
    offsets = _pair_offsets(instruction, kind, size)
    parts = [
        (_lds_offsets(instruction.operands[0], offset), _source_rows(operand + high, size))
        for offset, operand in zip(offsets, instruction.operands[1:], strict=True)
    ]

    def run(w: Wave) -> None:
        if w.mask.any():
            for where, rows in parts:
                place = where(w)
                memories.local().store(place, rows(w), w.index, w.epoch)
                memories.note_banks(instruction.line, w, place, size)

    return run


_ATOMICS: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "or": np.bitwise_or, "and": np.bitwise_and,
    "xor": np.bitwise_xor, "max": np.maximum, "min": np.minimum,
}  # fmt: skip


_GLOBAL_ATOMICS = {
    **_ATOMICS, "swap": lambda old, new: new,
    "inc": lambda old, limit: np.where(old >= limit, 0, old + 1),
}  # fmt: skip


def _global_atomic(instruction: Instruction, kind: str, memories: Memories) -> Operation:
    """32-bit atomics, with or without the old value as a result; lanes go one after the other."""
    match = re.fullmatch(r"(add|sub|or|and|xor|u?max|u?min|swap|inc)(?:_[ub]32)?", kind)
    if match is None:
        raise Fault(f"unknown instruction {instruction.mnemonic}")
    function = _GLOBAL_ATOMICS[match[1].removeprefix("u")]
    modifiers = instruction.modifiers
    returns = len(instruction.operands) == 4 or "sc0" in modifiers or "glc" in modifiers
    first = int(returns)
    addresses = _global_addresses(instruction, first, 4, memories)
    value = read_lanes(instruction.operands[first + 1])
    write = _writer(instruction.operands[0], "b32") if returns else None

    def run(w: Wave) -> int:
        if not w.mask.any():
            return PAUSE
        if returns or memories.waits_for_stores:
            w.in_flight.append(returns)
        before = []
        for address, new in zip(addresses(w), value(w)[w.mask], strict=True):
            where = np.array([address])
            old = memories.memory.load(where, 4, 4).view(np.uint32).reshape(-1)
            now = np.asarray(function(old, np.uint32(new)), np.uint32).reshape(-1)
            memories.memory.store(where, now.view(np.uint8).reshape(1, 4), 4)
            before.append(old.view(np.uint8))
            memories.memory.orders.atomic(int(address), (memories.workgroup, w.index), w.epoch)
        if write is not None:
            write(w, np.stack(before))
        return PAUSE

    return run


def _lds_atomic(instruction: Instruction, kind: str, memories: Memories) -> Operation:
    """32-bit atomics, with or without the old value as a result; lanes go one after the other."""
    operation, _, bits = kind.partition("_")
    returns = bits.startswith("rtn_")
    if operation not in _ATOMICS or bits.removeprefix("rtn_") not in ("u32", "b32"):
        raise Fault(f"unknown instruction {instruction.mnemonic}")
    _only(instruction, "offset")
    function = _ATOMICS[operation]
    first = int(returns)
    where = _lds_offsets(instruction.operands[first], _number(instruction, "offset"))
    value = read_lanes(instruction.operands[first + 1])
    write = _writer(instruction.operands[0], "b32") if returns else None

    def run(w: Wave) -> None:
        if not w.mask.any():
            return
        offsets = where(w)
        words = memories.local().atomic(offsets, w.index, w.epoch, returns)
        memories.note_banks(instruction.line, w, offsets, 4, is_atomic=True)
        if write is None:
            function.at(words, offsets // 4, value(w)[w.mask])
            return
        before = []
        for word, new in zip(offsets // 4, value(w)[w.mask], strict=True):
            before.append(words[word])
            words[word] = function(words[word], new)
        write(w, np.array(before, np.uint32).view(np.uint8).reshape(-1, 4))

    return run


def _permute(instruction: Instruction) -> Operation:
    """Moves through the LDS crossbar; lanes that EXEC leaves out give 0."""
    name, operands = instruction.mnemonic, instruction.operands
    write = write_lanes(operands[0])
    _only(instruction, "offset")
    if name == "ds_swizzle_b32":
        read = read_lanes(operands[1])
        sources = {width: _swizzle(instruction.modifiers["offset"], width) for width in (32, 64)}
        source: Callable[[Wave], Array] = lambda w: sources[w.width]  # noqa: E731
    elif name == "ds_bpermute_b32":
        address, read = read_lanes(operands[1]), read_lanes(operands[2])
        offset = np.uint32(_number(instruction, "offset"))
        source = lambda w: (address(w) + offset) // 4 % w.width  # noqa: E731
    else:
        raise Fault(f"unknown instruction {name}")

    def run(w: Wave) -> None:
        lane = source(w)
        write(w, np.where(w.mask[lane], read(w)[lane], np.uint32(0)), None)

    return run


def _swizzle(text: str, width: int) -> Array:
    """The lane that each lane reads."""
    lane = np.arange(width)
    swap = re.fullmatch(r"swizzle\(SWAP,(\d+)\)", text)
    if swap is not None:
        return lane ^ int(swap[1])
    if not re.fullmatch(r"0x[0-9a-f]+|\d+", text) or int(text, 0) >> 15:
        raise Fault(f"unknown swizzle {text}")
    pattern = int(text, 0)
    and_mask, or_mask, xor_mask = pattern & 31, pattern >> 5 & 31, pattern >> 10 & 31
    return lane // 32 * 32 + ((lane % 32 & and_mask | or_mask) ^ xor_mask)
