"""The ops of this project, launched on the interpreter instead of a GPU.

Mirrors the launchers in `csrc/kernels`: the parameter structs here, the choice of the kernel instance
and of the launch shape in `choices`. A struct of another size than the kernel's own, or too little LDS,
is an error there (`machine.kernel_arguments`, `memory.Lds`).

Long because it mirrors the structs and the launcher of every kernel.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from amdgcn.assembly import Kernels
from amdgcn.machine import Launch, run
from amdgcn.memory import GlobalMemory
from amdgcn.statistics import Statistics
from amdgcn.wave import Fault
from choices import (
    COUNTING_THREADS,
    FEWEST_TOKENS,
    LOGIT_TYPES,
    MANY_TOKENS,
    MAX_THREADS,
    MAX_TILES,
    MAX_WAVES_PER_BLOCK,
    SORT_LDS_WORDS,
    TILE_THREADS,
    WAVES_PER_BLOCK,
    RowChoice,
    choose_handover_size,
    choose_rows,
    fused_threads,
    is_one_token,
    zeroing_blocks,
)
from numpy.typing import NDArray
from torch import Tensor

from aiter.jit.device_code import compile_module
from aiter.jit.device_kernels import ARCHS
from aiter.routing.dispatch import MOST_ONESHOT_ENTRIES

_i32, _u32, _u64, _ptr = ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64


class Divisor(ctypes.Structure):
    """expert_sort.h"""

    _fields_ = [("magic", _u32), ("shift", _i32)]


class SortShape(ctypes.Structure):
    """expert_sort.h"""

    _fields_ = [
        ("num_tokens", _i32), ("num_experts", _i32), ("topk", _i32), ("block_size", _i32),
        ("by_topk", Divisor), ("by_block_size", Divisor), ("wide_stores", ctypes.c_bool),
        ("flat_ids", ctypes.c_bool), ("num_real", _i32),
    ]  # fmt: skip


class SortParams(ctypes.Structure):
    """expert_sort.h"""

    _fields_ = [
        ("sorted_ids", _ptr), ("sorted_weights", _ptr), ("sorted_expert_ids", _ptr),
        ("num_valid_ids", _ptr), ("moe_buf", _ptr), ("row_bytes", _u64), ("expert_mask", _ptr),
        ("num_local_tokens", _ptr),
    ]  # fmt: skip


class FusedLds(ctypes.Structure):
    """fused_topk_moe_sorting.h"""

    _fields_ = [("counts", _u32), ("rows", _u32), ("weights", _u32)]


class FusedFirst(ctypes.Structure):
    """fused_topk_moe_sorting.h; the kernel takes its fields as arguments of their own."""

    _fields_ = [
        ("gating", _ptr), ("row_stride", ctypes.c_int64), ("num_local_tokens", _ptr),
        ("expert_mask", _ptr), ("num_tokens", _i32), ("num_experts", _i32), ("topk", _i32),
        ("tokens_per_block", _i32), ("num_threads", _i32), ("flags", _u32),
    ]  # fmt: skip


class FusedParams(ctypes.Structure):
    """fused_topk_moe_sorting.h"""

    _fields_ = [("shape", SortShape), ("sort", SortParams), ("lds", FusedLds), ("ticket", _ptr)]


class FusedArguments(ctypes.Structure):
    """All arguments of the fused kernel."""

    _fields_ = [("first", FusedFirst), ("params", FusedParams)]


class Tiles(ctypes.Structure):
    """tile_counts.h"""

    _fields_ = [("tokens", _i32), ("count", _i32), ("group", _i32)]

    @classmethod
    def choose(cls, num_tokens: int) -> Tiles:
        """Those of a GPU without clusters."""
        tokens = max(FEWEST_TOKENS, -(-num_tokens // MAX_TILES))
        if tokens > MANY_TOKENS:
            tokens = -(-tokens // 4) * 4
        return cls(tokens, -(-num_tokens // tokens), 1)


class TileCounts(ctypes.Structure):
    """tile_counts.h"""

    _fields_ = [("totals", _ptr), ("before", _ptr), ("num_experts", _i32), ("tiles", Tiles)]

    @classmethod
    def at(cls, workspace: int, num_experts: int, num_tokens: int) -> TileCounts:
        """In a workspace at that address."""
        tiles = Tiles.choose(num_tokens)
        return cls(workspace, workspace + 4 * tiles.count * num_experts, num_experts, tiles)

    def lds_bytes(self) -> int:
        """Of a workgroup that counts."""
        return 16 + 4 * (-(-self.num_experts // 4) * 4)


class RowsOfBlock(ctypes.Structure):
    """tile_counts.h"""

    _fields_ = [
        ("num_rows", _i32), ("num_zeroed", _i32), ("counts_offset", _u32), ("counts", TileCounts),
        ("num_local_tokens", _ptr), ("moe_buf", _ptr), ("row_bytes", _u64), ("ahead", _u32 * 3),
    ]  # fmt: skip


@dataclass(frozen=True)
class Counting:
    """What a launch that selects does for the sort behind it (CountsArgs of routing_checks.h)."""

    workspace: Tensor
    moe_buf: Tensor
    num_experts: int
    num_local_tokens: Tensor | None = None


class TopkSoftmaxArguments(ctypes.Structure):
    """All arguments of the kernel in topk_softmax.h."""

    _fields_ = [
        ("gating", _ptr), ("row_stride", ctypes.c_int64), ("num_tokens", _i32),
        ("num_experts", _i32), ("topk", _i32), ("flags", _u32), ("topk_weights", _ptr),
        ("topk_indices", _ptr), ("token_expert_indices", _ptr), ("block", RowsOfBlock),
    ]  # fmt: skip


class OpusParams(ctypes.Structure):
    """moe_sorting_opus.h"""

    _fields_ = [
        ("topk_ids", _ptr), ("topk_weights", _ptr), ("shape", SortShape), ("sort", SortParams),
        ("part_words", _i32), ("counts", TileCounts), ("num_zeroed", _i32),
    ]  # fmt: skip


@cache
def kernels(module: str, arch: str) -> Kernels:
    """The kernels of a module by readable name, compiled if need be."""
    return Kernels((assembly.text for assembly in compile_module(module, (arch,))), arch)


def tensor_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The memory from a tensor's first item to its last, gaps between rows included."""
    spans = zip(tensor.shape, tensor.stride(), strict=True)
    items = 1 + sum((size - 1) * stride for size, stride in spans) if tensor.numel() else 0
    raw = (ctypes.c_uint8 * (items * tensor.element_size())).from_address(tensor.data_ptr())
    return np.ctypeslib.as_array(raw)


@dataclass
class Device:
    """An emulated GPU. Its methods are the ops of the same names, for tensors on the CPU.

    Attributes:
        arch: such as `gfx942`.
        seed: of the noise in registers and LDS, and of the order of waves and workgroups.
        preloads: whether the firmware fills registers with arguments, where kernels ask for it.
        rcp_rounding: which neighbour of 1 / x v_rcp_f32 returns: -1 below, 1 above, 0 the nearer.
        takes_turns: whether workgroups run by turns; else one after the other.
        counts_banks: whether to count LDS bank conflicts.
        traced: whether to keep what every wave executes, in order.
        workgroups: those that run, by the kernel's name; all of a kernel that is not named.
        statistics: of every launch so far, by kernel.
    """

    arch: str
    seed: int = 0
    rcp_rounding: int = 0
    preloads: bool = True
    takes_turns: bool = False
    counts_banks: bool = False
    traced: bool = False
    workgroups: dict[str, tuple[int, ...]] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)

    @property
    def wave_size(self) -> int:
        """Lanes per wave."""
        return ARCHS[self.arch].wave_size

    def topk_softmax(
        self,
        topk_weights: Tensor,
        topk_indices: Tensor,
        token_expert_indices: Tensor | None,
        gating_output: Tensor,
        need_renorm: bool,
        counting: Counting | None = None,
    ) -> None:
        """`aiter.topk_softmax`, or with `counting` the chain's."""
        num_tokens, num_experts = gating_output.shape
        rows = choose_rows(gating_output, topk_weights.shape[1], need_renorm, self.wave_size)
        memory = GlobalMemory()
        params = TopkSoftmaxArguments(
            gating=map_tensor(memory, "gating_output", gating_output, writable=False),
            row_stride=row_stride(rows, gating_output),
            num_tokens=num_tokens,
            num_experts=num_experts,
            topk=topk_weights.shape[1],
            flags=need_renorm | rows.wide << 1 | LOGIT_TYPES.index(gating_output.dtype) << 2,
            topk_weights=map_tensor(memory, "topk_weights", topk_weights),
            topk_indices=map_tensor(memory, "topk_indices", topk_indices),
        )
        if token_expert_indices is not None:
            params.token_expert_indices = map_tensor(
                memory, "token_expert_indices", token_expert_indices
            )
        params.block, *shape = select_launch(memory, num_tokens, rows, self.wave_size, counting)
        self.launch("module_topk_softmax", f"topk_softmax<{rows.name}>", memory, params, *shape)

    def fused_topk_moe_sorting_fwd(
        self,
        gating_output: Tensor,
        sorted_ids: Tensor,
        sorted_weights: Tensor,
        sorted_expert_ids: Tensor,
        num_valid_ids: Tensor,
        moe_buf: Tensor,
        num_experts: int,
        topk: int,
        unit_size: int,
        need_renorm: bool,
        *,
        local_expert_mask: Tensor | None = None,
        num_local_tokens: Tensor | None = None,
        handover_size: int | None = None,
    ) -> None:
        """`aiter.fused_topk_moe_sorting_fwd`."""
        memory = GlobalMemory()
        outputs = (sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf)
        sort = sort_params(memory, outputs, local_expert_mask, num_local_tokens)
        rows = choose_rows(gating_output, topk, need_renorm, self.wave_size)
        shape = sort_shape(gating_output.shape[0], num_experts, topk, unit_size, sort)
        self.launch_fused(
            f"fused_topk_moe_sorting<{rows.name}>", memory, gating_output, shape, sort, rows,
            handover_size, need_renorm,
        )  # fmt: skip

    def launch_fused(
        self,
        name: str,
        memory: GlobalMemory,
        gating_output: Tensor,
        shape: SortShape,
        sort: SortParams,
        rows: RowChoice,
        handover_size: int | None,
        need_renorm: bool = False,
        rule: ctypes.Structure | None = None,
    ) -> None:
        """One of the fused kernels: checked_launch() of fused_topk_moe_sorting.cu.

        Args:
            rule: FusedRule, of the kernels that have one.
        """
        sizes = shape.num_tokens, shape.num_experts, shape.topk, shape.block_size
        size = choose_handover_size(sizes, rows) if handover_size is None else handover_size
        size = max(1, min(size, shape.num_tokens))
        leaves_out = sort.expert_mask != 0 or shape.num_real < shape.num_experts
        one_token = size == 1 and is_one_token(shape.num_tokens, shape.topk, leaves_out)
        tokens_per_block = (shape.num_tokens + size - 1) // size
        threads = fused_threads(
            sizes, tokens_per_block, rows, self.wave_size, one_token, bool(shape.wide_stores)
        )
        row_bytes = threads // self.wave_size * rows.lds_bytes
        lds, lds_bytes = plan_fused_lds(*sizes[:3], row_bytes)
        ticket = np.zeros(1, np.uint32)
        params = FusedParams(shape, sort, lds, memory.add("ticket", ticket))
        first = FusedFirst(
            gating=map_tensor(memory, "gating_output", gating_output, writable=False),
            row_stride=row_stride(rows, gating_output),
            num_local_tokens=sort.num_local_tokens,
            expert_mask=sort.expert_mask,
            num_tokens=shape.num_tokens,
            num_experts=shape.num_experts,
            topk=shape.topk,
            tokens_per_block=tokens_per_block,
            num_threads=threads,
            flags=need_renorm
            | rows.wide << 1
            | one_token << 2
            | (size > 1) << 3
            | (leaves_out and not shape.flat_ids) << 4
            | (0 if rule else LOGIT_TYPES.index(gating_output.dtype)) << 6
            | size << 8,
        )
        arguments = bytes(FusedArguments(first, params)) + (bytes(rule) if rule else b"")
        zeroing = zeroing_blocks(sort.row_bytes * shape.num_tokens)
        self.launch(
            "module_fused_topk_moe_sorting", name, memory, arguments, size + zeroing, threads,
            lds_bytes,
        )  # fmt: skip
        if ticket[0] != 0:
            raise Fault(f"ticket: expected 0 behind a launch, got {ticket[0]}")

    def moe_sorting_opus_fwd(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        sorted_token_ids: Tensor,
        sorted_weights: Tensor,
        sorted_expert_ids: Tensor,
        num_valid_ids: Tensor,
        moe_buf: Tensor,
        num_experts: int,
        unit_size: int,
        local_expert_mask: Tensor | None = None,
        num_local_tokens: Tensor | None = None,
        workspace: Tensor | None = None,
        dispatch_policy: int = 0,
        counted: bool = False,
    ) -> None:
        """`aiter.moe_sorting_opus_fwd`; `counted`: the launch before has."""
        memory = GlobalMemory()
        num_tokens, topk = topk_ids.shape
        outputs = (sorted_token_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf)
        sort = sort_params(memory, outputs, local_expert_mask, num_local_tokens)
        multiphase = dispatch_policy == 2 or (
            dispatch_policy == 0 and num_tokens * topk > MOST_ONESHOT_ENTRIES
        )
        words = Tiles.choose(num_tokens).tokens if multiphase else num_tokens
        part_words = min(max((words + 31) // 32, 1), SORT_LDS_WORDS // num_experts - 2)
        params = OpusParams(
            topk_ids=map_tensor(memory, "topk_ids", topk_ids, writable=False),
            topk_weights=map_tensor(memory, "topk_weights", topk_weights, writable=False),
            shape=sort_shape(num_tokens, num_experts, topk, unit_size, sort),
            sort=sort,
            part_words=part_words,
        )
        lds = 4 * (num_experts * (2 + part_words) + 2 * MAX_WAVES_PER_BLOCK + 1)
        zeroing = zeroing_blocks(sort.row_bytes * num_tokens)
        phases = [("oneshot", 1 + zeroing, MAX_THREADS, lds)]
        if multiphase:
            address = 0 if workspace is None else map_tensor(memory, "workspace", workspace)
            params.counts = TileCounts.at(address, num_experts, num_tokens)
            tiles = params.counts.tiles.count
            params.num_zeroed = params.counts.tiles.tokens
            phases = [("place<0>", max(tiles, 1), TILE_THREADS, lds)]
            if tiles > 0 and not counted:
                phases.insert(0, ("count", tiles, TILE_THREADS, params.counts.lds_bytes()))
        for phase, blocks, threads, lds_bytes in phases:
            self.launch("module_moe_sorting_opus", f"moe_sorting_{phase}", memory, params, blocks,
                        threads, lds_bytes)  # fmt: skip

    def launch(
        self,
        module: str,
        name: str,
        memory: GlobalMemory,
        params: ctypes.Structure | bytes,
        blocks: int,
        threads: int,
        lds_bytes: int,
    ) -> None:
        kernel = kernels(module, self.arch)[name]
        launch = Launch(blocks, threads, lds_bytes, bytes(params), self.seed, self.rcp_rounding,
                        self.preloads, self.counts_banks, self.takes_turns, self.traced,
                        self.workgroups.get(name))  # fmt: skip
        self.statistics[name] = run(kernel, memory, launch)


def select_launch(
    memory: GlobalMemory,
    num_tokens: int,
    rows: RowChoice,
    wave_size: int,
    counting: Counting | None,
) -> tuple[RowsOfBlock, int, int, int]:
    """What a launch that selects knows of rows; workgroups, their threads and LDS (sort_launch.h)."""
    if counting is None:
        rows_per_block = WAVES_PER_BLOCK * rows.rows_per_wave
        blocks = -(-num_tokens // rows_per_block)
        lds_bytes = WAVES_PER_BLOCK * rows.lds_bytes
        return RowsOfBlock(rows_per_block), blocks, WAVES_PER_BLOCK * wave_size, lds_bytes
    workspace = map_tensor(memory, "workspace", counting.workspace)
    counts = TileCounts.at(workspace, counting.num_experts, num_tokens)
    wanted = -(-counts.tiles.tokens // rows.rows_per_wave) + 1
    most = min(COUNTING_THREADS, rows.max_threads or COUNTING_THREADS) // wave_size
    waves = min(max(wanted, WAVES_PER_BLOCK), most)
    moe_buf = counting.moe_buf
    local = counting.num_local_tokens
    block = RowsOfBlock(
        counts.tiles.tokens,
        counts.tiles.tokens,
        waves * rows.lds_bytes,
        counts,
        0 if local is None else map_tensor(memory, "num_local_tokens", local, writable=False),
        map_tensor(memory, "moe_buf", moe_buf),
        moe_buf.shape[1] * moe_buf.element_size(),
    )
    lds_bytes = waves * rows.lds_bytes + counts.lds_bytes()
    return block, counts.tiles.count, waves * wave_size, lds_bytes


def plan_fused_lds(
    num_tokens: int, num_experts: int, topk: int, row_bytes: int
) -> tuple[FusedLds, int]:
    """Where the workgroup that has all rows keeps what, and the bytes (fused_topk_moe_sorting.h)."""
    entries = num_tokens * topk
    per_expert = 4 * ((num_experts + 3) // 4 * 4)
    rows = 4 * 2 * MAX_WAVES_PER_BLOCK + 16 + per_expert * ((num_tokens + 31) // 32 + 2)
    weights = rows + row_bytes
    return FusedLds(rows, rows, weights), (weights + 6 * entries + 15) // 16 * 16


def row_stride(rows: RowChoice, gating: Tensor) -> int:
    """Between rows, in what the class of rows counts (sort_launch.h)."""
    return int(gating.stride(0)) * (
        gating.element_size() // rows.item_bytes if rows.item_bytes else 1
    )


def divisor(number: int) -> Divisor:
    """What division by `number` takes (expert_sort.h)."""
    shift = 31 + (number - 1).bit_length()
    return Divisor(magic=-(-(1 << shift) // number), shift=shift)


def sort_shape(
    num_tokens: int,
    num_experts: int,
    topk: int,
    block_size: int,
    sort: SortParams,
    flat_ids: bool = False,
    num_zero_experts: int = 0,
) -> SortShape:
    """The problem, with what launchers derive from it (sort_launch.h)."""
    on_boundary = sort.sorted_ids % 16 == 0 and sort.sorted_weights % 16 == 0
    return SortShape(
        num_tokens=num_tokens,
        num_experts=num_experts,
        topk=topk,
        block_size=block_size,
        by_topk=divisor(topk),
        by_block_size=divisor(block_size),
        wide_stores=block_size % 4 == 0 and on_boundary,
        flat_ids=flat_ids,
        num_real=num_experts - num_zero_experts,
    )


def map_tensor(memory: GlobalMemory, name: str, tensor: Tensor, writable: bool = True) -> int:
    """The address of a tensor's first item in an emulated GPU's memory."""
    return memory.add(name, tensor_bytes(tensor), writable, tensor.data_ptr() % 256)


def sort_params(
    memory: GlobalMemory, outputs: tuple[Tensor, ...], mask: Tensor | None, num_local: Tensor | None
) -> SortParams:
    """The five outputs and the two optional inputs (sort_launch.h)."""
    names = ("sorted_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids", "moe_buf")
    addresses = [map_tensor(memory, name, out) for name, out in zip(names, outputs, strict=True)]
    moe_buf = outputs[4]
    return SortParams(
        *addresses,
        moe_buf.shape[1] * moe_buf.element_size(),
        0 if mask is None else map_tensor(memory, "expert_mask", mask, writable=False),
        0
        if num_local is None
        else map_tensor(memory, "num_local_tokens", num_local, writable=False),
    )
