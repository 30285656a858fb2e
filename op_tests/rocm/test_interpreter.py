"""Does the interpreter notice what is wrong, and is its arithmetic exact?

Faults are planted in kernels (`planted.cu`) and in assembly text; each must be reported with the
instruction and the place. The float arithmetic is compared with rational numbers.

Long because every kind of instruction that took thought has a test.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

import _checkout  # noqa: F401
import numpy as np
import pytest
from amdgcn import exact
from amdgcn.assembly import parse_instruction, whole_registers
from amdgcn.memory import GlobalMemory, Lds
from amdgcn.memory_ops import Memories, decode_memory
from amdgcn.operations import OPERATIONS
from amdgcn.scalar import decode_scalar
from amdgcn.vector import decode_vector
from amdgcn.wave import VCC, Fault, Wave, int_of, scalar_index
from numpy.typing import NDArray

pytest.importorskip("ziglang", reason="the cross-compiler: pip install ziglang")

import primitives as primitive_kernels  # noqa: E402
from primitives import primitives, run_primitive  # noqa: E402

from aiter.jit.device_kernels import ARCHS as FACTS  # noqa: E402

ARCHS = ("gfx942", "gfx1201")


def words(count: int) -> NDArray[np.uint32]:
    return np.arange(1, count + 1, dtype=np.uint32)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("store_past_the_end", 1, r"global_store.*expected an address in a buffer.*output"),
        ("store_past_the_end", 1 << 20, r"expected an address in a buffer"),
        ("store_past_the_end", 2**32 - 1, r"expected an address in a buffer"),
        ("misaligned_store", 2, r"global_store.*expected a multiple of 4"),
        ("store_to_input", 0, r"store to input, which is read-only"),
        ("missing_barrier", 0, r"(race on LDS byte|that was written)"),
        ("two_stores", 0, r"global_store.*race on output, byte \d+"),
        ("atomic_on_noise", 0, r"LDS.*expected a byte that was written"),
        ("unwritten_lds", 100, r"LDS.*expected a byte that was written"),
        ("lds_past_the_end", 0, r"LDS offset.*within the workgroup's 512 bytes"),
    ],
)
def test_planted_fault(arch: str, name: str, argument: int, message: str) -> None:
    with pytest.raises(Fault, match=message) as caught:
        run_primitive(arch, name, words(256), argument, threads=256, lds_bytes=512)
    assert re.search(rf"^{name} on {arch}, line \d+, workgroup 0, wave \d: `", str(caught.value))


@pytest.mark.parametrize("arch", ARCHS)
def test_faultless_twins(arch: str) -> None:
    """The same kernels without the fault run."""
    data = words(256)
    shifted = run_primitive(arch, "store_past_the_end", data, 0, threads=256)
    assert np.array_equal(shifted, data)
    reversed_words = run_primitive(arch, "missing_barrier", data, 1, threads=256)
    assert np.array_equal(reversed_words, data[::-1])
    for name in ("two_stores", "atomic_on_noise"):
        assert np.array_equal(run_primitive(arch, name, data, 1, threads=256), data[::-1])
    copied = run_primitive(arch, "unwritten_lds", data, 256, threads=256)
    assert np.array_equal(copied, data)
    got = run_primitive(arch, "lds_past_the_end", data, 5, threads=256, lds_bytes=1024)
    assert np.array_equal(got, data[::-1] + 5)


@pytest.mark.parametrize("arch", FACTS)
def test_arrivals_are_counted(arch: str) -> None:
    """Every wave adds once for its lanes and hands out what was there before, in some order."""
    threads = 4 * FACTS[arch].wave_size
    data = words(2 * threads + 1)
    data[:] = 5
    got = run_primitive(arch, "count_arrivals_in_order", data, 3, threads=threads)
    # NOTE: memory that nobody wrote holds this pattern, which the counter starts from.
    start = 0xA5A5A5A5
    assert (got[:threads] == 5).all() and got[threads] == start + 3 * threads
    expected = start + 3 * np.arange(threads)
    assert np.array_equal(np.sort(got[threads + 1 :]), expected.astype(np.uint32))


@pytest.mark.parametrize("arch", ARCHS)
def test_wave_order_alone_shows_a_missing_barrier(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the race check, a missing barrier still gives other results in another order."""
    monkeypatch.setattr("amdgcn.memory.Lds._note", lambda *arguments, **named: None)
    outcomes = set()
    for seed in range(8):
        try:
            got = run_primitive(arch, "missing_barrier", words(256), 0, 256, seed=seed)
            outcomes.add(got.tobytes())
        except Fault as fault:
            outcomes.add(str(fault))
    assert len(outcomes) > 1


@pytest.mark.parametrize("arch", ARCHS)
def test_endless_loop(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amdgcn.machine.MAX_STEPS", 1000)
    with pytest.raises(Fault, match="expected an end or a barrier within 1000 instructions"):
        run_primitive(arch, "endless_loop", words(64), 77)


@pytest.mark.parametrize(
    "line",
    [
        "v_frobnicate_f32 v0, v1, v2",
        "s_frobnicate_b32 s0, s1",
        "ds_frobnicate_b32 v0, v1",
        "global_atomic_pk_add_bf16 v0, v1, s[0:1]",
        "v_add_f32_e64 v0, v1, v2 clamp",
        "v_mul_f32_e64 v0, v1, v2 mul:2",
        "v_mov_b32_e32 v0, src_shared_base",
        "v_add_u32_dpp v0, v0, v0 row_frobnicate:1 row_mask:0xf bank_mask:0xf",
        "global_load_dword v0, v[0:1], off frobnicate",
        "v_add_u32_e32 v0, v1",
        "v_dual_mov_b32 v0, v1 :: v_dual_mul_f32 v1, v2, v3 clamp",
        "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 2), 0",
        "s_getreg_b32 s0, hwreg(HW_REG_HW_ID)",
        "global_load_b32 v0, v[2:3], off scale_offset",
    ],
)
def test_unknown_instruction(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = primitives("gfx942")["read_lane"]
    instructions = [parse_instruction(line, 7), *kernel.instructions]
    broken = replace(kernel, instructions=instructions, decoded={})
    monkeypatch.setattr(primitive_kernels, "primitives", lambda arch: {"read_lane": broken})
    with pytest.raises(
        Fault, match=re.escape(f"read_lane on gfx942, line 7, decoding: `{line}`: ")
    ):
        run_primitive("gfx942", "read_lane", words(64))


def a_wave(width: int = 32) -> Wave:
    return Wave(width, 0, 8, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("arch", "modifier", "expected"),
    [
        ("gfx1250", "", 49),
        ("gfx1250", " scale_offset", 46),
        ("gfx1250", " offset:8", 51),
        ("gfx1201", "", None),
    ],
)
def test_offsets_beside_a_scalar_address(arch: str, modifier: str, expected: int | None) -> None:
    """An offset of -4 from word 50: signed and scaled by the access on gfx1250, 4 GiB elsewhere."""
    memory = GlobalMemory()
    address = memory.add("words", words(100)) + 4 * 49
    wave = a_wave()
    wave.s[2], wave.s[3] = address & 0xFFFFFFFF, address >> 32
    wave.v[1] = np.full(32, 2**32 - 4, np.uint32)
    load = parse_instruction(f"global_load_b32 v0, v1, s[2:3]{modifier}", 1)
    operation = decode_memory(load, Memories(memory, arch))
    if expected is None:
        with pytest.raises(Fault, match="expected an address in a buffer"):
            operation(wave)
    else:
        operation(wave)
        assert (wave.v[0] == expected).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s_load_u16 s4, s[2:3], s5 offset:0x0 scale_offset", [0x8003]),
        ("s_load_i16 s4, s[2:3], s5 scale_offset", [0xFFFF8003]),
        ("s_load_u16 s4, s[2:3], s5 offset:0x3", [0x8003]),
        ("s_load_dwordx2 s[4:5], s[2:3], s5 scale_offset", [0x800D_800C, 0x800F_800E]),
        ("s_load_dword s4, s[2:3], 0x8", [0x8005_8004]),
        ("s_load_b32 vcc_hi, s[2:3], 0x8", [0x8005_8004]),
        ("s_load_b64 vcc, s[2:3], 0x8", [0x8005_8004, 0x8007_8006]),
    ],
)
def test_scalar_loads(text: str, expected: list[int]) -> None:
    """The offset is 3, of accesses or of bytes; the halves of words count up from 0x8000."""
    memory = GlobalMemory()
    address = memory.add("halves", np.arange(0x8000, 0x8100, dtype=np.uint16))
    wave = a_wave()
    wave.s[2], wave.s[3], wave.s[5] = address & 0xFFFFFFFF, address >> 32, 3
    decode_memory(parse_instruction(text, 1), Memories(memory, "gfx1250"))(wave)
    destination = scalar_index(text.split()[1].rstrip(","))
    assert destination is not None
    assert wave.s[destination : destination + len(expected)] == expected


@pytest.mark.parametrize(("width", "operand"), [("b128", "vcc"), ("b64", "vcc_hi"), ("b32", "m0")])
def test_scalar_load_past_vcc(width: str, operand: str) -> None:
    instruction = parse_instruction(f"s_load_{width} {operand}, s[2:3], 0x0", 1)
    with pytest.raises(Fault, match=f"expected s registers or vcc, got {operand}"):
        decode_memory(instruction, Memories(GlobalMemory(), "gfx1250"))


@pytest.mark.parametrize(("offset", "is_fine"), [(16, True), (4, False), (8, False)])
@pytest.mark.parametrize(
    "access",
    ["global_load_dwordx4 v[0:3], v4, s[2:3]", "global_store_dwordx4 v4, v[0:3], s[2:3]",
     "ds_read_b128 v[0:3], v4", "ds_write_b128 v4, v[0:3]"],
)  # fmt: skip
def test_sixteen_bytes_are_aligned(access: str, offset: int, is_fine: bool) -> None:
    memory = GlobalMemory()
    address = memory.add("words", words(256))
    wave = a_wave()
    wave.s[2], wave.s[3] = address & 0xFFFFFFFF, address >> 32
    wave.v[4] = words(32) * 16 - 16 + offset
    memories = Memories(memory, "gfx942")
    memories.lds = Lds(1024, np.random.default_rng(0))
    memories.lds.store(np.arange(0, 1024, 4), np.zeros((256, 4), np.uint8), wave=0, epoch=-1)
    operation = decode_memory(parse_instruction(access, 1), memories)
    if is_fine:
        operation(wave)
    else:
        with pytest.raises(Fault, match="expected a multiple of 16|expected an aligned one"):
            operation(wave)


@pytest.mark.parametrize(
    ("modifiers", "picks"),
    [("", (0, 0, 1, 1)), (" op_sel_hi:[1,0]", (0, 0, 1, 0)), (" op_sel:[1,0]", (1, 0, 1, 1)),
     (" op_sel:[0,1] op_sel_hi:[0,1]", (0, 1, 0, 1))],
)  # fmt: skip
def test_packed_multiplication(modifiers: str, picks: tuple[int, int, int, int]) -> None:
    """Which halves of the two sources are multiplied for the low and for the high result."""
    wave = a_wave(64)
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 2, 64)).astype(np.float32)
    wave.v[2], wave.v[3] = (half.view(np.uint32) for half in first)
    wave.v[4], wave.v[5] = (half.view(np.uint32) for half in second)
    text = f"v_pk_mul_f32 v[0:1], v[2:3], v[4:5]{modifiers}"
    decode_vector(parse_instruction(text, 1), 64, 0)(wave)
    a, b, c, d = picks
    assert np.array_equal(wave.v[0].view(np.float32), first[a] * second[b])
    assert np.array_equal(wave.v[1].view(np.float32), first[c] * second[d])


@pytest.mark.parametrize(
    ("sources", "modifiers", "seen"),
    [("v1, v2, v3", "", "fff"), ("v1, v2, v3", " op_sel_hi:[1,1,0]", "llf"),
     ("v1, v2, v3", " op_sel:[1,0,0] op_sel_hi:[1,1,0]", "hlf"),
     ("v1, v2, v3", " op_sel:[0,1,1] op_sel_hi:[1,1,1]", "lhh"),
     ("-v1, |v2|, -|v3|", " op_sel:[1,0,0] op_sel_hi:[1,0,1]", "hfl"),
     ("s1, v2, v3", " op_sel_hi:[1,0,0]", "lff"), ("v1, v2, 1.0", " op_sel_hi:[1,1,0]", "ll1")],
)  # fmt: skip
def test_mixed_fma(sources: str, modifiers: str, seen: str) -> None:
    """Each source a float, or the bf16 of its low or high half; one rounding."""
    wave = a_wave()
    rng = np.random.default_rng(0)
    high, low = (rng.normal(size=(2, 3, 32)) * 100).astype(np.float32).view(np.uint32)
    raw = high >> 16 << 16 | low >> 16
    wave.v[1], wave.v[2], wave.v[3] = raw
    wave.s[1] = int(raw[0, 0])
    values = []
    for index, (source, what) in enumerate(zip(sources.split(", "), seen, strict=True)):
        bits = np.full(32, wave.s[1], np.uint32) if source.startswith("s") else raw[index]
        bits = {"l": bits << 16, "h": bits >> 16 << 16, "f": bits, "1": words(32) * 0}[what]
        value = np.float32(1) + 0 * bits if what == "1" else bits.astype(np.uint32).view(np.float32)
        value = np.abs(value) if "|" in source else value
        values.append(-value if source.startswith("-") else value)
    text = f"v_fma_mix_f32_bf16 v0, {sources}{modifiers}"
    decode_vector(parse_instruction(text, 1), 32, 0)(wave)
    for *terms, got in zip(*values, wave.v[0].view(np.float32), strict=True):
        a, b, c = (Fraction(float(term)) for term in terms)
        assert got == nearest(a * b + c), terms


@pytest.mark.parametrize(
    ("text", "message"),
    [("v_fma_mix_f32_bf16 v0, v1, v2, v3 op_sel:[1,0,0]", "a half of a bf16 source"),
     ("v_fma_mix_f32_bf16 v0, v1, 1.0, v3 op_sel_hi:[1,1,0]", "expected a register"),
     ("v_fma_mix_f32_bf16 v0, v1, v2, v3 clamp:1", "unknown modifier")],
)  # fmt: skip
def test_mixed_fma_that_is_not_known(text: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        decode_vector(parse_instruction(text, 1), 32, 0)


def test_two_sources_of_a_dual_instruction() -> None:
    """0x14 is the table of xor where the third source is 0."""
    wave = a_wave()
    wave.v[1], wave.v[2] = words(32) * 7, words(32) * 1001
    expected = wave.v[1] ^ wave.v[2], wave.v[2].copy()
    dual = "v_dual_bitop2_b32 v2, v1, v2 bitop3:0x14 :: v_dual_mov_b32 v1, v2"
    decode_vector(parse_instruction(dual, 1), 32, 0)(wave)
    assert np.array_equal(wave.v[2], expected[0]) and np.array_equal(wave.v[1], expected[1])


@pytest.mark.parametrize(("part", "shift"), [("WORD_1", 16), ("WORD_0", 0), ("DWORD", 0)])
def test_compare_of_halves(part: str, shift: int) -> None:
    wave = a_wave(64)
    rng = np.random.default_rng(0)
    wave.v[1], wave.v[2] = rng.integers(0, 2**32, (2, 64), np.uint32)
    text = f"v_cmp_lt_u16_sdwa vcc, v1, v2 src0_sel:{part} src1_sel:DWORD"
    decode_vector(parse_instruction(text, 1), 64, 0)(wave)
    expected = (wave.v[1] >> shift & 0xFFFF) < (wave.v[2] & 0xFFFF)
    assert wave.s[VCC] | wave.s[VCC + 1] << 32 == int_of(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("s_bitset1_b32 s4, 31", 0x80000005), ("s_bitset1_b32 s4, 33", 7),
     ("s_bitset0_b32 s4, 2", 1), ("s_bitset0_b32 s4, 1", 5)],
)  # fmt: skip
def test_one_bit_of_a_scalar(text: str, expected: int) -> None:
    wave = a_wave()
    wave.s[4] = 5
    decode_scalar(parse_instruction(text, 1), {}, 0)(wave)
    assert wave.s[4] == expected


def test_registers_beyond_256() -> None:
    """gfx1250: comments name them, and the instruction that sets the bits above has to agree."""
    line = (
        "v_pk_fma_f32 v[154:155], v[2:3] /*v[258:259]*/, v[134:135], v1 /*v257*/ op_sel_hi:[0,1,1]"
    )
    assert whole_registers(line, 0b01_0001) == (
        "v_pk_fma_f32 v[154:155], v[258:259], v[134:135], v257 op_sel_hi:[0,1,1]"
    )
    assert whole_registers("v_mov_b32 v2, v254", 0) == "v_mov_b32 v2, v254"
    for wrong, high_bits in ((line, 0), ("v_mov_b32 v3 /*v258*/, 0", 64)):
        with pytest.raises(ValueError, match="s_set_vgpr_msb"):
            whole_registers(wrong, high_bits)


def test_a_launch_without_clusters() -> None:
    wave = a_wave()
    getreg = parse_instruction("s_getreg_b32 s4, hwreg(HW_REG_IB_STS2, 6, 4)", 1)
    decode_scalar(getreg, {}, 0)(wave)
    assert wave.s[4] == 0


@pytest.mark.parametrize(
    ("arch", "code", "round_trips"),
    [
        ("gfx942", ["load", "load", "s_waitcnt vmcnt(0)"], 1),
        ("gfx942", ["load", "s_waitcnt vmcnt(0)", "load", "s_waitcnt vmcnt(0)"], 2),
        ("gfx942", ["load", "load", "s_waitcnt vmcnt(1)", "s_waitcnt vmcnt(0)"], 2),
        ("gfx942", ["load", "s_waitcnt lgkmcnt(0)", "s_waitcnt vmcnt(1)"], 0),
        ("gfx942", ["store", "s_waitcnt vmcnt(0)", "s_waitcnt vmcnt(0)"], 0),
        ("gfx942", ["load", "store", "s_waitcnt vmcnt(1)"], 1),
        ("gfx1201", ["load", "store", "s_wait_loadcnt 0x1", "s_wait_loadcnt 0x0"], 1),
        ("gfx1201", ["load", "s_wait_loadcnt_dscnt 0x103", "s_wait_loadcnt_dscnt 0x3"], 1),
    ],
)
def test_round_trips(arch: str, code: list[str], round_trips: int) -> None:
    memory = GlobalMemory()
    address = memory.add("words", words(64))
    wave = a_wave()
    wave.s[2], wave.s[3] = address & 0xFFFFFFFF, address >> 32
    wave.v[1] = 4 * words(32)
    access = {"load": "global_load_dword v0, v1, s[2:3]",
              "store": "global_store_dword v1, v1, s[2:3]"}  # fmt: skip
    for text in code:
        instruction = parse_instruction(access.get(text, text), 1)
        if text in access:
            decode_memory(instruction, Memories(memory, arch))(wave)
        else:
            decode_scalar(instruction, {}, 0)(wave)
    assert wave.round_trips == round_trips


WIDE = {
    "v_add_u64": lambda a, b: a + b, "v_sub_u64": lambda a, b: a - b,
    "v_mul_u64": lambda a, b: a * b, "v_max_u64": max, "v_min_u64": min,
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
def test_wide_integers(name: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**64, (2, 200), np.uint64)
    got = OPERATIONS[name][1](a, b)
    expected = [WIDE[name](int(x), int(y)) % 2**64 for x, y in zip(a, b, strict=True)]
    assert [int(x) for x in got] == expected


def test_wide_multiply_and_add() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**32, (2, 200), np.uint32)
    c = rng.integers(0, 2**64, 200, np.uint64)
    unsigned = [(int(x) * int(y) + int(z)) % 2**64 for x, y, z in zip(a, b, c, strict=True)]
    assert [int(x) for x in OPERATIONS["v_mad_nc_u64_u32"][1](a, b, c)] == unsigned
    narrow = [total % 2**32 for total in unsigned]
    assert [int(x) for x in OPERATIONS["v_mad_u32"][1](a, b, c.astype(np.uint32))] == narrow
    i, j, k = a.view(np.int32), b.view(np.int32), c.view(np.int64)
    signed = [(int(x) * int(y) + int(z)) % 2**64 for x, y, z in zip(i, j, k, strict=True)]
    wide = OPERATIONS["v_mad_nc_i64_i32"][1](i, j, k).view(np.uint64)
    assert [int(x) for x in wide] == signed


def nearest(value: Fraction) -> np.float32:
    """The float32 next to a rational number, ties to even; for values without overflow."""
    if value == 0:
        return np.float32(0)
    exponent = max(abs(value).numerator.bit_length() - abs(value).denominator.bit_length(), -125)
    while abs(value) >= Fraction(2) ** exponent:
        exponent += 1
    while exponent > -125 and abs(value) < Fraction(2) ** (exponent - 1):
        exponent -= 1
    unit = Fraction(2) ** (exponent - 24)
    return np.float32(np.ldexp(float(round(value / unit)), exponent - 24))


def test_fma_has_one_rounding() -> None:
    rng = np.random.default_rng(0)
    a = (rng.normal(size=3000) * np.exp2(rng.integers(-70, 30, 3000))).astype(np.float32)
    b = (rng.normal(size=3000) * np.exp2(rng.integers(-70, 30, 3000))).astype(np.float32)
    c = (rng.normal(size=3000) * np.exp2(rng.integers(-149, 60, 3000))).astype(np.float32)
    c[:1500] = -(a * b)[:1500] * (1 + np.float32(2.0**-22) * rng.integers(-2, 3, 1500))
    # Double rounding goes wrong here: the float64 sum is a float32 tie, the exact sum is not.
    a[0], b[0], c[0] = 1 + 2.0**-23, 2.0**-24 * (1 - 2.0**-23), 1.0
    a[1], b[1], c[1] = 2.0**-12, 2.0**-12 * (1 + 2.0**-23), 1 + 2.0**-23
    got = exact.fma(a, b, c)
    for x, y, z, result in zip(a, b, c, got, strict=True):
        value = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert result == nearest(value), (x, y, z)


def test_maximum_of_floats() -> None:
    quiet, signalling, least = 0x7FC00001, 0xFF800001, 0xFF800000
    one, two, denormal, zero, negative_zero = 0x3F800000, 0x40000000, 1, 0, 0x80000000
    cases = [
        (one, two, two), (two, one, two), (least, quiet, least), (quiet, one, one),
        (quiet, quiet, quiet), (least, signalling, signalling | 1 << 22), (denormal, zero, denormal),
        (signalling, one, signalling | 1 << 22), (zero, negative_zero, zero),
        (negative_zero, zero, zero), (negative_zero, negative_zero, negative_zero),
        (least, denormal, denormal), (least, least, least),
    ]  # fmt: skip
    a, b, expected = np.array(cases, np.uint32).T.copy()
    got = exact.maximum(a.view(np.float32), b.view(np.float32)).view(np.uint32)
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("rounding", [-1, 0, 1])
def test_rcp_is_a_neighbour(rounding: int) -> None:
    x = np.random.default_rng(0).uniform(1, 1e6, 2000).astype(np.float32)
    x[:3] = [1.0, 4.0, 0.5]
    got = exact.rcp(x, rounding)
    for value, result in zip(x, got, strict=True):
        true, found = 1 / Fraction(float(value)), Fraction(float(result))
        unit = Fraction(float(np.spacing(result)))
        assert abs(found - true) < unit
        assert rounding == 0 or (found - true) * rounding >= 0
    assert exact.rcp(np.array([1e-39, -np.inf], np.float32), rounding)[0] == np.inf
