"""What do the launchers in `csrc/kernels` choose on an emulated GPU: kernel instance and launch shape?

Constants are read out of the headers. A wrong choice of instance shows as a load that is not aligned,
or in a result; a wrong number of threads does not, as the kernels ask for their block size.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INCLUDE = Path(__file__).resolve().parents[2] / "csrc" / "include"


def constant(header: str, name: str) -> int:
    """The value of a constexpr of a header that is a number or a product of numbers."""
    text = (INCLUDE / header).read_text()
    match = re.search(rf"^ *constexpr \w+ {name} =\s*([0-9* ]+);", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"{header}: expected constexpr {name} = a product of numbers, got none")
    return math.prod(int(factor) for factor in match[1].split("*"))


def launcher_constant(name: str) -> int:
    """The value of a constexpr of the fused launcher."""
    return constant("../kernels/fused_topk_moe_sorting.cu", name)


COMPUTE_UNITS = 3  # NOTE: few, so that a launch has both kinds of workgroup and little to emulate.
MAX_THREADS = constant("moe_sorting_opus.h", "kSortThreads")
TILE_THREADS = constant("moe_sorting_opus.h", "kTileThreads")
COUNTING_THREADS = constant("tile_counts.h", "kCountingThreads")
WAVES_PER_BLOCK = constant("tile_counts.h", "kWavesPerBlock")
MAX_WAVES_PER_BLOCK = constant("device/wave.h", "kMaxWavesPerBlock")
MIN_WAVE_SIZE = constant("device/wave.h", "kMinWaveSize")
MAX_GROUP_EXPERTS = constant("group_topk.h", "kMaxGroupExperts")
MAX_GROUP_TOPK = constant("group_topk.h", "kMaxGroupTopk")
MAX_KEY_TOPK = constant("key_topk.h", "kMaxKeyTopk")
CANDIDATES_PER_LANE = constant("best_keys.h", "kCandidatesPerLane")
FEW_TOKENS = constant("group_topk.h", "kFewTokens")
MAX_ROW_EXPERTS = constant("row_topk.h", "kMaxRowExperts")
ZERO_BYTES_PER_BLOCK = constant("sort_launch.h", "kZeroBytesPerBlock")
SORT_LDS_WORDS = constant("moe_sorting_opus.h", "kSortLdsWords")
MAX_HANDOVER_SIZE = launcher_constant("kMaxHandoverSize")
UNHURRIED_ROUNDS = launcher_constant("kUnhurriedRounds")
WAVES_AT_ONCE = launcher_constant("kWavesAtOnce")
MAX_TILES = constant("tile_counts.h", "kMaxTilesAlone")
FEWEST_TOKENS = constant("tile_counts.h", "kFewestTokens")
MANY_TOKENS = constant("tile_counts.h", "kManyTokens")

Shape = tuple[int, int, int, int]
_TYPE_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
LOGIT_TYPES = tuple(_TYPE_NAMES)  # LogitType of row_topk.h


@dataclass(frozen=True)
class RowChoice:
    """How waves take rows of logits (RowChoice of sort_launch.h).

    Attributes:
        name: of the class that the kernel is an instance for, such as `GroupRows<bf16, 8, 16, 4>`.
        values: registers of a lane that hold logits; 0 for rows that stay in memory.
        rows_per_wave: taken at once.
        wide: whether rows can be loaded 16 bytes at a time.
        item_bytes: of what row strides count; 0 for a logit.
        lds_bytes: of each wave.
        max_threads: of a workgroup; 0 for what `values` allows.
        places: for experts; 0 for rows that stay in memory.
    """

    name: str
    values: int
    rows_per_wave: int = 1
    wide: bool = False
    item_bytes: int = 0
    lds_bytes: int = 0
    max_threads: int = 0
    places: int = 0


def choose_rows(gating: Tensor, topk: int, need_renorm: bool, wave_size: int) -> RowChoice:
    """The choice for router logits [M, E] (choose_rows of sort_launch.h)."""
    num_tokens, num_experts = gating.shape
    dtype = _TYPE_NAMES[gating.dtype]
    is_f32 = gating.dtype == torch.float32
    by_lists = (
        topk <= MAX_GROUP_TOPK
        and num_experts <= MAX_GROUP_EXPERTS
        and (not is_f32 or num_experts <= 128 or num_tokens * num_experts <= 64 * 256)
    )
    few = 0 if is_f32 or topk > MAX_GROUP_TOPK else 4
    by_keys = not by_lists and has_key_group(num_experts, topk) and num_tokens > few
    if not need_renorm or not (by_lists or by_keys):
        values = row_values(num_experts, wave_size)
        return RowChoice(f"WaveRow<{dtype}, {values}>", values, places=values * wave_size)
    size = gating.element_size()
    places = (gating.data_ptr(), gating.stride(0) * size, num_experts * size)
    wide = all(place % 16 == 0 for place in places)
    if by_lists:
        lanes, values, best = group_shape(num_tokens, num_experts, topk)
        name = f"GroupRows<{dtype}, {lanes}, {values}, {best}>"
        registers = values * (2 if is_f32 else 1)
        return RowChoice(name, registers, wave_size // lanes, wide, places=lanes * values)
    lanes, values, best = key_group_shape(num_experts, topk)
    name = f"KeyRows<{lanes}, {values}, {best}>"
    lds_bytes = 8 * CANDIDATES_PER_LANE * wave_size
    rows = wave_size // lanes
    return RowChoice(name, values, rows, wide, 1, lds_bytes, places=lanes * values)


def group_shape(num_tokens: int, num_experts: int, topk: int) -> tuple[int, int, int]:
    """Lanes of a group, registers of a lane and winners looked for (group_topk.h)."""
    if num_experts > 256:
        return 32, 16, 8
    if num_experts > 128:
        return (8, 32, 8) if num_tokens > FEW_TOKENS else (16, 16, 8)
    return 8, 16, 8 if topk > 4 else 4


def key_group_shape(num_experts: int, topk: int) -> tuple[int, int, int]:
    """The same of key_topk.h."""
    if topk > 16:
        return 32, 32, 32
    if num_experts > 512:
        return 32, 32, 16
    return (32, 16, 16) if topk > 8 or num_experts > 256 else (8, 32, 8)


def has_key_group(num_experts: int, topk: int) -> bool:
    """Whether there is one for such rows (key_topk.h)."""
    lanes, _, best = key_group_shape(num_experts, topk)
    least = (5 if lanes < 2 * best else 10) * best
    return topk <= MAX_KEY_TOPK and least <= num_experts <= MAX_ROW_EXPERTS


def row_values(num_experts: int, wave_size: int) -> int:
    """Registers of a lane that hold a row of logits; 0 for rows that stay in memory (row_topk.h)."""
    if num_experts > MAX_ROW_EXPERTS:
        return 0
    values = 2
    while values * wave_size < num_experts:
        values *= 2
    return values


def zeroing_blocks(num_bytes: int) -> int:
    """Workgroups that zero moe_buf (sort_launch.h)."""
    wanted = (num_bytes + ZERO_BYTES_PER_BLOCK - 1) // ZERO_BYTES_PER_BLOCK
    return int(min(wanted, max(1, COMPUTE_UNITS - 1)))


def is_one_token(num_tokens: int, topk: int, has_mask: bool) -> bool:
    """Whether a single token is sorted in registers (one_token.h)."""
    return num_tokens == 1 and topk <= MIN_WAVE_SIZE and not has_mask


def choose_handover_size(shape: Shape, rows: RowChoice) -> int:
    """Workgroups that share the selection (choose_handover_size of fused_topk_moe_sorting.cu)."""
    row_waves = -(-shape[0] // rows.rows_per_wave)
    if row_waves <= UNHURRIED_ROUNDS * WAVES_AT_ONCE:
        return 1
    return min(-(-row_waves // WAVES_AT_ONCE), MAX_HANDOVER_SIZE)


def fused_threads(
    shape: Shape,
    num_rows: int,
    rows: RowChoice,
    wave_size: int,
    one_token: bool,
    wide_stores: bool,
) -> int:
    """Threads of the fused launch of M, E, K and B, `num_rows` to a workgroup (choose_waves of
    fused_topk_moe_sorting.cu).
    """
    num_tokens, num_experts, topk, block_size = shape

    def waves_for(threads: int) -> int:
        return (min(threads, MAX_THREADS) + wave_size - 1) // wave_size

    if one_token:
        wanted = 1 + waves_for(topk * block_size // (4 if wide_stores else 1))
    else:
        row_waves = (num_rows + rows.rows_per_wave - 1) // rows.rows_per_wave
        hands_over = num_rows < num_tokens
        entries = num_tokens if hands_over else min(num_rows, block_size)
        entry_waves = waves_for(entries * topk)
        per_thread = 1 if 0 < rows.places <= 4 * wave_size else 2
        expert_waves = waves_for(-(-num_experts // per_thread))
        if hands_over:
            wanted = max(row_waves, entry_waves, expert_waves)
        elif num_tokens <= block_size:
            wanted = max(row_waves, entry_waves)
        else:
            wanted = max(row_waves, expert_waves + min(entry_waves, 4))
    max_threads = rows.max_threads or (512 if rows.values > 16 else MAX_THREADS)
    return min(max_threads // wave_size, max(4, (wanted + 3) // 4 * 4)) * wave_size
