"""What vector instructions compute: a table of numpy functions on arrays of lanes.

An entry of OPERATIONS is (kinds of the sources, function). A kind says how a source's bits are
seen: u, i, f are 32-bit unsigned, signed and float; U, I are 64-bit; h, k are 16-bit unsigned and
signed; m is a lane mask. The item size of the result says how it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from amdgcn import exact
from amdgcn.wave import Fault

Array = Any  # NOTE: numpy's own stubs do not follow views of changing item type.

_U = np.uint32


def u64(a: Array) -> Array:
    return a.astype(np.uint64)


def bit_count(a: Array) -> Array:
    a = a - (a >> 1 & 0x55555555)
    a = (a & 0x33333333) + (a >> 2 & 0x33333333)
    return ((a + (a >> 4) & 0x0F0F0F0F) * _U(0x01010101)) >> 24


def _leading_zeros(x: Array) -> Array:
    """Zeros above the highest set bit; all ones where none is set."""
    bits = np.frexp(x.astype(np.float64))[1]  # NOTE: exact: 32 bits fit in a float64.
    return np.where(x == 0, 0xFFFFFFFF, 32 - bits).astype(_U)


def _reverse_bits(a: Array) -> Array:
    raw = np.unpackbits(a.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)[:, ::-1]
    return np.packbits(raw, axis=1).reshape(-1).view(">u4").astype(np.uint32)


def _bfe(a: Array, offset: Array, width: Array) -> Array:
    return a >> (offset & 31) & ((_U(1) << (width & 31)) - _U(1))


def _bfe_signed(a: Array, offset: Array, width: Array) -> Array:
    width = width & 31
    field = _bfe(a, offset, width)
    sign = np.where(width > 0, _U(1) << (np.maximum(width, 1) - _U(1)), _U(0)).astype(np.uint32)
    return (field ^ sign) - sign


def _median(a: Array, b: Array, c: Array) -> Array:
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


def _perm(a: Array, b: Array, selector: Array) -> Array:
    source = (u64(a) << 32 | u64(b)).view(np.uint8).reshape(-1, 8)
    picks = selector.view(np.uint8).reshape(-1, 4)
    if (picks > 12).any() or ((picks > 7) & (picks < 12)).any():
        raise Fault("v_perm_b32: expected selectors 0 to 7 and 12, got another")
    padded = np.concatenate([source, np.zeros((len(source), 5), np.uint8)], axis=1)
    return np.take_along_axis(padded, picks.astype(np.int64), axis=1).reshape(-1).view(np.uint32)


OPERATIONS: dict[str, tuple[str, Callable[..., Array]]] = {
    "v_mov_b32": ("u", lambda a: a),
    "v_accvgpr_read_b32": ("u", lambda a: a),
    "v_accvgpr_write_b32": ("u", lambda a: a),
    "v_accvgpr_mov_b32": ("u", lambda a: a),
    "v_mov_b64": ("U", lambda a: a),
    "v_mov_b16": ("h", lambda a: a),
    "v_not_b32": ("u", lambda a: ~a),
    "v_not_b16": ("h", lambda a: ~a),
    "v_add_u32": ("uu", lambda a, b: a + b),
    "v_sub_u32": ("uu", lambda a, b: a - b),
    "v_subrev_u32": ("uu", lambda a, b: b - a),
    "v_and_b32": ("uu", lambda a, b: a & b),
    "v_or_b32": ("uu", lambda a, b: a | b),
    "v_xor_b32": ("uu", lambda a, b: a ^ b),
    "v_xnor_b32": ("uu", lambda a, b: ~(a ^ b)),
    "v_and_b16": ("hh", lambda a, b: a & b),
    "v_or_b16": ("hh", lambda a, b: a | b),
    "v_xor_b16": ("hh", lambda a, b: a ^ b),
    "v_add_u16": ("hh", lambda a, b: a + b),
    "v_sub_u16": ("hh", lambda a, b: a - b),
    "v_lshlrev_b16": ("hh", lambda a, b: b << (a & np.uint16(15))),
    "v_lshrrev_b16": ("hh", lambda a, b: b >> (a & np.uint16(15))),
    "v_lshlrev_b32": ("uu", lambda a, b: b << (a & 31)),
    "v_lshrrev_b32": ("uu", lambda a, b: b >> (a & 31)),
    "v_ashrrev_i32": ("ui", lambda a, b: b >> (a & 31).astype(np.int32)),
    "v_lshlrev_b64": ("uU", lambda a, b: b << u64(a & 63)),
    "v_lshrrev_b64": ("uU", lambda a, b: b >> u64(a & 63)),
    "v_ashrrev_i64": ("uI", lambda a, b: b >> (a & 63).astype(np.int64)),
    "v_lshl_add_u32": ("uuu", lambda a, b, c: (a << (b & 31)) + c),
    "v_lshl_or_b32": ("uuu", lambda a, b, c: a << (b & 31) | c),
    "v_add_lshl_u32": ("uuu", lambda a, b, c: (a + b) << (c & 31)),
    "v_lshl_add_u64": ("UuU", lambda a, b, c: (a << u64(b & 7)) + c),
    "v_add_u64": ("UU", lambda a, b: a + b),
    "v_sub_u64": ("UU", lambda a, b: a - b),
    "v_mul_u64": ("UU", lambda a, b: a * b),
    "v_max_u64": ("UU", np.maximum),
    "v_min_u64": ("UU", np.minimum),
    "v_max_i64": ("II", np.maximum),
    "v_min_i64": ("II", np.minimum),
    "v_add3_u32": ("uuu", lambda a, b, c: a + b + c),
    "v_or3_b32": ("uuu", lambda a, b, c: a | b | c),
    "v_and_or_b32": ("uuu", lambda a, b, c: a & b | c),
    "v_xor3_b32": ("uuu", lambda a, b, c: a ^ b ^ c),
    "v_xad_u32": ("uuu", lambda a, b, c: (a ^ b) + c),
    "v_bfi_b32": ("uuu", lambda a, b, c: a & b | ~a & c),
    "v_bfe_u32": ("uuu", _bfe),
    "v_bfe_i32": ("uuu", _bfe_signed),
    "v_bfrev_b32": ("u", _reverse_bits),
    "v_ffbh_u32": ("u", _leading_zeros),
    "v_bcnt_u32_b32": ("uu", lambda a, b: bit_count(a) + b),
    "v_alignbit_b32": ("uuu", lambda a, b, c: ((u64(a) << 32 | u64(b)) >> u64(c & 31)).astype(_U)),
    "v_perm_b32": ("uuu", _perm),
    "v_max_u32": ("uu", np.maximum),
    "v_min_u32": ("uu", np.minimum),
    "v_max_i32": ("ii", np.maximum),
    "v_min_i32": ("ii", np.minimum),
    "v_max3_u32": ("uuu", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_min3_u32": ("uuu", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    "v_max3_i32": ("iii", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_min3_i32": ("iii", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    "v_med3_i32": ("iii", _median),
    "v_med3_u32": ("uuu", _median),
    "v_mul_lo_u32": ("uu", lambda a, b: a * b),
    "v_mul_hi_u32": ("uu", lambda a, b: (u64(a) * u64(b) >> np.uint64(32)).astype(_U)),
    "v_mul_hi_i32": ("ii", lambda a, b: (a.astype(np.int64) * b >> 32).astype(np.int32)),
    "v_mul_u32_u24": ("uu", lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF)),
    "v_mad_u32_u24": ("uuu", lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c),
    "v_mad_u32": ("uuu", lambda a, b, c: a * b + c),
    "v_mad_nc_u64_u32": ("uuU", lambda a, b, c: u64(a) * u64(b) + c),
    "v_mad_nc_i64_i32": ("iiI", lambda a, b, c: a.astype(np.int64) * b + c),
    "v_add_f32": ("ff", lambda a, b: a + b),
    "v_sub_f32": ("ff", lambda a, b: a - b),
    "v_subrev_f32": ("ff", lambda a, b: b - a),
    "v_mul_f32": ("ff", lambda a, b: a * b),
    "v_max_f32": ("ff", exact.maximum),
    "v_max3_f32": ("fff", lambda a, b, c: exact.maximum(exact.maximum(a, b), c)),
    "v_fma_f32": ("fff", exact.fma),
    "v_mad_f32": ("fff", exact.mad),
    "v_fmaak_f32": ("fff", exact.fma),
    "v_fmamk_f32": ("fff", exact.fma),
    "v_trunc_f32": ("f", np.trunc),
    "v_floor_f32": ("f", np.floor),
    "v_rndne_f32": ("f", np.rint),
    "v_ldexp_f32": ("fi", lambda a, b: np.ldexp(a.astype(np.float64), b).astype(np.float32)),
    "v_cvt_f32_u32": ("u", lambda a: a.astype(np.float32)),
    "v_cvt_f32_i32": ("i", lambda a: a.astype(np.float32)),
    "v_cvt_u32_f32": ("f", exact.to_u32),
    "v_cvt_i32_f32": ("f", exact.to_i32),
    "v_div_fixup_f32": ("fff", exact.div_fixup),
    "v_cndmask_b32": ("uum", lambda a, b, m: np.where(m, b, a)),
    "v_cndmask_b16": ("hhm", lambda a, b, m: np.where(m, b, a)),
}  # fmt: skip


def bitop3(table: int) -> Callable[..., Array]:
    """The bitwise function whose truth table is `table`, the first source the highest index bit."""

    def run(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros_like(a)
        for index in range(8):
            if table >> index & 1:
                terms = (source if index >> shift & 1 else ~source
                         for source, shift in ((a, 2), (b, 1), (c, 0)))  # fmt: skip
                first, second, third = terms
                result = result | first & second & third
        return result

    return run
