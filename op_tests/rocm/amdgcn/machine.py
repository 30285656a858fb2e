"""Runs a kernel's machine code: all workgroups and waves of a launch, on emulated memory.

Each instruction is decoded once, to a Python function of a wave; a wave is then a loop over these.
Waves of a workgroup run one after the other up to the next barrier, or an instruction by which
workgroups hand over, in a random order that a seed fixes. So do workgroups, or they take turns at
random. Registers, SGPRs and LDS start as noise; the kernel gets what its
`.amdhsa_` directives say: the address of its arguments, preloaded arguments, workgroup ids and
work-item ids. Compiled code is taken as it is: waits, hazards and scheduling hints have no effect on
what it computes, they are the compiler's business. Waits are counted where a load was in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aiter.jit.device_kernels import ARCHS
from amdgcn.assembly import Instruction, KernelText
from amdgcn.memory import GlobalMemory, Lds
from amdgcn.memory_ops import Memories, decode_memory, decode_step
from amdgcn.scalar import BARRIER, END, PAUSE, Operation, decode_scalar
from amdgcn.statistics import Statistics
from amdgcn.trace import Trace
from amdgcn.vector import decode_vector
from amdgcn.wave import TTMP, Fault, Wave

MAX_STEPS = 3_000_000
_MEMORY = ("s_load_", "ds_", "global_read_", "global_write_", "global_atomic_")
# User SGPRs around the address of the arguments, in the hardware's order; these stay noise.
_USER_SGPRS_BEFORE = (("private_segment_buffer", 4), ("dispatch_ptr", 2), ("queue_ptr", 2))
_USER_SGPRS_AFTER = (("dispatch_id", 2), ("flat_scratch_init", 2), ("private_segment_size", 1))


@dataclass(frozen=True)
class Launch:
    """What a launch is made of.

    Attributes:
        grid: workgroups.
        threads: of a workgroup.
        lds_bytes: dynamic LDS.
        arguments: the bytes of the kernel's own arguments.
        seed: of the noise and of the order in which waves and workgroups run.
        preloads: whether the firmware fills registers with arguments, where a kernel asks for it. Older
            firmware does not know of that, and enters such a kernel at its first instruction, where it
            loads them itself.
        rcp_rounding: which neighbour of 1 / x v_rcp_f32 returns: -1 below, 1 above, 0 the nearer.
        counts_banks: whether to count the passes of LDS accesses over the banks.
        takes_turns: whether workgroups run by turns; else one after the other.
        traced: whether to keep every wave's `amdgcn.trace`.
        workgroups: which of the grid's run; None for all.
    """

    grid: int
    threads: int
    lds_bytes: int
    arguments: bytes
    seed: int = 0
    rcp_rounding: int = 0
    preloads: bool = True
    counts_banks: bool = False
    takes_turns: bool = False
    traced: bool = False
    workgroups: tuple[int, ...] | None = None


def run(kernel: KernelText, memory: GlobalMemory, launch: Launch) -> Statistics:
    """Executes a launch to its end.

    Raises:
        Fault: the code does what it must not, or the interpreter does not know an instruction; the
            message names the kernel, the instruction, the wave and the workgroup.
    """
    arch = kernel.code.arch
    if arch not in ARCHS:
        raise Fault(f"arch: expected one of {', '.join(ARCHS)}, got {arch}")
    if launch.threads > kernel.code.max_threads or launch.threads % kernel.code.wave_size:
        raise Fault(
            f"{kernel.code.name}: expected at most {kernel.code.max_threads} threads in whole waves"
            f" of {kernel.code.wave_size}, got {launch.threads}"
        )
    lds_bytes = kernel.code.lds_bytes + launch.lds_bytes
    if lds_bytes > ARCHS[arch].lds_bytes:
        raise Fault(
            f"{kernel.code.name}: expected at most {ARCHS[arch].lds_bytes} bytes of LDS on {arch},"
            f" got {lds_bytes}"
        )
    rng = np.random.default_rng(launch.seed)
    segment = kernel_arguments(kernel, launch)
    address = memory.add("kernel arguments", segment, writable=False)
    memories, operations = _decode(kernel, launch.rcp_rounding)
    memories.memory = memory
    memory.begin_launch(arch)
    num_waves = launch.threads // kernel.code.wave_size
    statistics = Statistics(kernel.instructions, num_waves * launch.grid)
    memories.banks = statistics.banks if launch.counts_banks else None
    with np.errstate(all="ignore"):
        running: list[tuple[int, Lds, Iterator[None]]] = []
        for workgroup in map(int, rng.permutation(launch.grid)):
            if launch.workgroups is not None and workgroup not in launch.workgroups:
                continue
            lds = Lds(lds_bytes, rng)
            waves = [
                _start_wave(kernel, launch, index, workgroup, address, segment, rng)
                for index in range(num_waves)
            ]
            if launch.traced:
                statistics.traces[workgroup] = [wave.trace for wave in waves]
            turns = _run_workgroup(kernel, operations, waves, workgroup, rng, statistics, memories)
            running.append((workgroup, lds, turns))
            while running and not launch.takes_turns:
                _take_turn(memories, running, 0)
        while running:
            _take_turn(memories, running, int(rng.integers(len(running))))
    memories.trace = None
    memory.buffers.pop()
    return statistics


def _take_turn(
    memories: Memories, running: list[tuple[int, Lds, Iterator[None]]], position: int
) -> None:
    """Lets one of the workgroups go on until one of its waves stops; takes it out if it has ended."""
    memories.workgroup, memories.lds, turns = running[position]
    if next(turns, turns) is turns:
        del running[position]


def kernel_arguments(kernel: KernelText, launch: Launch) -> NDArray[np.uint8]:
    """The argument segment: the kernel's own arguments, and the hidden ones that it asks for."""
    segment = np.zeros(kernel.code.kernarg_bytes, np.uint8)
    ends = (at + size for at, size, kind in kernel.arguments if not kind.startswith("hidden_"))
    own = max(ends, default=0)
    if own != len(launch.arguments):
        raise Fault(
            f"{kernel.code.name}: expected {own} bytes of arguments, got {len(launch.arguments)}"
        )
    segment[:own] = np.frombuffer(launch.arguments, np.uint8)
    hidden = {
        "hidden_block_count_x": launch.grid, "hidden_block_count_y": 1, "hidden_block_count_z": 1,
        "hidden_group_size_x": launch.threads, "hidden_group_size_y": 1, "hidden_group_size_z": 1,
        "hidden_grid_dims": 1,
    }  # fmt: skip
    for offset, size, kind in kernel.arguments:
        value = hidden.get(kind, 0)
        if kind.startswith("hidden_") and value:
            segment[offset : offset + size] = np.frombuffer(
                value.to_bytes(size, "little"), np.uint8
            )
    return segment


def _decode(kernel: KernelText, rcp_rounding: int) -> tuple[Memories, list[Operation]]:
    """The instructions as functions, decoded once, and the memories that these look into."""
    if rcp_rounding not in kernel.decoded:
        memories = Memories(GlobalMemory(), kernel.code.arch)
        operations = [
            _decode_one(kernel, instruction, memories, rcp_rounding)
            for instruction in kernel.instructions
        ]
        kernel.decoded[rcp_rounding] = memories, operations
    found: tuple[Memories, list[Operation]] = kernel.decoded[rcp_rounding]
    return found


def _decode_one(
    kernel: KernelText, instruction: Instruction, memories: Memories, rcp_rounding: int
) -> Operation:
    name = instruction.mnemonic
    with _located(kernel, instruction, "decoding"):
        try:
            if name.startswith(_MEMORY):
                return decode_memory(instruction, memories)
            if name.startswith("v_") and name not in ("v_s_rcp_f32", "v_nop"):
                return decode_vector(instruction, kernel.code.wave_size, rcp_rounding)
            scalar = decode_scalar(instruction, kernel.labels, rcp_rounding)
            return decode_step(instruction, memories, scalar)
        except (IndexError, KeyError, ValueError) as error:
            raise Fault(f"operands not understood: {error!r}") from error


def _start_wave(
    kernel: KernelText,
    launch: Launch,
    index: int,
    workgroup: int,
    arguments: int,
    segment: NDArray[np.uint8],
    rng: np.random.Generator,
) -> Wave:
    """A wave with the registers that the kernel's directives ask for."""
    want, width = kernel.directives, kernel.code.wave_size
    accumulates = any("accvgpr" in i.mnemonic for i in kernel.instructions)
    wave = Wave(width, index, want["next_free_vgpr"], rng, accumulates)
    if want["system_vgpr_workitem_id"] or not want["user_sgpr_kernarg_segment_ptr"]:
        raise Fault(f"{kernel.code.name}: expected an argument segment and one work-item index")
    next_sgpr = sum(count for name, count in _USER_SGPRS_BEFORE if want.get(f"user_sgpr_{name}", 0))
    wave.s[next_sgpr], wave.s[next_sgpr + 1] = arguments & 0xFFFFFFFF, arguments >> 32
    next_sgpr += 2 + sum(
        count for name, count in _USER_SGPRS_AFTER if want.get(f"user_sgpr_{name}", 0)
    )
    preload = want.get("user_sgpr_kernarg_preload_length", 0)
    first = want.get("user_sgpr_kernarg_preload_offset", 0)
    if preload and launch.preloads:
        words = segment[4 * first : 4 * (first + preload)].view(np.uint32)
        wave.s[next_sgpr : next_sgpr + preload] = [int(word) for word in words]
        wave.pc = kernel.preloaded_entry
    if kernel.code.arch.startswith("gfx12"):
        wave.s[TTMP + 9] = workgroup
    else:
        wave.s[want["user_sgpr_count"]] = workgroup
    wave.v[0] = np.arange(index * width, (index + 1) * width, dtype=np.uint32)
    return wave


def _run_workgroup(
    kernel: KernelText,
    operations: list[Operation],
    waves: list[Wave],
    workgroup: int,
    rng: np.random.Generator,
    statistics: Statistics,
    memories: Memories,
) -> Iterator[None]:
    """Runs the waves from barrier to barrier until all have ended; a turn ends where a wave stops."""
    running = waves
    while running:
        counts = statistics.counts[workgroup, running[0].epoch] = [0] * len(operations)
        trips = statistics.round_trips[workgroup, running[0].epoch] = dict.fromkeys(
            (wave.index for wave in running), 0
        )
        left = list(running)
        while left:
            position = int(rng.integers(len(left)))
            wave = left[position]
            before = wave.round_trips
            memories.trace = wave.trace if workgroup in statistics.traces else None
            if _run_wave(kernel, operations, wave, workgroup, counts, memories.trace) != PAUSE:
                del left[position]
            trips[wave.index] += wave.round_trips - before
            yield
        running = [wave for wave in running if not wave.done]
        for wave in running:
            wave.epoch += 1


def _run_wave(
    kernel: KernelText,
    operations: list[Operation],
    w: Wave,
    workgroup: int,
    counts: list[int],
    trace: Trace | None,
) -> int:
    """Runs a wave to its next barrier, a pause or its end; returns which."""
    pc = w.pc
    for _ in range(MAX_STEPS):
        counts[pc] += 1
        if trace is not None:
            trace.append(pc)
        try:
            result = operations[pc](w)
        except Fault as fault:
            where = f"workgroup {workgroup}, wave {w.index}"
            raise Fault(_place(kernel, kernel.instructions[pc], where, fault)) from fault
        pc += 1
        if result is None:
            continue
        if result >= 0:
            pc = result
            continue
        w.pc = pc
        if result == END:
            w.done = True
        elif result not in (BARRIER, PAUSE):
            raise AssertionError(f"expected an index, END, BARRIER or PAUSE, got {result}")
        return result
    raise Fault(f"{kernel.code.name}: expected an end or a barrier within {MAX_STEPS} instructions")


@contextmanager
def _located(kernel: KernelText, instruction: Instruction, where: str) -> Iterator[None]:
    try:
        yield
    except Fault as fault:
        raise Fault(_place(kernel, instruction, where, fault)) from fault


def _place(kernel: KernelText, instruction: Instruction, where: str, fault: Fault) -> str:
    return (
        f"{kernel.code.name} on {kernel.code.arch}, line {instruction.line}, {where}:"
        f" `{instruction.text}`: {fault}"
    )
