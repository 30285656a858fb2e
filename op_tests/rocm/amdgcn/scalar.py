"""What scalar instructions do: arithmetic on Python ints, branches, and the ones without effect.

An entry of the tables is (bits of the sources, bits of the result, function); the function returns
the result and the new SCC, None where SCC stays.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from amdgcn import exact
from amdgcn.assembly import Instruction
from amdgcn.wave import ALL_ONES, EXEC, VCC, Fault, Wave, constant, read_scalar, write_scalar

Operation = Callable[[Wave], "int | None"]
Result = tuple[int, "bool | None"]

END, BARRIER, PAUSE = -1, -2, -3  # PAUSE: other waves may run before the next instruction
U64 = (1 << 64) - 1

# NOTE: hazards and waits are the compiler's duty; memory operations complete at once here.
NO_EFFECT = (
    "s_nop", "s_delay_alu", "s_clause", "s_set_inst_prefetch_distance", "s_sendmsg",
    "s_barrier_signal", "buffer_gl0_inv", "buffer_gl1_inv", "buffer_inv", "buffer_wbinvl1",
    "buffer_wbl2", "global_inv", "global_wb",
    "s_setprio", "s_code_end", "s_inst_prefetch", "s_set_gpr_idx_off", "v_nop", "s_sleep",
    "s_set_vgpr_msb",
)  # fmt: skip

# gfx1250: how a wave recovers from a page fault, which no result shows.
_REPLAY_MODE = "hwreg(HW_REG_WAVE_MODE, 25, 1)"
# gfx1250: 0 for a launch without workgroup clusters, which is how these kernels are launched.
_CLUSTER_SHAPE = "hwreg(HW_REG_IB_STS2, 6, 4)"


def signed(value: int, bits: int = 32) -> int:
    """Two's complement."""
    return value - (1 << bits) if value >> (bits - 1) else value


def _logic(function: Callable[[int, int], int], bits: int) -> Callable[[int, int], Result]:
    limit = (1 << bits) - 1

    def run(a: int, b: int) -> Result:
        value = function(a, b) & limit
        return value, value != 0

    return run


def _add_i32(a: int, b: int) -> Result:
    total = signed(a) + signed(b)
    return total & ALL_ONES, not -(1 << 31) <= total < 1 << 31


def _sub_i32(a: int, b: int) -> Result:
    total = signed(a) - signed(b)
    return total & ALL_ONES, not -(1 << 31) <= total < 1 << 31


def _bfe(value: int, field: int, bits: int, is_signed: bool) -> Result:
    offset, width = field & (bits - 1), field >> 16 & 0x7F
    found = value >> offset & ((1 << width) - 1)
    if is_signed and width and found >> (width - 1):
        found -= 1 << width
    found &= (1 << bits) - 1
    return found, found != 0


def _float(function: Callable[..., Any]) -> Callable[..., Result]:
    """A float32 function of scalars as one of bits."""

    def run(*operands: int) -> Result:
        values = [np.array([x & ALL_ONES], np.uint32).view(np.float32) for x in operands]
        return int(np.asarray(function(*values)).view(np.uint32)[0]), None

    return run


def _of_bits(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


_LOGIC = {
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "andn2": lambda a, b: a & ~b, "orn2": lambda a, b: a | ~b, "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b), "xnor": lambda a, b: ~(a ^ b),
}  # fmt: skip

BINARY: dict[str, tuple[int, int, Callable[[int, int], Result]]] = {
    "s_add_u32": (32, 32, lambda a, b: ((a + b) & ALL_ONES, a + b > ALL_ONES)),
    "s_sub_u32": (32, 32, lambda a, b: ((a - b) & ALL_ONES, b > a)),
    "s_add_i32": (32, 32, _add_i32),
    "s_sub_i32": (32, 32, _sub_i32),
    "s_add_u64": (64, 64, lambda a, b: ((a + b) & U64, None)),
    "s_sub_u64": (64, 64, lambda a, b: ((a - b) & U64, None)),
    "s_mul_u64": (64, 64, lambda a, b: ((a * b) & U64, None)),
    "s_mul_i32": (32, 32, lambda a, b: ((a * b) & ALL_ONES, None)),
    "s_mul_hi_u32": (32, 32, lambda a, b: (a * b >> 32, None)),
    "s_mul_hi_i32": (32, 32, lambda a, b: (signed(a) * signed(b) >> 32 & ALL_ONES, None)),
    "s_min_i32": (32, 32, lambda a, b: (a, True) if signed(a) < signed(b) else (b, False)),
    "s_max_i32": (32, 32, lambda a, b: (a, True) if signed(a) > signed(b) else (b, False)),
    "s_min_u32": (32, 32, lambda a, b: (a, True) if a < b else (b, False)),
    "s_max_u32": (32, 32, lambda a, b: (a, True) if a > b else (b, False)),
    "s_bfm_b32": (32, 32, lambda a, b: ((((1 << (a & 31)) - 1) << (b & 31)) & ALL_ONES, None)),
    "s_bfe_u32": (32, 32, lambda a, b: _bfe(a, b, 32, False)),
    "s_bfe_i32": (32, 32, lambda a, b: _bfe(a, b, 32, True)),
    "s_bfe_u64": (64, 64, lambda a, b: _bfe(a, b, 64, False)),
    "s_bfe_i64": (64, 64, lambda a, b: _bfe(a, b, 64, True)),
    "s_pack_ll_b32_b16": (32, 32, lambda a, b: (a & 0xFFFF | (b & 0xFFFF) << 16, None)),
    "s_lshl_b32": (32, 32, _logic(lambda a, b: a << (b & 31), 32)),
    "s_lshr_b32": (32, 32, _logic(lambda a, b: a >> (b & 31), 32)),
    "s_ashr_i32": (32, 32, _logic(lambda a, b: signed(a) >> (b & 31), 32)),
    "s_lshl_b64": (64, 64, _logic(lambda a, b: a << (b & 63), 64)),
    "s_lshr_b64": (64, 64, _logic(lambda a, b: a >> (b & 63), 64)),
    "s_ashr_i64": (64, 64, _logic(lambda a, b: signed(a, 64) >> (b & 63), 64)),
    "s_add_f32": (32, 32, _float(lambda a, b: a + b)),
    "s_sub_f32": (32, 32, _float(lambda a, b: a - b)),
    "s_mul_f32": (32, 32, _float(lambda a, b: a * b)),
    "s_max_f32": (32, 32, _float(exact.maximum)),
    **{f"s_{name}_b{bits}": (bits, bits, _logic(function, bits))
       for name, function in _LOGIC.items() for bits in (32, 64)},
    **{f"s_lshl{n}_add_u32": (32, 32, lambda a, b, n=n: (((a << n) + b) & ALL_ONES,
                                                         (a << n) + b > ALL_ONES))
       for n in (1, 2, 3, 4)},
}  # fmt: skip
_NARROW_SECOND = ("s_lshl_b64", "s_lshr_b64", "s_ashr_i64", "s_bfe_u64", "s_bfe_i64")

UNARY: dict[str, tuple[int, int, Callable[[int], Result]]] = {
    "s_mov_b32": (32, 32, lambda a: (a, None)),
    "s_mov_b64": (64, 64, lambda a: (a, None)),
    "s_not_b32": (32, 32, lambda a: (~a & ALL_ONES, a != ALL_ONES)),
    "s_not_b64": (64, 64, lambda a: (~a & U64, a != U64)),
    "s_brev_b32": (32, 32, lambda a: (int(f"{a:032b}"[::-1], 2), None)),
    "s_abs_i32": (32, 32, lambda a: (abs(signed(a)) & ALL_ONES, a != 0)),
    "s_sext_i32_i16": (32, 32, lambda a: (signed(a & 0xFFFF, 16) & ALL_ONES, None)),
    "s_sext_i32_i8": (32, 32, lambda a: (signed(a & 0xFF, 8) & ALL_ONES, None)),
    "s_bcnt1_i32_b32": (32, 32, lambda a: (a.bit_count(), a != 0)),
    "s_bcnt1_i32_b64": (64, 32, lambda a: (a.bit_count(), a != 0)),
    "s_ff1_i32_b32": (32, 32, lambda a: ((a & -a).bit_length() - 1 & ALL_ONES, None)),
    "s_ff1_i32_b64": (64, 32, lambda a: ((a & -a).bit_length() - 1 & ALL_ONES, None)),
    "s_flbit_i32_b32": (32, 32, lambda a: (32 - a.bit_length() if a else ALL_ONES, None)),
    "s_cvt_f32_u32": (32, 32, _float(lambda a: a.view(np.uint32).astype(np.float32))),
    "s_cvt_f32_i32": (32, 32, _float(lambda a: a.view(np.int32).astype(np.float32))),
    "s_cvt_u32_f32": (32, 32, _float(exact.to_u32)),
    "s_cvt_i32_f32": (32, 32, _float(exact.to_i32)),
    "s_trunc_f32": (32, 32, _float(np.trunc)),
    "s_floor_f32": (32, 32, _float(np.floor)),
    "s_rndne_f32": (32, 32, _float(np.rint)),
}  # fmt: skip

# NOTE: of floats, "lg" is false and "nlg" true where one is NaN.
COMPARE: dict[str, Callable[..., bool]] = {
    "eq": lambda a, b: a == b, "lg": lambda a, b: (a < b) | (a > b), "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "neq": lambda a, b: not a == b, "nlt": lambda a, b: not a < b, "ngt": lambda a, b: not a > b,
    "nle": lambda a, b: not a <= b, "nge": lambda a, b: not a >= b,
    "nlg": lambda a, b: not (a < b or a > b),
    "o": lambda a, b: a == a and b == b, "u": lambda a, b: a != a or b != b,
}  # fmt: skip

_SAVEEXEC: dict[str, Callable[[int, int], int]] = {
    "and": lambda exec_, s: exec_ & s, "or": lambda exec_, s: exec_ | s,
    "xor": lambda exec_, s: exec_ ^ s, "andn2": lambda exec_, s: s & ~exec_,
    "orn2": lambda exec_, s: s | ~exec_, "andn1": lambda exec_, s: exec_ & ~s,
    "nand": lambda exec_, s: ~(exec_ & s), "nor": lambda exec_, s: ~(exec_ | s),
}  # fmt: skip


def decode_scalar(instruction: Instruction, labels: dict[str, int], rcp_rounding: int) -> Operation:
    """The function of a scalar instruction; raises Fault for one that is not known."""
    name, operands = instruction.mnemonic, instruction.operands
    if name.startswith("s_wait"):
        return _wait(instruction.text)
    if name.startswith(NO_EFFECT) and name != "s_barrier_wait":
        return lambda w: None
    if name in ("s_barrier", "s_barrier_wait"):
        return lambda w: BARRIER
    if name == "s_endpgm":
        return lambda w: END
    if name.startswith(("s_branch", "s_cbranch")):
        return _branch(name, labels[operands[0]])
    if name in BINARY:
        return _binary(name, operands)
    if name in UNARY:
        return _unary(*UNARY[name], operands)
    if name == "v_s_rcp_f32":
        return _unary(32, 32, _float(lambda a: exact.rcp(a, rcp_rounding)), operands)
    if name.endswith(("_saveexec_b32", "_saveexec_b64")):
        return _saveexec(name, operands)
    if name.startswith(("s_cmp_", "s_cmpk_")):
        return _compare(name, operands)
    other = _other(name, operands)
    if other is None:
        raise Fault(f"unknown instruction {name}")
    return other


def _wait(text: str) -> Operation:
    """Ends the loads of a wave down to what a wait allows; other counters have no effect."""
    name, _, value = text.partition(" ")
    counter = re.search(r"vmcnt\((\d+)\)", value)
    if name.startswith("s_wait_loadcnt"):
        shift = 8 if name == "s_wait_loadcnt_dscnt" else 0
        most = int(value, 0) >> shift
    elif name == "s_waitcnt" and counter is not None:
        most = int(counter[1])
    else:
        return lambda w: None

    def run(w: Wave) -> None:
        ended = w.in_flight[: max(0, len(w.in_flight) - most)]
        del w.in_flight[: len(ended)]
        w.round_trips += any(ended)

    return run


def _branch(name: str, target: int) -> Operation:
    def vcc_zero(w: Wave) -> bool:
        return w.s[VCC] == 0 and (w.width == 32 or w.s[VCC + 1] == 0)

    def exec_zero(w: Wave) -> bool:
        return not w.mask.any()

    conditions: dict[str, Callable[[Wave], bool]] = {
        "s_branch": lambda w: True,
        "s_cbranch_scc0": lambda w: not w.scc,
        "s_cbranch_scc1": lambda w: bool(w.scc),
        "s_cbranch_vccz": vcc_zero,
        "s_cbranch_vccnz": lambda w: not vcc_zero(w),
        "s_cbranch_execz": exec_zero,
        "s_cbranch_execnz": lambda w: not exec_zero(w),
    }
    if name not in conditions:
        raise Fault(f"unknown instruction {name}")
    condition = conditions[name]
    return lambda w: target if condition(w) else None


def _binary(name: str, operands: list[str]) -> Operation:
    in_bits, out_bits, function = BINARY[name]
    write = write_scalar(operands[0], out_bits)
    read_a = read_scalar(operands[1], in_bits)
    read_b = read_scalar(operands[2], 32 if name in _NARROW_SECOND else in_bits)

    def run(w: Wave) -> None:
        value, scc = function(read_a(w), read_b(w))
        write(w, value)
        if scc is not None:
            w.scc = int(scc)

    return run


def _unary(
    in_bits: int, out_bits: int, function: Callable[[int], Result], operands: list[str]
) -> Operation:
    write = write_scalar(operands[0], out_bits)
    read = read_scalar(operands[1], in_bits)

    def run(w: Wave) -> None:
        value, scc = function(read(w))
        write(w, value)
        if scc is not None:
            w.scc = int(scc)

    return run


def _saveexec(name: str, operands: list[str]) -> Operation:
    bits = int(name[-2:])
    name = name[: -len("_saveexec_b64")].removeprefix("s_")
    combine = _SAVEEXEC[name]
    write = write_scalar(operands[0], bits)
    read = read_scalar(operands[1], bits)
    limit = (1 << bits) - 1

    def run(w: Wave) -> None:
        old = (w.s[EXEC] | w.s[EXEC + 1] << 32) & limit
        new = combine(old, read(w)) & limit
        write(w, old)
        w.set_exec(new)
        w.scc = int(new != 0)

    return run


def _compare(name: str, operands: list[str]) -> Operation:
    _, _, operator, kind = name.split("_")
    bits = int(kind[1:])
    compare = COMPARE[operator]
    read_a, read_b = (read_scalar(operand, bits) for operand in operands)
    if kind[0] == "f":
        return _setting_scc(lambda w: compare(_of_bits(read_a(w)), _of_bits(read_b(w))))
    if kind[0] == "i" and name.startswith("s_cmpk"):
        short = signed((constant(operands[1]) or 0) & 0xFFFF, 16)
        return _setting_scc(lambda w: compare(signed(read_a(w)), short))
    if kind[0] == "i":
        return _setting_scc(lambda w: compare(signed(read_a(w), bits), signed(read_b(w), bits)))
    return _setting_scc(lambda w: compare(read_a(w), read_b(w)))


def _setting_scc(condition: Callable[[Wave], bool]) -> Operation:
    def run(w: Wave) -> None:
        w.scc = int(condition(w))

    return run


def _other(name: str, operands: list[str]) -> Operation | None:
    """Instructions that fit no table; None for one that is not known."""
    if name in ("s_bitcmp0_b32", "s_bitcmp1_b32"):
        read, read_bit = read_scalar(operands[0]), read_scalar(operands[1])
        wanted = int(name[8])
        return _setting_scc(lambda w: (read(w) >> (read_bit(w) & 31) & 1) == wanted)
    if name in ("s_bitset0_b32", "s_bitset1_b32"):
        own_bits, position = read_scalar(operands[0]), read_scalar(operands[1])
        store = write_scalar(operands[0])
        if name == "s_bitset1_b32":
            return lambda w: store(w, own_bits(w) | 1 << (position(w) & 31))
        return lambda w: store(w, own_bits(w) & ~(1 << (position(w) & 31)))
    if name == "s_setreg_imm32_b32" and operands[0] == _REPLAY_MODE:
        return lambda w: None
    if name == "s_getreg_b32" and operands[1] == _CLUSTER_SHAPE:
        write_zero = write_scalar(operands[0])
        return lambda w: write_zero(w, 0)
    if name not in ("s_cselect_b32", "s_cselect_b64", "s_movk_i32", "s_addk_i32", "s_mulk_i32",
                    "s_addc_u32", "s_subb_u32", "s_fmac_f32", "s_fmaak_f32", "s_fmamk_f32"):  # fmt: skip
        return None
    bits = 64 if name.endswith("b64") else 32
    write = write_scalar(operands[0], bits)
    reads = [read_scalar(operand, bits) for operand in operands[1:]]
    own = read_scalar(operands[0], bits)
    fused = _float(lambda a, b, c: exact.fma(a, b, c))

    def run(w: Wave) -> None:
        values = [read(w) for read in reads]
        if name.startswith("s_cselect"):
            write(w, values[0] if w.scc else values[1])
        elif name == "s_movk_i32":
            write(w, signed(values[0] & 0xFFFF, 16) & ALL_ONES)
        elif name == "s_mulk_i32":
            write(w, own(w) * signed(values[0] & 0xFFFF, 16) & ALL_ONES)
        elif name == "s_addk_i32":
            value, overflow = _add_i32(own(w), signed(values[0] & 0xFFFF, 16) & ALL_ONES)
            write(w, value)
            w.scc = int(bool(overflow))
        elif name == "s_addc_u32":
            total = values[0] + values[1] + w.scc
            write(w, total & ALL_ONES)
            w.scc = total >> 32
        elif name == "s_subb_u32":
            total = values[0] - values[1] - w.scc
            write(w, total & ALL_ONES)
            w.scc = int(total < 0)
        elif name == "s_fmac_f32":
            write(w, fused(*values, own(w))[0])
        else:
            write(w, fused(*values)[0])

    return run
