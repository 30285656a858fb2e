"""What do the phases of the fused launch execute, and do its lanes get in each other's way in LDS?

The counts themselves are in docs/rocm.md (`write_tables.py`); here are the statements that must stay
true whatever the kernels become.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import _checkout  # noqa: F401
import numpy as np
import pytest
from amdgcn.banks import BankTally, passes
from archs import parameters
from phases import (
    PROBLEMS,
    ROUTING,
    ROUTING_ONE_TOKEN,
    ROUTING_SINGLE_BLOCKS,
    ZEROING,
    collisions,
    launch,
    phase_of,
    phases,
    routing_phases,
)

MOST_PASSES = 8  # of one group of lanes: random experts over 32 banks give 3 or 4
# Passes over what they would be without conflicts. Where a thread has two experts, lanes are two
# words apart and each access takes two passes: 1.56 for 256 experts in waves of 32 lanes.
MOST_COLLISIONS = 1.6


def of_classes(arch: str, problem: str) -> list[Counter[str]]:
    """The instruction classes of every phase, of a launch whose phases are all there is."""
    pytest.importorskip("ziglang", reason="the cross-compiler: pip install ziglang")
    found, statistics = phases(arch, problem), launch(arch, problem)
    assert list(found) == [*routing_phases(PROBLEMS[problem]), ZEROING]
    assert sum((phase.mix for phase in found.values()), Counter()) == statistics.mix()
    assert sum(phase.idle for phase in found.values()) == statistics.idle_slots()
    return [phase.mix for phase in found.values()]


def check_first_and_last(clear: Counter[str], topk: Counter[str], zero: Counter[str]) -> None:
    """What the phases do that all launches have."""
    assert clear["DPP"] == 0 < clear["LDS"], "the bitmask is in LDS"
    assert topk["DPP"] > 0 < topk["LDS"], "lanes compare their winners"
    assert zero["VMEM"] > 0 == zero["LDS"] == zero["DPP"] == zero["barrier"]


@pytest.mark.parametrize("arch", parameters(["gfx942", "gfx950", "gfx1201"]))
def test_phases_are_told_apart(arch: str) -> None:
    clear, topk, assign, write, zero = of_classes(arch, "gpt-oss-120b, M=64")
    check_first_and_last(clear, topk, zero)
    assert assign["LDS"] > 0 < assign["DPP"], "counts are in LDS, sums are over the wave"
    assert write["DPP"] == 0 < write["VMEM"], "entries go to memory"


@pytest.mark.parametrize("arch", parameters(["gfx942", "gfx950", "gfx1201"]))
def test_phases_of_single_blocks_are_told_apart(arch: str) -> None:
    clear, topk, padding, entries, zero = of_classes(arch, "gpt-oss-120b, M=8")
    check_first_and_last(clear, topk, zero)
    assert padding["LDS"] > 0 < padding["VMEM"], "the size of a set says where blocks end in memory"
    assert entries["VMEM"] > 0 == entries["barrier"], "entries and expert ids go to memory"
    assert padding["DPP"] == entries["DPP"] == 0, "bits are counted"


@pytest.mark.parametrize("arch", parameters(["gfx942", "gfx950", "gfx1201"]))
def test_one_token_takes_no_barrier(arch: str) -> None:
    one_token, zero = of_classes(arch, "gpt-oss-120b, M=1")
    assert one_token["barrier"] == 0 == zero["barrier"]
    assert one_token["DPP"] > 0 < one_token["VMEM"], "lanes compare their winners and store them"


def test_phase_of() -> None:
    assert [phase_of((0, barriers), ROUTING, 5) for barriers in range(6)] == [
        "load, clear", "top-k", "assign", "assign", "assign", "write",
    ]  # fmt: skip
    assert [phase_of((0, barriers), ROUTING_SINGLE_BLOCKS, 3) for barriers in range(4)] == [
        *ROUTING_SINGLE_BLOCKS
    ]
    assert phase_of((0, 0), ROUTING_ONE_TOKEN, 0) == "one token"
    assert phase_of((7, 0), ROUTING, 5) == "zero moe_buf"


def test_phases_follow_the_batch() -> None:
    case = PROBLEMS["gpt-oss-120b, M=64"]
    assert routing_phases(case) == ROUTING
    assert routing_phases(replace(case, num_local=32)) == ROUTING_SINGLE_BLOCKS
    assert routing_phases(replace(case, num_local=32, num_experts=1025)) == ROUTING
    one = replace(case, num_tokens=1)
    assert routing_phases(one) == routing_phases(replace(one, topk=32)) == ROUTING_ONE_TOKEN
    for other in (replace(one, topk=33), replace(one, mask="ones"), replace(case, num_local=1)):
        assert routing_phases(other) == ROUTING_SINGLE_BLOCKS


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
def test_bank_conflicts(arch: str, problem: str) -> None:
    pytest.importorskip("ziglang", reason="the cross-compiler: pip install ziglang")
    total, worst = collisions(launch(arch, problem))
    assert total.accesses > (2 if PROBLEMS[problem].num_tokens == 1 else 10)
    assert total.worst <= MOST_PASSES, f"{worst}: {total}"
    assert total.passes <= MOST_COLLISIONS * total.least, f"{total}"


LANES = np.arange(64)


@pytest.mark.parametrize(
    ("lanes", "stride", "size", "is_atomic", "expected"),
    [
        (LANES, 4, 4, False, [1, 1]),
        (LANES[:32], 4, 4, False, [1]),
        (LANES, 2, 2, False, [1, 1]),
        (LANES, 8, 4, False, [2, 2]),
        (LANES, 128, 4, False, [32, 32]),
        (LANES, 0, 4, False, [1, 1]),
        (LANES, 0, 4, True, [32, 32]),
        (LANES[5:9], 0, 4, True, [4]),
        (LANES[30:34], 132, 4, False, [1, 1]),
        (LANES, 8, 8, False, [1, 1, 1, 1]),
        (LANES, 16, 8, False, [2, 2, 2, 2]),
        (LANES, 16, 16, False, [1] * 8),
        (LANES[:8], 512, 16, False, [8]),
        (LANES, 12, 12, False, [1] * 8),
    ],
)
def test_passes(
    lanes: np.ndarray, stride: int, size: int, is_atomic: bool, expected: list[int]
) -> None:
    assert passes(lanes * stride, lanes, size, is_atomic) == expected


def test_tally() -> None:
    tally = BankTally()
    tally.note([1, 3])
    tally.note([2])
    assert tally == BankTally(accesses=2, passes=6, least=3, worst=3)
