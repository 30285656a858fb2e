"""How long does a workgroup take on a compute unit? A replay of what its waves executed, in cycles.

No kernel has a rule of its own, so that any two compare by the same measure:

- issue     Wave i is on SIMD i % 4 and issues in order, an instruction every 4 cycles at most. VALU
            instructions of the waves of a SIMD exclude each other for 4 cycles (wave32: 1, as a SIMD
            takes its lanes at once), and for 4 times that if they are reciprocals, exponentials,
            logarithms, square roots, full products of 32 bits or products of 64; SALU instructions for
            4 (1). A taken branch takes 16 more, s_nop n n + 1 slots, s_sleep n 64 n cycles, s_delay_alu
            and s_clause none.
- LDS       One pipe per compute unit, one pass over the banks a cycle, and 64 cycles to the data.
- memory    One pipe for addresses, one 64-byte segment a cycle. A load of a segment that the workgroup
            has not loaded yet takes 500 cycles; one that it has 120, but no less than until it is
            there. A scalar load 500 and 60, likewise. A store 500.
- device    What other workgroups must see reaches the memory that all of them share: atomics, and
            loads, stores and write-backs of the device's scope. 700 where dies have an L2 each (gfx942,
            gfx950; gfx1250 is taken to be one of them, as its compiler writes L2 back), 500 elsewhere,
            as that is L2. Invalidating the caches of the device's scope makes every segment a new one.
- waits     For what they count, in the order of issue within a counter but for scalar loads.
- barrier   For the wave that comes last, and 16 cycles.
- end       Of the last wave and its last store.

Not modelled: the latency of a wave's own VALU and SALU results (but for the slots that the compiler
fills with s_nop), cold instruction caches, TLB misses, queues that are full, other workgroups.

Rejected: 120 cycles for a load whose segment is still on its way, where a wave would use data before
they have come.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from aiter.jit.device_kernels import ARCHS, instruction_class
from amdgcn.assembly import Instruction
from amdgcn.trace import LdsAccess, Segments, Trace

GHZ = 2.1
LAUNCH_GAP_US = 1.5
SIMDS = 4
SLOT = 4
BRANCH, BARRIER, SLEEP = 16, 16, 64
LDS_LATENCY = 64
NEW_LINE, KNOWN_LINE = 500, 120
NEW_SCALAR, KNOWN_SCALAR = 500, 60
STORE = 500
SHARED_L2, SEPARATE_L2 = 500, 700

_SLOW = re.compile(
    r"v_(s_)?(rcp|rsq|sqrt|exp|log|sin|cos)_|v_mul_(lo|hi)_[iu]32|v_mad_(co_)?[iu]64|v_mul_u64"
)
_DEVICE_SCOPE = re.compile(r"\bsc1\b|\bglc\b|scope:SCOPE_(DEV|SYS)")
_INVALIDATES = re.compile(
    r"buffer_inv .*\bsc1\b|buffer_wbinvl1|buffer_gl1_inv|global_inv scope:SCOPE_(DEV|SYS)"
)
_WRITES_BACK = re.compile(r"buffer_wbl2|global_wb scope:SCOPE_(DEV|SYS)")
_DIES_WITH_L2 = ("gfx94", "gfx95", "gfx1250")
_FOLDED = ("s_delay_alu", "s_clause")


@dataclass(frozen=True)
class Step:
    """How an instruction is issued, and what it starts.

    Attributes:
        kind: valu, salu, lds, scalar, load, store, atomic, wait, barrier, end, branch, invalidate,
            back (a write-back) or none (it takes its slots alone).
        slots: cycles that the wave cannot issue.
        busy: cycles that its unit takes no other wave's.
        counter: of `waits` that an access adds to.
        waits: the counters that it waits for, and how many accesses may be left.
        shared: cycles to the memory that all workgroups share and back; 0 if it need not go there.
        passes: over the banks that a move between lanes takes.
    """

    kind: str
    slots: int = SLOT
    busy: int = SLOT
    counter: str = ""
    waits: tuple[tuple[str, int], ...] = ()
    shared: int = 0
    passes: int = 0


def step_of(instruction: Instruction, arch: str) -> Step:
    """The rules for an instruction on `arch`."""
    text = instruction.text
    name, _, rest = text.partition(" ")
    kind = instruction_class(text)
    is_wide = ARCHS[arch].wave_size == 64
    if name in _FOLDED:
        return Step("none", 0)
    if name in ("s_nop", "v_nop"):
        return Step("none", SLOT * (1 + int(rest.strip() or "0", 0)))
    if name.startswith("s_wait"):
        return Step("wait", waits=waits_of(name, rest, arch))
    if name.startswith("s_barrier"):
        return Step("none" if name.startswith("s_barrier_signal") else "barrier")
    if name == "s_sleep":
        return Step("none", max(SLOT, SLEEP * int(rest, 0)))
    if name == "s_endpgm":
        return Step("end")
    if kind == "branch":
        return Step("branch")
    if kind in ("VALU", "DPP"):
        cycles = (SLOT if is_wide else 1) * (4 if _SLOW.match(name) else 1)
        return Step("valu", max(SLOT, cycles), cycles)
    if kind == "SALU":
        return Step("salu", busy=SLOT if is_wide else 1)
    if kind == "SMEM":
        return Step("scalar", counter=_counter(arch, "scalar"))
    if kind == "LDS":
        moved = "permute" in name or "swizzle" in name
        passes = ARCHS[arch].wave_size // 32 if moved else 0
        return Step("lds", counter=_counter(arch, "lds"), passes=passes)
    shared = SEPARATE_L2 if arch.startswith(_DIES_WITH_L2) else SHARED_L2
    if _INVALIDATES.match(text):
        return Step("invalidate", counter=_counter(arch, "load"))
    if _WRITES_BACK.match(text):
        return Step("back", counter=_counter(arch, "store"), shared=shared)
    if not _DEVICE_SCOPE.search(text) and not name.startswith("global_atomic"):
        shared = 0
    if name.startswith("global_atomic"):
        returns = len(instruction.operands) == 4 or re.search(r"\bsc0\b|\bglc\b|RETURN", text)
        return Step("atomic", counter=_counter(arch, "load" if returns else "store"), shared=shared)
    if name.startswith("global_store"):
        return Step("store", counter=_counter(arch, "store"), shared=shared)
    if name.startswith("global_load"):
        return Step("load", counter=_counter(arch, "load"), shared=shared)
    return Step("none")


def _counter(arch: str, kind: str) -> str:
    """The counter of loads, stores, LDS or scalar loads: gfx9 has two, gfx11 three, gfx12 four."""
    if arch.startswith("gfx12"):
        return kind
    if kind in ("lds", "scalar"):
        return "lgkm"
    return "load" if arch.startswith("gfx9") or kind == "load" else "store"


def waits_of(name: str, rest: str, arch: str) -> tuple[tuple[str, int], ...]:
    """What a wait waits for; nothing for one that orders no memory."""
    if name == "s_waitcnt":
        found = dict(re.findall(r"(\w+)cnt\((\d+)\)", rest))
        return tuple(
            ("load" if counter == "vm" else counter, int(most))
            for counter, most in found.items()
            if counter in ("vm", "lgkm")
        )
    if name == "s_waitcnt_vscnt":
        return (("store", int(rest.rpartition(",")[2], 0)),)
    counters = {"load": "load", "store": "store", "ds": "lds", "km": "scalar"}
    parts = re.findall(r"(load|store|ds|km)cnt", name)
    if not parts:
        return ()
    value = int(rest, 0)
    if len(parts) == 2:
        # NOTE: s_wait_loadcnt_dscnt and its like: the first counter from bit 8 on, the second below.
        return ((counters[parts[0]], value >> 8), (counters[parts[1]], value & 0x3F))
    return ((counters[parts[0]], value),)


@dataclass
class Timing:
    """What the replay of a workgroup found.

    Attributes:
        cycles: until the last wave and its last store ended.
        mix: executed instructions of all waves by class.
        trips: waits that ended accesses to memory, of the waves that arrive last at each barrier and
            at the end: by `global`, `scalar`, `lds`, and `store` where stores alone were waited for.
        first_load: when the first load from global memory was issued; None for no such load.
        barriers: when each barrier was passed, by its last wave.
    """

    cycles: int
    mix: Counter[str]
    trips: Counter[str]
    first_load: int | None
    barriers: tuple[int, ...]

    @property
    def us(self) -> float:
        """Microseconds."""
        return self.cycles / (1000 * GHZ)


@dataclass
class _Wave:
    index: int
    trace: Trace
    position: int = 0
    ready: int = 0
    epoch: int = 0
    # Per counter: when what is in flight is done, and its kind, oldest first.
    in_flight: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    trips: dict[int, Counter[str]] = field(default_factory=dict)
    last_store: int = 0


_TRIP = {"load": "global", "atomic": "global", "scalar": "scalar", "lds": "lds"}


class _Replay:
    """Units and caches of a compute unit, and the waves on it."""

    def __init__(self, steps: Sequence[Step], traces: Sequence[Trace]) -> None:
        self.steps = steps
        self.waves = [_Wave(index, trace) for index, trace in enumerate(traces)]
        self.free = {(kind, simd): 0 for kind in ("valu", "salu") for simd in range(SIMDS)}
        self.lds_free = 0
        self.memory_free = 0
        self.lines: dict[int, int] = {}
        self.scalar_lines: dict[int, int] = {}
        self.arrived: list[_Wave] = []
        self.last_at: list[
            tuple[int, int]
        ] = []  # the wave that came last to each barrier, and when
        self.running = len(self.waves)
        self.end = 0
        self.last_wave = 0
        self.first_load: int | None = None

    def run(self) -> None:
        """Replays all waves, in the order in which they can issue."""
        queue = [(0, wave.index) for wave in self.waves]
        heapq.heapify(queue)
        last_end = -1
        while queue:
            _, index = heapq.heappop(queue)
            wave = self.waves[index]
            state = self._issue(wave)
            if state == "end":
                self.running -= 1
                finish = max(wave.ready, wave.last_store)
                if finish > last_end:
                    last_end, self.end, self.last_wave = finish, finish, index
            elif state == "barrier":
                self.arrived.append(wave)
            else:
                heapq.heappush(queue, (wave.ready, index))
            if self.arrived and len(self.arrived) == self.running:
                self._release(queue)

    def _release(self, queue: list[tuple[int, int]]) -> None:
        last = max(self.arrived, key=lambda wave: wave.ready)
        self.last_at.append((last.index, last.ready))
        go = last.ready + BARRIER
        for wave in self.arrived:
            wave.ready = go
            wave.epoch += 1
            heapq.heappush(queue, (go, wave.index))
        self.arrived = []

    def _issue(self, wave: _Wave) -> str:
        """Issues the next instruction of a wave; returns its kind."""
        trace, position = wave.trace, wave.position
        index = trace[position]
        assert isinstance(index, int)
        step = self.steps[index]
        kind = step.kind
        now = wave.ready
        if kind in ("valu", "salu"):
            unit = kind, wave.index % SIMDS
            now = max(now, self.free[unit])
            self.free[unit] = now + step.busy
        elif kind == "wait":
            now = self._wait(wave, step, now)
        wave.ready = now + step.slots
        position += 1
        accesses = []
        while position < len(trace) and not isinstance(trace[position], int):
            accesses.append(trace[position])
            position += 1
        wave.position = position
        if kind == "branch":
            if position < len(trace) and trace[position] != index + 1:
                wave.ready += BRANCH
        elif step.counter:
            self._access(wave, step, now, accesses)
        return kind

    def _wait(self, wave: _Wave, step: Step, now: int) -> int:
        """Until the counters are low enough; each kind of access that ends is a round trip."""
        ended: list[tuple[int, str]] = []
        for counter, most in step.waits:
            flying = wave.in_flight.get(counter, [])
            count = max(0, len(flying) - most)
            ended += flying[:count]
            del flying[:count]
        if ended:
            kinds = {_TRIP.get(kind, "store") for _, kind in ended}
            if len(kinds) > 1:
                kinds.discard("store")
            wave.trips.setdefault(wave.epoch, Counter()).update(kinds)
        return max(now, *(done for done, _ in ended)) if ended else now

    def _access(self, wave: _Wave, step: Step, now: int, accesses: list[object]) -> None:
        kind = step.kind
        if kind == "lds":
            passes = step.passes + sum(a.passes for a in accesses if isinstance(a, LdsAccess))
            if not passes:
                return
            start = max(now, self.lds_free)
            self.lds_free = start + passes
            done = start + passes + LDS_LATENCY
        elif kind == "invalidate":
            self.lines.clear()
            done = now + KNOWN_LINE
        elif kind == "back":
            done = now + step.shared
        else:
            if not accesses:
                return
            segments = accesses[0]
            assert isinstance(segments, Segments)
            done = self._memory(step, now, segments.numbers)
        flying = wave.in_flight.setdefault(step.counter, [])
        if flying and step.counter != "lgkm":
            done = max(done, flying[-1][0])
        flying.append((done, kind))
        if kind in ("store", "atomic", "back"):
            wave.last_store = max(wave.last_store, done)

    def _memory(self, step: Step, now: int, segments: tuple[int, ...]) -> int:
        """When an access to global memory is done."""
        if step.kind == "scalar":
            return _arrival(self.scalar_lines, segments, now, NEW_SCALAR, KNOWN_SCALAR)
        start = max(now, self.memory_free) + len(segments)
        self.memory_free = start
        if step.kind != "store" and self.first_load is None:
            self.first_load = now
        if step.shared:
            return start + step.shared
        if step.kind == "store":
            return start + STORE
        return _arrival(self.lines, segments, start, NEW_LINE, KNOWN_LINE)


def _arrival(
    lines: dict[int, int], segments: tuple[int, ...], start: int, new: int, known: int
) -> int:
    """When loaded segments are there, and notes those that were new."""
    done = start + known
    for segment in segments:
        there = lines.get(segment)
        if there is None:
            there = lines[segment] = start + new
        done = max(done, there)
    return done


@dataclass(frozen=True)
class Program:
    """A kernel's instructions as the replay sees them: their rules and their classes."""

    steps: tuple[Step, ...]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, instructions: Sequence[Instruction], arch: str) -> Program:
        """That of a kernel compiled for `arch`."""
        return cls(
            tuple(step_of(instruction, arch) for instruction in instructions),
            tuple(instruction_class(instruction.text) for instruction in instructions),
        )


def replay(program: Program, traces: Sequence[Trace]) -> Timing:
    """The timing of a workgroup from the traces of its waves."""
    machine = _Replay(program.steps, traces)
    machine.run()
    mix = Counter(
        program.classes[item] for trace in traces for item in trace if isinstance(item, int)
    )
    trips: Counter[str] = Counter()
    last_waves = (*(wave for wave, _ in machine.last_at), machine.last_wave)
    for epoch, index in enumerate(last_waves):
        trips.update(machine.waves[index].trips.get(epoch, Counter()))
    barriers = tuple(cycle for _, cycle in machine.last_at)
    return Timing(machine.end, mix, trips, machine.first_load, barriers)
