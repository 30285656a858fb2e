"""Single-precision arithmetic of AMD GPUs, to the last bit, on arrays of lanes.

numpy's float32 add, subtract, multiply and divide are IEEE with subnormals, as the kernels' float
mode asks for. What numpy lacks is here. fma: the product of two float32 is exact in float64; the
sum with the addend is rounded to odd there, after which rounding to float32 is right (53 >= 2 * 24
+ 2 bits). The division helpers follow the pseudo-code of AMD's instruction set documents, with the
scaling of v_div_fmas in the direction that undoes v_div_scale's. `rcp` is only within 1 ulp on
hardware, which leaves the two neighbours of the exact value, and flushes subnormals; which of them
it is, is a parameter, so that results that must not depend on it can be run with both.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U32 = NDArray[np.uint32]
Bools = NDArray[np.bool_]

_MIN_NORMAL = float(np.finfo(np.float32).tiny)
_NAN = np.float32(np.nan)


def _fma_to_odd(a: F32, b: F32, c: F32) -> F64:
    """a * b + c in float64, rounded to odd: exact, or with the last bit set."""
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total: F64 = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    inexact = (error != 0) & np.isfinite(total)
    if not inexact.any():
        return total
    bits = total.view(np.int64).copy()
    even = inexact & ((bits & 1) == 0)
    away = (error > 0) == (total > 0)
    bits[even & away] += 1
    bits[even & ~away] -= 1
    return bits.view(np.float64)


def fma(a: F32, b: F32, c: F32) -> F32:
    """a * b + c with one rounding."""
    return _fma_to_odd(a, b, c).astype(np.float32)


def flushed(x: F32) -> F32:
    """Subnormals as zeros of their sign."""
    return np.where(np.abs(x) < _MIN_NORMAL, np.copysign(np.float32(0), x), x).astype(np.float32)


def mad(a: F32, b: F32, c: F32) -> F32:
    """v_mad_f32, v_mac_f32: a * b, rounded, + c; gfx90a's, which flush subnormals in any mode."""
    return flushed(flushed(flushed(a) * flushed(b)) + flushed(c))


def maximum(a: F32, b: F32) -> F32:
    """v_max_f32 where NaN follows IEEE: the other operand for a quiet NaN, a quiet NaN for a signalling
    one, +0 above -0."""
    quiet = np.uint32(1 << 22)
    bits = [x.view(np.uint32) for x in (a, b)]
    found = np.where(a == b, bits[0] & bits[1], np.where(np.isnan(b) | (a > b), *bits))
    for x, raw in zip((a, b), bits, strict=True):
        found = np.where(np.isnan(x) & (raw & quiet == 0), raw | quiet, found)
    result: F32 = found.astype(np.uint32).view(np.float32)
    return result


def rcp(x: F32, rounding: int) -> F32:
    """1 / x as the hardware may return it: the float32 next to it on one side or the other.

    Args:
        x: a float32 array; subnormals count as 0.
        rounding: -1 for the neighbour below in magnitude, 1 above, 0 for the nearer one.
    """
    x = flushed(x)
    with np.errstate(divide="ignore"):
        result = np.float32(1) / x
        exact = np.abs(1.0 / x.astype(np.float64))
    magnitude = np.abs(result)
    wrong_side = magnitude < exact if rounding > 0 else magnitude > exact
    if rounding != 0:
        step = np.where(wrong_side & np.isfinite(result) & (result != 0), rounding, 0)
        result = (result.view(np.int32) + step.astype(np.int32)).view(np.float32)
    return flushed(result)


def _exponent(x: F32) -> NDArray[np.int64]:
    """The biased exponent field."""
    return ((x.view(np.uint32) >> 23) & 0xFF).astype(np.int64)


def div_scale(value: F32, denominator: F32, numerator: F32) -> tuple[F32, Bools]:
    """v_div_scale_f32: `value` (one of the other two) scaled for the division, and VCC."""
    num, den = numerator.astype(np.float64), denominator.astype(np.float64)
    is_den = value.view(np.uint32) == denominator.view(np.uint32)
    is_num = value.view(np.uint32) == numerator.view(np.uint32)
    up = np.ldexp(value.astype(np.float64), 64).astype(np.float32)
    down = np.ldexp(value.astype(np.float64), -64).astype(np.float32)
    quotient = np.abs(num / den)
    small_quotient = (quotient < _MIN_NORMAL) & (quotient > 0)
    reciprocal = np.abs(1.0 / den)
    small_reciprocal = (reciprocal < float(np.finfo(np.float64).tiny)) & (reciprocal > 0)
    conditions = [
        (num == 0) | (den == 0),
        _exponent(numerator) - _exponent(denominator) >= 96,
        (np.abs(den) < _MIN_NORMAL) & (den != 0),
        small_reciprocal & small_quotient,
        small_reciprocal,
        small_quotient,
        _exponent(numerator) <= 23,
    ]
    scaled_den, scaled_num = np.where(is_den, up, value), np.where(is_num, up, value)
    results = [np.full_like(value, _NAN), scaled_den, up, scaled_den, down, scaled_num, up]
    flags = [False, True, False, True, False, True, False]
    scaled = np.select(conditions, results, value).astype(np.float32)
    return scaled, np.select(conditions, [np.full(value.shape, f) for f in flags], False)


def div_fmas(a: F32, b: F32, c: F32, scaled: Bools) -> F32:
    """v_div_fmas_f32: fma(a, b, c), with the scaling of v_div_scale undone where `scaled`."""
    exact = _fma_to_odd(a, b, c)
    power = np.where(scaled, np.where(_exponent(c) > 127, 64, -64), 0)
    return np.ldexp(exact, power).astype(np.float32)


def div_fixup(quotient: F32, denominator: F32, numerator: F32) -> F32:
    """v_div_fixup_f32: the sign, and the special cases of a division."""
    negative = np.signbit(denominator) ^ np.signbit(numerator)
    magnitude = np.abs(quotient)
    both_zero = (numerator == 0) & (denominator == 0)
    both_inf = np.isinf(numerator) & np.isinf(denominator)
    conditions = [
        np.isnan(numerator) | np.isnan(denominator) | both_zero | both_inf,
        (denominator == 0) | np.isinf(numerator),
        np.isinf(denominator) | (numerator == 0),
        _exponent(numerator) - _exponent(denominator) < -150,
    ]
    like = np.full_like(quotient, 0)
    results = [like + _NAN, like + np.float32(np.inf), like, like]
    magnitude = np.select(conditions, results, magnitude).astype(np.float32)
    return np.where(negative, -magnitude, magnitude).astype(np.float32)


def to_u32(x: F32) -> U32:
    """v_cvt_u32_f32: towards zero, clamped; NaN gives 0."""
    wide = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0, posinf=2.0**32, neginf=0.0)
    return np.clip(wide, 0, 2.0**32 - 1).astype(np.uint64).astype(np.uint32)


def to_i32(x: F32) -> NDArray[np.int32]:
    """v_cvt_i32_f32: towards zero, clamped; NaN gives 0."""
    wide = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0)
    return np.clip(wide, -(2.0**31), 2.0**31 - 1).astype(np.int64).astype(np.int32)
