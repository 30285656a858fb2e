"""How a vector instruction is executed: sources read, a function of `operations`, results written.

What fits no table is here: compares and carries, which write lane masks, and instructions with two
results. DPP and SDWA, which change how sources are read and results written, are in `lanes`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from amdgcn import exact, lanes
from amdgcn.assembly import Instruction
from amdgcn.operations import OPERATIONS, Array, bit_count, bitop3, u64
from amdgcn.scalar import COMPARE, Operation
from amdgcn.wave import (
    VCC,
    Bools,
    Fault,
    Lanes,
    Wave,
    constant,
    lanes_of,
    read_lanes,
    read_mask,
    write_lanes,
    write_mask,
)

Compute = Callable[[Wave], Array]
Store = Callable[[Wave, Array], None]

_BITS = {"u": 32, "i": 32, "f": 32, "U": 64, "I": 64, "h": 16, "k": 16}
_DTYPES = {"i": np.int32, "f": np.float32, "I": np.int64, "k": np.int16}
_U = np.uint32


def decode_vector(instruction: Instruction, width: int, rcp_rounding: int) -> Operation:
    """The function of a vector instruction; raises Fault for one that is not known."""
    if instruction.second is not None:
        both = (instruction, instruction.second)
        for half in both:
            _check_modifiers(half)
        halves = [_parts(half, width, rcp_rounding) for half in both]
        (compute_x, store_x), (compute_y, store_y) = halves

        def run_both(w: Wave) -> None:
            x, y = compute_x(w), compute_y(w)
            store_x(w, x)
            store_y(w, y)

        return run_both
    crossing = lanes.decode_crossing(instruction, width)
    if crossing is not None:
        return crossing
    _check_modifiers(instruction)
    special = _decode_special(instruction)
    if special is not None:
        return special
    compute, store = _parts(instruction, width, rcp_rounding)
    return lambda w: store(w, compute(w))


def _parts(instruction: Instruction, width: int, rcp_rounding: int) -> tuple[Compute, Store]:
    """How the result is computed, and how it is stored."""
    name, operands = instruction.mnemonic, list(instruction.operands)
    if name in ("v_fmac_f32", "v_mac_f32"):
        name = "v_fma_f32" if name == "v_fmac_f32" else "v_mad_f32"
        operands = [*operands, operands[0]]
    if name in ("v_cndmask_b32", "v_cndmask_b16") and len(operands) == 3:
        operands.append("vcc_lo")  # NOTE: v_dual_cndmask_b32 does not name it; dual is wave32.
    if name in ("v_rcp_f32", "v_rcp_iflag_f32"):
        kinds, function = "f", lambda a: exact.rcp(a, rcp_rounding)
    elif name == "v_bitop2_b32":
        # NOTE: the half of a dual instruction; its table is bitop3's with a third source of 0.
        kinds = "uuu"
        operands.append("0")
        function = bitop3(int(instruction.modifiers.get("bitop3", "0"), 0))
    elif name.startswith("v_bitop3_b"):
        kinds = "uuu" if name.endswith("32") else "hhh"
        function = bitop3(int(instruction.modifiers.get("bitop3", "0"), 0))
    elif name in OPERATIONS:
        kinds, function = OPERATIONS[name]
    else:
        raise Fault(f"unknown instruction {name}")
    reads, only = source_readers(instruction, operands[1:], kinds, width)
    return lanes.applied(function, reads), lanes.storing(instruction, operands[0], only)


def source_readers(
    instruction: Instruction, operands: list[str], kinds: str, width: int = 64
) -> tuple[list[Compute], Callable[[Wave], Bools] | None]:
    """A reader per source, and which lanes DPP lets write (None for all)."""
    if len(operands) != len(kinds):
        raise Fault(f"operands: expected {len(kinds)} sources ({kinds}), got {operands}")
    only = None
    readers: list[Compute] = []
    for position, (operand, kind) in enumerate(zip(operands, kinds, strict=True)):
        if kind == "m":
            readers.append(read_mask(operand))
            continue
        bare, negate, absolute, extend = _sign_modifiers(operand)
        raw: Callable[[Wave], Lanes]
        if instruction.encoding == "sdwa":
            part = instruction.modifiers.get(f"src{position}_sel", "DWORD")
            raw = _narrowed(lanes.select(read_lanes(bare), part, extend), _BITS[kind])
        else:
            raw = read_lanes(bare, _BITS[kind])
        if position == 0 and instruction.encoding == "dpp":
            raw, only = lanes.dpp(raw, instruction.modifiers, width)
        readers.append(_viewed(raw, kind, negate, absolute))
    return readers, only


def _narrowed(raw: Callable[[Wave], Lanes], bits: int) -> Callable[[Wave], Lanes]:
    """The low half of what SDWA selected, for operations on 16 bits."""
    return raw if bits == 32 else lambda w: raw(w).astype(np.uint16)


def _sign_modifiers(operand: str) -> tuple[str, bool, bool, bool]:
    """The operand itself, and whether `-`, `|...|` and `sext(...)` are around it."""
    match = re.fullmatch(r"sext\((.*)\)", operand)
    if match is not None:
        return match[1], False, False, True
    negate = bool(re.match(r"-[|vsat]", operand))
    bare = operand[1:] if negate else operand
    absolute = bare.startswith("|")
    return bare.strip("|"), negate, absolute, False


def _viewed(raw: Callable[[Wave], Lanes], kind: str, negate: bool, absolute: bool) -> Compute:
    dtype = _DTYPES.get(kind)
    if not negate and not absolute:
        return raw if dtype is None else lambda w: raw(w).view(dtype)

    def read(w: Wave) -> Array:
        bits = raw(w)
        bits = bits & _U(0x7FFFFFFF) if absolute else bits
        bits = bits ^ _U(0x80000000) if negate else bits
        return bits if dtype is None else bits.view(dtype)

    if _BITS[kind] != 32:
        raise Fault("source modifiers: expected them on a 32-bit operand only")
    return read


def _check_modifiers(instruction: Instruction) -> None:
    known = {"bitop3", *lanes.MODIFIERS}
    if instruction.mnemonic == "v_pk_mov_b32":
        known.add("op_sel")
    if instruction.mnemonic in _PACKED_F32:
        known |= {"op_sel", "op_sel_hi", "neg_lo", "neg_hi"}
    if instruction.mnemonic == _MIXED:
        known |= {"op_sel", "op_sel_hi"}
    strange = set(instruction.modifiers) - known
    if strange:
        raise Fault(f"unknown modifier {sorted(strange)[0]!r}")


def _decode_special(instruction: Instruction) -> Operation | None:
    """Instructions with masks, carries or two results; None for others."""
    name = instruction.mnemonic
    if name.startswith("v_cmp"):
        return _compare(instruction)
    if name in _CARRIES:
        return _carry(instruction, *_CARRIES[name])
    if name in ("v_mad_u64_u32", "v_mad_i64_i32"):
        return _mad_64(instruction)
    if name in ("v_div_scale_f32", "v_div_fmas_f32"):
        return _division(instruction)
    if name == "v_pk_mov_b32":
        return _pk_mov(instruction)
    if name in _PACKED_F32:
        return _packed_f32(instruction, _PACKED_F32[name])
    if name == _MIXED:
        return _mixed_fma(instruction)
    if name in ("v_mbcnt_lo_u32_b32", "v_mbcnt_hi_u32_b32"):
        return _mbcnt(instruction)
    return None


def _compare(instruction: Instruction) -> Operation:
    name, operands = instruction.mnemonic, instruction.operands
    _, prefix, operator, kind = name.split("_")
    letter = {"u16": "h", "i16": "k", "u32": "u", "i32": "i", "f32": "f", "u64": "U", "i64": "I"}
    if kind not in letter or operator not in COMPARE and operator not in ("ne", "nlg", "o", "u"):
        raise Fault(f"unknown instruction {name}")
    function = {
        "ne": lambda a, b: a != b,
        "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
        "u": lambda a, b: np.isnan(a) | np.isnan(b),
        "lg": lambda a, b: (a < b) | (a > b),
        "nlg": lambda a, b: ~((a < b) | (a > b)),
        "neq": lambda a, b: a != b,
        "nlt": lambda a, b: ~(a < b),
        "ngt": lambda a, b: ~(a > b),
        "nle": lambda a, b: ~(a <= b),
        "nge": lambda a, b: ~(a >= b),
    }.get(operator, COMPARE.get(operator, lambda a, b: a != b))
    # NOTE: v_cmpx has no destination from gfx10 on, and writes both EXEC and one before.
    destination = operands[0] if len(operands) == 3 else None
    reads, only = source_readers(instruction, operands[-2:], letter[kind] * 2)
    if only is not None:
        raise Fault(f"{name} with DPP: not known")
    compute = lanes.applied(function, reads)
    write = None if destination is None else write_mask(destination)
    write_exec = write_mask("exec") if prefix == "cmpx" else None

    def run(w: Wave) -> None:
        result = compute(w)
        if write is not None:
            write(w, result)
        if write_exec is not None:
            write_exec(w, result)

    return run


# (operation, whether the sources are exchanged, whether there is a carry in)
_CARRIES = {
    "v_add_co_u32": ("add", False, False), "v_sub_co_u32": ("sub", False, False),
    "v_subrev_co_u32": ("sub", True, False), "v_addc_co_u32": ("add", False, True),
    "v_subb_co_u32": ("sub", False, True), "v_subbrev_co_u32": ("sub", True, True),
}  # fmt: skip


def _carry(instruction: Instruction, operation: str, reverse: bool, carry_in: bool) -> Operation:
    operands = instruction.operands
    reads, _ = source_readers(instruction, operands[2:], "uum" if carry_in else "uu")
    store, write_carry = write_lanes(operands[0]), write_mask(operands[1])

    def run(w: Wave) -> None:
        a, b = (reads[index](w).astype(np.int64) for index in ((1, 0) if reverse else (0, 1)))
        carry = reads[2](w) if carry_in else 0
        total = a + b + carry if operation == "add" else a - b - carry
        store(w, (total & 0xFFFFFFFF).astype(np.uint32), None)
        write_carry(w, (total < 0) | (total > 0xFFFFFFFF))

    return run


def _mad_64(instruction: Instruction) -> Operation:
    """The carry is the 65th bit of the sum, of signed ones the sign of the exact one."""
    operands, signed = instruction.operands, instruction.mnemonic == "v_mad_i64_i32"
    reads, _ = source_readers(instruction, operands[2:], "iiU" if signed else "uuU")
    store, write_carry = write_lanes(operands[0]), write_mask(operands[1])

    def run(w: Wave) -> None:
        a, b, c = (read(w) for read in reads)
        product = (
            (a.astype(np.int64) * b.astype(np.int64)).view(np.uint64) if signed else u64(a) * u64(b)
        )
        total = product + c
        store(w, total, None)
        overflows = ~(product ^ c) & (product ^ total)
        write_carry(w, (total ^ overflows) >> np.uint64(63) != 0 if signed else total < c)

    return run


def _division(instruction: Instruction) -> Operation:
    operands = instruction.operands
    store = write_lanes(operands[0])
    if instruction.mnemonic == "v_div_scale_f32":
        reads, _ = source_readers(instruction, operands[2:], "fff")
        write_flag = write_mask(operands[1])

        def scale(w: Wave) -> None:
            value, flag = exact.div_scale(*(read(w) for read in reads))
            store(w, value, None)
            write_flag(w, flag)

        return scale
    reads, _ = source_readers(instruction, operands[1:], "fff")

    def fmas(w: Wave) -> None:
        scaled = lanes_of(w.s[VCC] | w.s[VCC + 1] << 32, w.width)
        a, b, c = (read(w) for read in reads)
        store(w, exact.div_fmas(a, b, c, scaled), None)

    return fmas


def _pk_mov(instruction: Instruction) -> Operation:
    """The low register from a half of the first source, the high one from a half of the second."""
    destination, *sources = instruction.operands
    store = write_lanes(destination)
    picks = instruction.modifiers.get("op_sel", "[0,0]").strip("[]").split(",")
    reads = [read_lanes(source, 64) for source in sources]
    low, high = (np.uint64(32 * int(pick)) for pick in picks)

    def run(w: Wave) -> None:
        first, second = (reads[0](w) >> low).astype(_U), (reads[1](w) >> high).astype(_U)
        store(w, np.stack([first, second], axis=1).reshape(-1).view(np.uint64), None)

    return run


_PACKED_F32: dict[str, Callable[..., Array]] = {
    "v_pk_mul_f32": lambda a, b: a * b,
    "v_pk_add_f32": lambda a, b: a + b,
    "v_pk_fma_f32": exact.fma,
}


def _packed_f32(instruction: Instruction, function: Callable[..., Array]) -> Operation:
    """Two floats at once: op_sel picks the half of every source for the low one, op_sel_hi for
    the high one, and neg_lo and neg_hi negate what was picked."""
    destination, *sources = instruction.operands
    store = write_lanes(destination)
    is_float = ["." in source and constant(source) is not None for source in sources]
    reads = [
        read_lanes(str(constant(source)) if number else source, 64)
        for source, number in zip(sources, is_float, strict=True)
    ]

    def flags(key: str, default: str) -> list[int]:
        return _source_flags(instruction, key, default, len(sources))

    low, high = flags("op_sel", "0"), flags("op_sel_hi", "1")
    negated = (flags("neg_lo", "0"), flags("neg_hi", "0"))
    if any(number and low[i] | high[i] for i, number in enumerate(is_float)):
        raise Fault("a packed float constant: expected its low half to be picked twice")

    def run(w: Wave) -> None:
        values = [read(w) for read in reads]
        pair = [
            function(
                *(
                    ((v >> np.uint64(32 * half)).astype(_U) ^ _U(negate << 31)).view(np.float32)
                    for v, half, negate in zip(values, picked, signs, strict=True)
                )
            )
            for picked, signs in zip((low, high), negated, strict=True)
        ]
        store(w, np.stack(pair, axis=1).reshape(-1).view(np.uint64), None)

    return run


def _source_flags(instruction: Instruction, key: str, default: str, count: int) -> list[int]:
    """A modifier with a digit for each of `count` sources, `default` for those that it leaves out."""
    digits = instruction.modifiers.get(key, "").strip("[]").split(",")
    return [int(digit or default) for digit in (digits + [""] * count)[:count]]


_MIXED = "v_fma_mix_f32_bf16"


def _mixed_fma(instruction: Instruction) -> Operation:
    """fma of sources that are a float, or bf16 where op_sel_hi says so: the half that op_sel picks.

    The source modifiers of each come behind that, and the rounding is that of v_fma_f32.
    """
    destination, *sources = instruction.operands
    if len(sources) != 3:
        raise Fault(f"operands: expected 3 sources, got {sources}")
    halves = _source_flags(instruction, "op_sel", "0", 3)
    are_bf16 = _source_flags(instruction, "op_sel_hi", "0", 3)
    reads = []
    for source, half, is_bf16 in zip(sources, halves, are_bf16, strict=True):
        bare, negate, absolute, _ = _sign_modifiers(source)
        if half and not is_bf16:
            raise Fault(
                f"{source}: expected op_sel of a half of a bf16 source, got that of a float"
            )
        if is_bf16 and constant(bare) is not None:
            raise Fault(f"{source}: expected a register in the place of a bf16 source")
        raw = read_lanes(bare)
        reads.append(_viewed(_widened(raw, half) if is_bf16 else raw, "f", negate, absolute))
    store = write_lanes(destination)
    compute = lanes.applied(exact.fma, reads)
    return lambda w: store(w, compute(w), None)


def _widened(raw: Callable[[Wave], Lanes], half: int) -> Callable[[Wave], Lanes]:
    """The float of a half of each lane, which is a bf16."""
    if half:
        return lambda w: raw(w) & _U(0xFFFF0000)
    return lambda w: raw(w) << _U(16)


def _mbcnt(instruction: Instruction) -> Operation:
    operands = instruction.operands
    reads, _ = source_readers(instruction, operands[1:], "uu")
    store = write_lanes(operands[0])
    low = instruction.mnemonic == "v_mbcnt_lo_u32_b32"
    lane = np.arange(64)
    below_low = (1 << np.minimum(lane, 32)) - 1
    below_high = (1 << np.maximum(lane - 32, 0)) - 1
    masks = (below_low if low else below_high).astype(np.uint32)
    return lambda w: store(w, bit_count(reads[0](w) & masks[: w.width]) + reads[1](w), None)
