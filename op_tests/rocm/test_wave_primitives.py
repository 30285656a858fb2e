"""Do the wave operations and the arithmetic of the kernels do on AMD GPUs what their headers say?

Each is a small kernel (`primitives.cu`), compiled for real and executed by the interpreter, against
numpy. Which instructions they become is held by `test_wave_instructions`.
"""

from __future__ import annotations

import _checkout  # noqa: F401
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("ziglang", reason="the cross-compiler: pip install ziglang")

from primitives import run_primitive  # noqa: E402

from aiter.jit.device_kernels import ARCHS as FACTS  # noqa: E402

ARCHS = tuple(FACTS)
Words = NDArray[np.uint32]


def random_words(count: int, seed: int = 0, high: int = 2**32) -> Words:
    return np.random.default_rng(seed).integers(0, high, count, dtype=np.uint32)


def as_words(values: NDArray[np.generic]) -> Words:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


@pytest.mark.parametrize("arch", ARCHS)
def test_wave_max_32(arch: str) -> None:
    width = FACTS[arch].wave_size
    for lane in range(width):
        words = random_words(width, lane, 2**31)
        words[lane] = 2**32 - 1 - lane
        assert (run_primitive(arch, "wave_max_32", words) == words[lane]).all(), f"lane {lane}"
    assert (run_primitive(arch, "wave_max_32", np.zeros(width, np.uint32)) == 0).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_wave_max_64(arch: str) -> None:
    width = FACTS[arch].wave_size
    for seed in range(20):
        # NOTE: few different high words, so that low words of others must not win.
        words = np.concatenate([random_words(width, seed, 3), random_words(width, seed + 100)])
        wide = words[:width].astype(np.uint64) << 32 | words[width:].astype(np.uint64)
        got = run_primitive(arch, "wave_max_64", words)
        assert (got[:width].astype(np.uint64) << 32 | got[width:] == wide.max()).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_sum_by_halves(arch: str) -> None:
    width = FACTS[arch].wave_size
    for seed in range(10):
        values = np.random.default_rng(seed).random(width, np.float32) ** 9
        expected = values
        while len(expected) > 1:
            expected = expected[: len(expected) // 2] + expected[len(expected) // 2 :]
        got = run_primitive(arch, "sum_by_halves", as_words(values))
        assert (got == as_words(expected)[0]).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_sum_in_order(arch: str) -> None:
    width = FACTS[arch].wave_size
    for count in (0, 1, 2, 7, width - 1, width):
        values = np.random.default_rng(count).random(width, np.float32)
        expected = np.float32(0.25)
        for value in values[:count]:
            expected = np.float32(expected + value)
        got = run_primitive(arch, "sum_in_order", as_words(values), count)
        assert (got == as_words(np.array([expected]))[0]).all(), f"count {count}"


@pytest.mark.parametrize("arch", ARCHS)
def test_inclusive_sum(arch: str) -> None:
    words = random_words(FACTS[arch].wave_size)
    got = run_primitive(arch, "inclusive_sum", words)
    assert np.array_equal(got, np.cumsum(words, dtype=np.uint32))


@pytest.mark.parametrize("arch", ARCHS)
def test_read_lane(arch: str) -> None:
    words = random_words(FACTS[arch].wave_size)
    for lane in range(len(words)):
        assert (run_primitive(arch, "read_lane", words, lane) == words[lane]).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_rank(arch: str) -> None:
    width = FACTS[arch].wave_size
    for limit in (0, 2**31, 2**32 - 2):
        words = random_words(2 * width, limit % 7)
        got = run_primitive(arch, "rank", words, limit, width)
        flags = words[:width] > limit
        assert np.array_equal(got[:width], np.cumsum(flags) - flags)
        assert (got[width:] == flags.sum()).all()


@pytest.mark.parametrize("distance", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("arch", ARCHS)
def test_swap(arch: str, distance: int) -> None:
    width = FACTS[arch].wave_size
    of_groups = random_words(width // distance, distance)
    words = np.repeat(of_groups, distance)
    expected = np.repeat(of_groups.reshape(-1, 2)[:, ::-1].reshape(-1), distance)
    assert np.array_equal(run_primitive(arch, f"swap_{distance}", words), expected)


@pytest.mark.parametrize("mask", [1, 2, 3, 4, 7, 8, 15, 16, 31])
@pytest.mark.parametrize("arch", ARCHS)
def test_exchange(arch: str, mask: int) -> None:
    words = random_words(FACTS[arch].wave_size, mask)
    expected = words[np.arange(len(words)) ^ mask]
    assert np.array_equal(run_primitive(arch, f"exchange_{mask}", words), expected)


@pytest.mark.parametrize("group", [8, 16, 32])
@pytest.mark.parametrize("arch", ARCHS)
def test_sum_in_groups(arch: str, group: int) -> None:
    width = FACTS[arch].wave_size
    for count in (*range(1, 9), 32)[: 8 if group < 32 else 9]:
        values = np.random.default_rng(count).random(width, np.float32) ** 9
        rows = values.reshape(-1, group)
        expected = rows[:, 0].copy()
        for term in rows.T[1:count]:
            expected += term
        got = run_primitive(arch, f"sum_in_groups_{group}", as_words(values), count)
        sums = got.reshape(-1, group)[:, :count]
        assert (sums == as_words(expected)[:, None]).all(), f"count {count}"


@pytest.mark.parametrize("arch", ARCHS)
def test_uniform_wave_idx(arch: str) -> None:
    width = FACTS[arch].wave_size
    words = random_words(4 * width)
    got = run_primitive(arch, "wave_index", words, threads=4 * width)
    assert np.array_equal(got, np.repeat(words[:4], width))


@pytest.mark.parametrize("arch", ARCHS)
def test_anew(arch: str) -> None:
    words = random_words(FACTS[arch].wave_size)
    assert np.array_equal(run_primitive(arch, "sum_of_anew", words, 7), words + np.uint32(49))


@pytest.mark.parametrize("waves", [4, 8, 16])
@pytest.mark.parametrize("arch", ARCHS)
def test_prefix_over_workgroup(arch: str, waves: int) -> None:
    threads = waves * FACTS[arch].wave_size
    words = random_words(2 * threads)
    got = run_primitive(arch, "prefix_over_workgroup", words, waves, threads, seed=waves)
    sums = np.cumsum(words[:threads], dtype=np.uint32)
    assert np.array_equal(got[:threads], sums - words[:threads])
    assert (got[threads:] == sums[-1]).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_exp(arch: str) -> None:
    width = FACTS[arch].wave_size
    values = -np.random.default_rng(0).random(16 * width, np.float32) * 110
    values[:6] = [0.0, -0.0, -np.inf, -87.33, -103.9, -1e-30]
    got = run_primitive(arch, "exp_nonpositive_f32", as_words(values), threads=len(values))
    exact = np.exp(values.astype(np.float64))
    # NOTE: 7.6e-8 relative in the normal range, as the header says, and a unit of the subnormals.
    assert (np.abs(got.view(np.float32) - exact) <= 7.6e-8 * exact + 2.0**-149).all()


@pytest.mark.parametrize("rounding", [-1, 0, 1])
@pytest.mark.parametrize("arch", ARCHS)
def test_quotient_is_correctly_rounded(arch: str, rounding: int) -> None:
    rng = np.random.default_rng(rounding + 1)
    count = 16 * FACTS[arch].wave_size
    numerator = np.exp2(-150 * rng.random(count) ** 2).astype(np.float32)
    numerator *= 1 + rng.random(count, np.float32)
    denominator = 1 + (255 * rng.random(count, np.float32)) ** 2
    numerator[:4], denominator[:2] = [0.0, 1.0, 2.0**-126, 2.0**-149], 1.0
    words = np.concatenate([as_words(numerator), as_words(denominator)])
    got = run_primitive(arch, "quotient", words, threads=count, rcp_rounding=rounding)
    assert np.array_equal(got[:count], as_words(numerator / denominator))


@pytest.mark.parametrize("rounding", [-1, 0, 1])
@pytest.mark.parametrize("arch", ARCHS)
def test_integer_quotient(arch: str, rounding: int) -> None:
    count = 16 * FACTS[arch].wave_size
    for divisor in (1, 2, 3, 5, 7, 9, 11, 32, 161, 65535, 2**31 + 1, 2**32 - 1):
        words = random_words(2 * count, divisor)
        words[:count:7] -= words[:count:7] % np.uint32(divisor)
        got = run_primitive(arch, "integer_quotient", words, divisor, count, rcp_rounding=rounding)
        assert np.array_equal(got[:count], words[:count] // np.uint32(divisor)), divisor
        assert np.array_equal(got[count:], words[:count] % np.uint32(divisor)), divisor


@pytest.mark.parametrize("arch", ARCHS)
def test_every_f16(arch: str) -> None:
    for first in range(0, 65536, 1024):
        bits = np.arange(first, first + 1024, dtype=np.uint32)
        got = run_primitive(arch, "f16_to_f32", bits, threads=1024).view(np.float32)
        expected = bits.astype(np.uint16).view(np.float16).astype(np.float32)
        assert np.array_equal(got, expected, equal_nan=True), f"from {first:#x}"


@pytest.mark.parametrize("arch", ARCHS)
def test_f32_keys_are_ordered(arch: str) -> None:
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38, -3.4e38]
    values = np.concatenate([special, np.random.default_rng(0).normal(size=1015)])
    got = run_primitive(arch, "f32_key", as_words(values), threads=1024).astype(np.int64)
    cleaned = np.where(np.isnan(values), -np.inf, values).astype(np.float32)
    order = np.argsort(cleaned, kind="stable")
    keys, ordered = got[order], cleaned[order]
    assert np.array_equal(keys[1:] > keys[:-1], ordered[1:] > ordered[:-1])
    assert np.array_equal(keys[1:] == keys[:-1], ordered[1:] == ordered[:-1])
    assert (got > 0).all()
