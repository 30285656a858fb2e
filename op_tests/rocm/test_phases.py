"""What do the phases of the fused launch execute, and do its lanes get in each other's way in LDS?

The counts themselves are in docs/rocm.md (`write_tables.py`); here are the statements that must stay
true whatever the kernels become.
"""

from __future__ import annotations

from collections import Counter

import _checkout  # noqa: F401
import numpy as np
import pytest
from amdgcn.banks import BankTally, passes
from phases import PHASES, PROBLEMS, collisions, launch, phase_of, phases

MOST_PASSES = 8  # of one group of lanes: random experts over 32 banks give 3 or 4
MOST_COLLISIONS = 1.5  # passes over what they would be without conflicts

GPT_OSS = "gpt-oss-120b, M=64"


@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "gfx1201"])
def test_phases_are_told_apart(arch: str) -> None:
    pytest.importorskip("ziglang", reason="the cross-compiler: pip install ziglang")
    statistics = launch(arch, GPT_OSS)
    found = phases(statistics)
    assert list(found) == list(PHASES)
    assert sum((phase.mix for phase in found.values()), Counter()) == statistics.mix()
    assert sum(phase.idle for phase in found.values()) == statistics.idle_slots()
    clear, topk, assign, write, zero = (phase.mix for phase in found.values())
    assert clear["DPP"] == 0 < clear["LDS"], "the bitmask is in LDS"
    assert topk["DPP"] > 0 < topk["LDS"], "selection is reductions over the wave"
    assert assign["LDS"] > 0, "counts are in LDS"
    assert write["DPP"] == 0 < write["VMEM"], "entries go to memory"
    assert zero["VMEM"] > 0 == zero["LDS"] == zero["DPP"] == zero["barrier"]


def test_phase_of() -> None:
    assert [phase_of((0, barriers), 5) for barriers in range(6)] == [
        "load, clear", "top-k", "assign", "assign", "assign", "write",
    ]  # fmt: skip
    assert phase_of((7, 0), 5) == "zero moe_buf"


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
def test_bank_conflicts(arch: str, problem: str) -> None:
    pytest.importorskip("ziglang", reason="the cross-compiler: pip install ziglang")
    total, worst = collisions(launch(arch, problem))
    assert total.accesses > 40
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
