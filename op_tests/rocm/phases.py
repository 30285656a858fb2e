"""What does each phase of the fused launch execute, and how often do its LDS banks collide?

Phases are told apart by workgroup and by the barriers passed (`amdgcn.statistics`): the workgroup
that routes clears the bitmask and the set of experts before its first barrier, and selects before the
second. Where no expert can have two blocks, it then fills the blocks with padding and puts the entries
over it, with a barrier between the two; elsewhere it writes entries and padding after the last barrier,
and counts and assigns in between. A single token takes no barrier at all. The other workgroups zero
moe_buf.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache, partial

import torch
from amdgcn.banks import BankTally
from amdgcn.statistics import Statistics, Where
from cases import Case
from choices import constant, is_one_token
from launches import Device
from runners import run_fused
from targets import Target

ROUTING = ("load, clear", "top-k", "assign", "write")
ROUTING_SINGLE_BLOCKS = ("load, clear", "top-k", "padding", "entries")
ROUTING_ONE_TOKEN = ("one token",)
ZEROING = "zero moe_buf"
ROUTING_WORKGROUP = 0
MAX_SET_EXPERTS = 32 * constant("single_blocks.h", "kMaxSetWords")

# Decode batches of models, under the names that the tables show.
PROBLEMS = {
    "gpt-oss-120b, M=64": Case(64, 128, 4, torch.bfloat16, model_dim=2880),
    "gpt-oss-120b, M=8": Case(8, 128, 4, torch.bfloat16, model_dim=2880),
    "gpt-oss-120b, M=1": Case(1, 128, 4, torch.bfloat16, model_dim=2880),
    "DeepSeek-V3, M=64": Case(64, 256, 8, torch.bfloat16, model_dim=2048),
    "Qwen3-Next, M=32": Case(32, 512, 10, torch.bfloat16, model_dim=2048),
    "Kimi-K3, M=16, f32": Case(16, 896, 16, torch.float32, model_dim=3584),
    "Mixtral, M=64, f16": Case(64, 8, 2, torch.float16, model_dim=4096),
}


@cache
def launch(arch: str, problem: str) -> Statistics:
    """The statistics of the fused launch of a problem by one workgroup, its result checked."""
    device = Device(arch, counts_banks=True)
    case = PROBLEMS[problem]
    alone = partial(device.fused_topk_moe_sorting_fwd, handover_size=1)
    run_fused(case, Target("cpu", device.wave_size), alone)
    (statistics,) = device.statistics.values()
    return statistics


def routing_phases(case: Case) -> tuple[str, ...]:
    """The phases of the workgroup that routes: of one_token.h, single_blocks.h or expert_sort.h."""
    if is_one_token(case.num_tokens, case.topk, case.mask != "none"):
        return ROUTING_ONE_TOKEN
    is_single = case.local_tokens <= case.block_size and case.num_experts <= MAX_SET_EXPERTS
    return ROUTING_SINGLE_BLOCKS if is_single else ROUTING


def phase_of(where: Where, names: tuple[str, ...], last: int) -> str:
    """The phase of a stretch of code; `last` is the number of barriers that routing has."""
    workgroup, barriers = where
    if workgroup != ROUTING_WORKGROUP:
        return ZEROING
    return names[-1] if barriers == last else names[min(barriers, len(names) - 2)]


@dataclass(frozen=True)
class Phase:
    """What one phase executes.

    Attributes:
        mix: instructions of all waves by class.
        idle: issue slots of s_nop and v_nop.
        static: instructions of the kernel that are executed at least once.
        round_trips: how often the wave that waits most waits for loads from memory.
    """

    mix: Counter[str]
    idle: int
    static: int
    round_trips: int


def phases(arch: str, problem: str) -> dict[str, Phase]:
    """The phases of a problem's fused launch by name, in their order."""
    statistics, names = launch(arch, problem), routing_phases(PROBLEMS[problem])
    last = max(where[1] for where in statistics.counts if where[0] == ROUTING_WORKGROUP)
    if last < len(names) - 1:
        raise ValueError(f"barriers of the routing workgroup: expected one or more between each of"
                         f" {names}, got {last}")  # fmt: skip
    found = {}
    for name in (*names, ZEROING):

        def chosen(where: Where, name: str = name) -> bool:
            return phase_of(where, names, last) == name

        static = sum(count > 0 for count in statistics.executed(chosen))
        found[name] = Phase(
            statistics.mix(chosen),
            statistics.idle_slots(chosen),
            static,
            statistics.most_round_trips(chosen),
        )
    return found


def collisions(statistics: Statistics) -> tuple[BankTally, str]:
    """LDS passes of all instructions together, and the text of the one with the worst access."""
    total = BankTally()
    for tally in statistics.banks.values():
        total.accesses += tally.accesses
        total.passes += tally.passes
        total.least += tally.least
        total.worst = max(total.worst, tally.worst)
    line = max(statistics.banks, key=lambda line: statistics.banks[line].worst)
    return total, next(i.text for i in statistics.instructions if i.line == line)
