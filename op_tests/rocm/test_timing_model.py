"""Are the timing model's rules what its header says, in sequences short enough to add up by hand?

Every expected number is spelled out as a sum of the rules' constants. A wave's sequence is a list of
instructions, each with the accesses that the interpreter would note for it.
"""

from __future__ import annotations

import _checkout  # noqa: F401
import numpy as np
import pytest
from amdgcn.assembly import parse_instruction
from amdgcn.timing import (
    BARRIER,
    BRANCH,
    KNOWN_LINE,
    KNOWN_SCALAR,
    LDS_LATENCY,
    NEW_LINE,
    NEW_SCALAR,
    SEPARATE_L2,
    SHARED_L2,
    SLEEP,
    SLOT,
    STORE,
    Program,
    Timing,
    replay,
)
from amdgcn.trace import LdsAccess, Segments, Trace, segments_of

END = "s_endpgm"
MOVE, RECIPROCAL, SCALAR = "v_mov_b32_e32 v0, v1", "v_rcp_f32_e32 v0, v1", "s_add_u32 s0, s0, s1"
LOAD, STORED = "global_load_dword v0, v1, s[0:1]", "global_store_dword v0, v1, s[0:1]"
READ, SCALAR_LOAD = "ds_read_b32 v0, v1", "s_load_dwordx4 s[0:3], s[4:5], 0x0"
LOADS, LDS = "s_waitcnt vmcnt(0)", "s_waitcnt lgkmcnt(0)"

Line = str | tuple[str | LdsAccess | Segments, ...]


def on(*numbers: int) -> Segments:
    return Segments(numbers)


def timing(arch: str, *waves: list[Line]) -> Timing:
    """The replay of a workgroup; every wave's code is followed by an end."""
    texts: list[str] = []
    traces: list[Trace] = []
    for wave in waves:
        trace: Trace = []
        for line in (*wave, END):
            trace.append(len(texts))
            for part in (line,) if isinstance(line, str) else line:
                if isinstance(part, str):
                    texts.append(part)
                else:
                    trace.append(part)
        traces.append(trace)
    instructions = [parse_instruction(text, number) for number, text in enumerate(texts)]
    return replay(Program.of(instructions, arch), traces)


def cycles(*waves: list[Line], arch: str = "gfx942") -> int:
    return timing(arch, *waves).cycles


def test_a_wave_issues_every_four_cycles() -> None:
    assert cycles([MOVE, SCALAR, MOVE]) == 3 * SLOT + SLOT
    assert cycles([MOVE, RECIPROCAL]) == SLOT + 4 * SLOT + SLOT
    assert cycles(["v_mul_lo_u32 v0, v1, v2"]) == 4 * SLOT + SLOT
    assert cycles(["v_mul_u32_u24_e32 v0, v1, v2"]) == SLOT + SLOT
    assert cycles(["s_nop 3"]) == 4 * SLOT + SLOT
    assert cycles(["s_sleep 2"]) == 2 * SLEEP + SLOT


def test_vector_instructions_of_a_simd_exclude_each_other() -> None:
    """Waves 0 and 4 share a SIMD."""
    four = [[MOVE]] * 4
    assert cycles(*four) == SLOT + SLOT
    assert cycles(*four, [MOVE]) == 2 * SLOT + SLOT
    assert cycles(*four, [SCALAR]) == SLOT + SLOT
    assert cycles([SCALAR], *four[1:], [SCALAR]) == 2 * SLOT + SLOT
    assert cycles([RECIPROCAL], *four[1:], [RECIPROCAL]) == 2 * 4 * SLOT + SLOT


def test_a_wave32_takes_its_simd_for_a_cycle() -> None:
    four = [[MOVE]] * 4
    assert cycles(*four, [MOVE], arch="gfx1201") == 1 + SLOT + SLOT
    assert cycles([RECIPROCAL], *four[1:], [RECIPROCAL], arch="gfx1201") == 4 + SLOT + SLOT
    assert cycles(["s_delay_alu instid0(VALU_DEP_1)", MOVE], arch="gfx1201") == SLOT + SLOT


def test_a_branch_that_is_taken_costs_more() -> None:
    texts = [parse_instruction(text, 0) for text in ("s_branch .L", MOVE, END)]
    program = Program.of(texts, "gfx942")
    assert replay(program, [[0, 1, 2]]).cycles == 3 * SLOT
    assert replay(program, [[0, 2]]).cycles == SLOT + BRANCH + SLOT


def test_lds_is_one_pipe() -> None:
    read: Line = (READ, LdsAccess(3))
    one = cycles([read, LDS])
    assert one == 3 + LDS_LATENCY + SLOT + SLOT
    assert cycles([read, LDS], [read, LDS]) == one + 3
    assert cycles([(READ, LdsAccess(1), LdsAccess(2)), LDS]) == one
    assert cycles([READ, LDS]) == SLOT + SLOT + SLOT, "an access of no lane"
    assert cycles(["ds_bpermute_b32 v0, v1, v2", LDS]) == one - 1, "two passes of 32 lanes"


def test_memory_addresses_are_one_pipe() -> None:
    two: list[Line] = [(LOAD, on(1, 2)), LOADS]
    assert cycles(two) == 2 + NEW_LINE + SLOT + SLOT
    others: list[Line] = [(LOAD, on(3, 4)), LOADS]
    assert cycles(two, others) == 2 + 2 + NEW_LINE + SLOT + SLOT


def test_a_segment_that_was_loaded_is_near() -> None:
    load: list[Line] = [(LOAD, on(1)), LOADS]
    first = 1 + NEW_LINE + SLOT
    assert cycles(load * 2) == first + 1 + KNOWN_LINE + SLOT + SLOT
    assert cycles([*load, (LOAD, on(2)), LOADS]) == first + 1 + NEW_LINE + SLOT + SLOT


def test_a_segment_on_its_way_is_waited_for() -> None:
    load: list[Line] = [(LOAD, on(1)), LOADS]
    assert cycles(load, load) == cycles(load)
    late: list[Line] = [*[MOVE] * 120, *load]
    assert cycles(load, late) == 480 + 1 + KNOWN_LINE + SLOT + SLOT


def test_scalar_loads() -> None:
    load: list[Line] = [(SCALAR_LOAD, on(1)), LDS]
    assert cycles(load) == NEW_SCALAR + SLOT + SLOT
    assert cycles(load * 2) == NEW_SCALAR + SLOT + KNOWN_SCALAR + SLOT + SLOT
    assert cycles([*load, (LOAD, on(1)), LOADS]) == NEW_SCALAR + SLOT + 1 + NEW_LINE + SLOT + SLOT


def test_a_wait_lets_younger_accesses_fly() -> None:
    both: list[Line] = [(LOAD, on(1)), (LOAD, on(2))]
    assert cycles([*both, "s_waitcnt vmcnt(1)"]) == 1 + NEW_LINE + SLOT + SLOT
    assert cycles([*both, LOADS]) == SLOT + 1 + NEW_LINE + SLOT + SLOT
    assert cycles([*both, LDS]) == 3 * SLOT + SLOT


def test_a_launch_ends_with_its_last_store() -> None:
    assert cycles([(STORED, on(1))]) == 1 + STORE
    assert cycles([(LOAD, on(1))]) == 2 * SLOT, "nobody waits for what nobody reads"


def test_which_counter_stores_are_in() -> None:
    """gfx9 counts them with the loads."""
    code: list[Line] = [(STORED, on(1)), LOADS, *[MOVE] * 200]
    assert cycles(code) == 1 + STORE + SLOT + 200 * SLOT + SLOT
    assert cycles(code, arch="gfx1100") == 2 * SLOT + 200 * SLOT + SLOT
    code[1] = "s_waitcnt_vscnt null, 0x0"
    assert cycles(code, arch="gfx1100") == 1 + STORE + SLOT + 200 * SLOT + SLOT


def test_the_counters_of_gfx12() -> None:
    load: Line = ("global_load_b32 v0, v1, s[0:1]", on(1))
    read: Line = ("ds_load_b32 v0, v1", LdsAccess(1))
    both = 1 + NEW_LINE + SLOT + SLOT
    assert cycles([load, read, "s_wait_dscnt 0x0"], arch="gfx1201") == (
        SLOT + 1 + LDS_LATENCY + SLOT + SLOT
    )
    assert cycles([load, read, "s_wait_loadcnt_dscnt 0x0"], arch="gfx1201") == both
    assert cycles([load, read, "s_wait_loadcnt_dscnt 0x100"], arch="gfx1201") == (
        SLOT + 1 + LDS_LATENCY + SLOT + SLOT
    )
    assert cycles([load, read, "s_wait_loadcnt 0x0"], arch="gfx1201") == both


@pytest.mark.parametrize(
    ("arch", "atomic", "far"),
    [
        ("gfx942", "global_atomic_add_u32 v0, v1, v2, s[0:1] sc0 sc1", SEPARATE_L2),
        ("gfx90a", "global_atomic_add v0, v1, v2, s[0:1] glc", SHARED_L2),
    ],
)
def test_what_other_workgroups_see(arch: str, atomic: str, far: int) -> None:
    assert cycles([(atomic, on(1)), LOADS], arch=arch) == 1 + far + SLOT + SLOT


def test_loads_and_stores_of_the_devices_scope() -> None:
    near: list[Line] = [(LOAD, on(1)), LOADS]
    done = 1 + NEW_LINE + SLOT
    assert cycles([*near, (f"{LOAD} sc1", on(1)), LOADS]) == done + 1 + SEPARATE_L2 + SLOT + SLOT
    assert cycles([(f"{STORED} sc1", on(1))]) == 1 + SEPARATE_L2
    assert cycles(["buffer_wbl2 sc1", LOADS]) == SEPARATE_L2 + SLOT + SLOT
    forgotten = [*near, "buffer_inv sc1", *near]
    assert cycles(forgotten) == done + SLOT + 1 + NEW_LINE + SLOT + SLOT
    kept = [*near, "buffer_inv sc0", *near]
    assert cycles(kept) == done + SLOT + 1 + KNOWN_LINE + SLOT + SLOT


def test_a_barrier_waits_for_the_last_wave() -> None:
    last = 10 * SLOT + SLOT
    assert cycles(["s_barrier", MOVE], [*[MOVE] * 10, "s_barrier"]) == last + BARRIER + 2 * SLOT
    split = "s_barrier_signal -1", "s_barrier_wait 0xffff"
    assert cycles([*split, MOVE], [MOVE] * 4 + [*split], arch="gfx1201") == (
        6 * SLOT + BARRIER + 2 * SLOT
    )
    assert cycles(["s_barrier", MOVE], []) == SLOT + BARRIER + 2 * SLOT, "a wave that has ended"


def test_round_trips_follow_who_is_waited_for() -> None:
    """Wave 0 is the last at the barrier, wave 1 the last to end; wave 1's read of LDS hides."""
    first: list[Line] = [(SCALAR_LOAD, on(1)), LDS, (LOAD, on(2)), LOADS, "s_barrier"]
    second: list[Line] = [(READ, LdsAccess(1)), LDS, "s_barrier", (STORED, on(3)), LOADS]
    found = timing("gfx942", first, second)
    assert dict(found.trips) == {"scalar": 1, "global": 1, "store": 1}
    assert found.first_load == NEW_SCALAR + SLOT
    assert found.mix["VMEM"] == 2 and found.mix["LDS"] == 1 and found.mix["barrier"] == 2


def test_microseconds() -> None:
    assert timing("gfx942", [MOVE] * 2099).us == pytest.approx(4.0)


def test_segments_of_an_access() -> None:
    def segments(addresses: list[int], size: int) -> tuple[int, ...]:
        return segments_of(np.array(addresses, np.int64), size).numbers

    assert segments([64], 4) == (1,)
    assert segments([60], 8) == (0, 1)
    assert segments([0], 192) == (0, 1, 2)
    assert segments([128, 0, 132], 4) == (0, 2)
