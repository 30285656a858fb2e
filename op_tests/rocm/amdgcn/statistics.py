"""What did a launch execute? Counts per instruction, kept apart by workgroup and barrier.

The stretch of code between two barriers is what a kernel's phases consist of, so (workgroup, number
of barriers passed) is enough to tell them apart, and needs nothing from the compiler: line tables
were rejected, since an optimised instruction belongs to several lines and asking for them must not
change the code.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from aiter.jit.device_kernels import instruction_class
from amdgcn.assembly import Instruction
from amdgcn.banks import BankTally
from amdgcn.trace import Trace

Where = tuple[int, int]


@dataclass
class Statistics:
    """Counts of one launch.

    Attributes:
        instructions: the kernel's.
        waves: that ran.
        counts: executions of every instruction by all waves, by (workgroup, barriers passed).
        round_trips: how often each wave, by its index, had to wait for loads, likewise.
        banks: LDS passes by the line of the instruction, if the launch asked for them.
        traces: of the waves by workgroup, if the launch asked for them.
    """

    instructions: list[Instruction]
    waves: int
    counts: dict[Where, list[int]] = field(default_factory=dict)
    round_trips: dict[Where, dict[int, int]] = field(default_factory=dict)
    banks: dict[int, BankTally] = field(default_factory=dict)
    traces: dict[int, list[Trace]] = field(default_factory=dict)

    def executed(self, chosen: Callable[[Where], bool] = lambda where: True) -> list[int]:
        """Executions of every instruction in the chosen workgroups and stretches."""
        totals = [0] * len(self.instructions)
        for where, counts in self.counts.items():
            if chosen(where):
                totals = [total + count for total, count in zip(totals, counts, strict=True)]
        return totals

    def mix(self, chosen: Callable[[Where], bool] = lambda where: True) -> Counter[str]:
        """Executed instructions by class (`device_kernels.MIX_CLASSES`)."""
        found: Counter[str] = Counter()
        for instruction, count in zip(self.instructions, self.executed(chosen), strict=True):
            found[instruction_class(instruction.text)] += count
        return found

    def names(self) -> Counter[str]:
        """Executed instructions by name, as the compiler writes it less `_e32` and `_e64`."""
        found: Counter[str] = Counter()
        for instruction, count in zip(self.instructions, self.executed(), strict=True):
            name = instruction.text.split(maxsplit=1)[0]
            found[re.sub(r"_e(32|64)(?=_dpp|$)", "", name)] += count
        return found

    def idle_slots(self, chosen: Callable[[Where], bool] = lambda where: True) -> int:
        """Issue slots that s_nop and v_nop leave empty: `s_nop 1` is two."""
        slots = 0
        for instruction, count in zip(self.instructions, self.executed(chosen), strict=True):
            name, _, rest = instruction.text.partition(" ")
            if name in ("s_nop", "v_nop"):
                slots += count * (1 + (int(rest, 0) if rest.strip() else 0))
        return slots

    def most_round_trips(self, chosen: Callable[[Where], bool] = lambda where: True) -> int:
        """How often the wave that waits most had to wait for loads from memory."""
        totals: Counter[tuple[int, int]] = Counter()
        for where, waves in self.round_trips.items():
            if chosen(where):
                totals.update({(where[0], wave): count for wave, count in waves.items()})
        return max(totals.values(), default=0)
