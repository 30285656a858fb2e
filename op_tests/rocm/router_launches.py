"""The launch from hidden states on the interpreter: mirrors csrc/kernels/fused_router_sorting.cu.

Plain softmax by lists and by keys, without a rule.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from amdgcn.memory import GlobalMemory
from choices import choose_rows, fused_threads, is_one_token
from launches import (
    Device,
    Divisor,
    FusedArguments,
    FusedFirst,
    FusedParams,
    _i32,
    _ptr,
    _u32,
    divisor,
    map_tensor,
    plan_fused_lds,
    row_stride,
    sort_params,
    sort_shape,
)
from torch import Tensor

KINDS = (torch.float32, torch.float16, torch.bfloat16, None)  # FloatKind
BF16, WIDE, ITEMS = range(3)  # ChunksBy
# Rows, experts and the slowest way to read, as kTiles.
TILES = ((8, 4, BF16), (4, 4, BF16), (4, 1, WIDE), (1, 1, ITEMS))
# The same as kTilesAlone, for the product in a launch of its own, and the rounds held by way to read.
TILES_ALONE = {
    (8, 8, BF16): (1,), (8, 4, BF16): (2,), (4, 4, BF16): (3,), (4, 2, BF16): (3,),
    (4, 1, WIDE): (4, 2), (2, 2, BF16): (4,), (1, 2, BF16): (4,), (1, 1, ITEMS): (4, 4, 1),
}  # fmt: skip
CHUNKS = ("Bf16Chunks", "WideChunks", "Items")
Tiles = Iterable[tuple[int, int, int]]
PARTIAL_SUMS, MOST_TEAMS, LDS_BYTES_PER_TEAM, SUMS_OF_TEAM = 128, 4, 512, 4
MOST_THREADS = 512  # kMaxRouterThreads


class RouterProduct(ctypes.Structure):
    """router_product.h"""

    _fields_ = [
        ("hidden", _ptr), ("weight", _ptr), ("bias", _ptr), ("logits", _ptr),
        ("hidden_stride", ctypes.c_int64), ("weight_stride", ctypes.c_int64),
        ("logits_stride", ctypes.c_int64), ("width", _i32), ("num_experts", _i32),
        ("hidden_kind", _i32), ("weight_kind", _i32), ("bias_kind", _i32), ("by", _u32),
        ("tile_rows", _i32), ("tile_experts", _i32), ("row_tiles", _i32), ("num_tiles", _i32),
        ("tiles_per_block", _i32),
    ]  # fmt: skip


class ProductArguments(ctypes.Structure):
    """Of router_product_kernel()."""

    _fields_ = [("num_tokens", _i32), ("by_row_tiles", Divisor), ("product", RouterProduct)]


def _bytes_between_rows(matrix: Tensor) -> int:
    return int(matrix.stride(0)) * matrix.element_size()


def _lies_wide(matrix: Tensor) -> bool:
    return matrix.data_ptr() % 16 == 0 and (
        len(matrix) <= 1 or _bytes_between_rows(matrix) % 16 == 0
    )


def least_tiles(logits: int, workgroups: int) -> int:
    """least_tiles() there."""
    if logits <= 8:
        return -(-4 * workgroups // 9)
    return -(-3 * workgroups // 4) if logits <= 32 else -(-4 * workgroups // 3)


def choose_tile(
    tokens: int, experts: int, workgroups: int, by: int, tiles: Tiles = TILES
) -> tuple[int, int]:
    """choose_tile() there."""
    chosen = (1, 1)
    for rows, columns, slowest in tiles:
        if by > slowest:
            continue
        chosen = (rows, columns)
        if (rows > 1 and rows >= 2 * tokens) or (columns > 1 and columns >= 2 * experts):
            continue
        if -(-tokens // rows) * -(-experts // columns) >= least_tiles(rows * columns, workgroups):
            break
    return chosen


def fused_router_sorting_fwd(
    device: Device,
    hidden_states: Tensor,
    router_weight: Tensor,
    logits_out: Tensor,
    sorted_ids: Tensor,
    sorted_weights: Tensor,
    sorted_expert_ids: Tensor,
    num_valid_ids: Tensor,
    moe_buf: Tensor,
    num_experts: int,
    topk: int,
    unit_size: int,
    *,
    router_bias: Tensor | None = None,
    rule: bool = True,
    local_expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    num_workgroups: int = 1,
    arrived: int = 0,
) -> None:
    """The op of that name, for tensors on the CPU, by `num_workgroups` of `device`.

    Args:
        arrived: how many of them are done with their share, of those that `device` does not run:
            `logits_out` holds what these have made.
    """
    memory = GlobalMemory()
    outputs = (sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf)
    sort = sort_params(memory, outputs, local_expert_mask, num_local_tokens)
    tokens = len(hidden_states)
    shape = sort_shape(tokens, num_experts, topk, unit_size, sort)
    product = _product(memory, hidden_states, router_weight, router_bias, num_workgroups)
    product.logits = map_tensor(memory, "logits_out", logits_out)
    product.logits_stride = logits_out.stride(0)
    rows = choose_rows(logits_out, topk, rule, device.wave_size)
    leaves_out = sort.expert_mask != 0
    one_token = is_one_token(tokens, topk, leaves_out)
    sizes = shape.num_tokens, shape.num_experts, shape.topk, shape.block_size
    most = rows.max_threads or MOST_THREADS
    most = min(
        most, MOST_THREADS // 2 if rows.name.startswith("KeyRows") and rows.values > 16 else most
    )
    threads = max(
        fused_threads(sizes, tokens, rows, device.wave_size, one_token, bool(shape.wide_stores)),
        PARTIAL_SUMS * min(max(product.tiles_per_block, 1), MOST_TEAMS),
    )
    threads = min(threads, most)
    lds, lds_bytes = plan_fused_lds(*sizes[:3], threads // device.wave_size * rows.lds_bytes)
    ticket = np.full(1, arrived, np.uint32)
    params = FusedParams(shape, sort, lds, memory.add("ticket", ticket))
    first = FusedFirst(
        gating=product.logits,
        row_stride=row_stride(rows, logits_out),
        num_local_tokens=sort.num_local_tokens,
        expert_mask=sort.expert_mask,
        num_tokens=tokens,
        num_experts=num_experts,
        topk=topk,
        tokens_per_block=tokens,
        num_threads=threads,
        flags=rule | rows.wide << 1 | one_token << 2 | leaves_out << 4 | 1 << 8,
    )
    device.launch(
        "module_fused_router_sorting", f"fused_router_sorting<{rows.name}>", memory,
        bytes(FusedArguments(first, params)) + bytes(product), num_workgroups, threads,
        max(lds_bytes, threads // PARTIAL_SUMS * LDS_BYTES_PER_TEAM),
    )  # fmt: skip
    if ticket[0] != 0:
        raise AssertionError(f"ticket: expected 0 behind a launch, got {ticket[0]}")


def router_product(
    device: Device,
    hidden_states: Tensor,
    router_weight: Tensor,
    logits_out: Tensor,
    *,
    router_bias: Tensor | None = None,
    compute_units: int,
) -> None:
    """The op of that name, for tensors on the CPU, on `device` with so many compute units."""
    memory = GlobalMemory()
    product = _product(
        memory, hidden_states, router_weight, router_bias, compute_units, TILES_ALONE
    )
    product.logits = map_tensor(memory, "logits_out", logits_out)
    product.logits_stride = logits_out.stride(0)
    tile = product.tile_rows, product.tile_experts
    held = next(of[product.by] for (*shape, _), of in TILES_ALONE.items() if tuple(shape) == tile)
    device.launch(
        "module_fused_router_sorting",
        f"router_product<{tile[0]}, {tile[1]}, {held}, {CHUNKS[product.by]}>", memory,
        bytes(ProductArguments(len(hidden_states), divisor(product.row_tiles), product)),
        product.num_tiles, PARTIAL_SUMS,
        SUMS_OF_TEAM * tile[0] * tile[1] * 4,
    )  # fmt: skip


def _product(
    memory: GlobalMemory,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    workgroups: int,
    tiles: Tiles = TILES,
) -> RouterProduct:
    """product_of() there, but for the logits."""
    tokens, experts = len(hidden), len(weight)
    by = ITEMS
    if _lies_wide(hidden) and _lies_wide(weight):
        by = BF16 if hidden.dtype == weight.dtype == torch.bfloat16 else WIDE
    rows, columns = choose_tile(tokens, experts, workgroups, by, tiles)
    row_tiles = -(-tokens // rows)
    num_tiles = row_tiles * -(-experts // columns)
    return RouterProduct(
        hidden=map_tensor(memory, "hidden_states", hidden, writable=False),
        weight=map_tensor(memory, "router_weight", weight, writable=False),
        bias=0 if bias is None else map_tensor(memory, "router_bias", bias, writable=False),
        hidden_stride=_bytes_between_rows(hidden),
        weight_stride=_bytes_between_rows(weight),
        width=hidden.shape[1],
        num_experts=experts,
        hidden_kind=KINDS.index(hidden.dtype),
        weight_kind=KINDS.index(weight.dtype),
        bias_kind=KINDS.index(None if bias is None else bias.dtype),
        by=by,
        tile_rows=rows,
        tile_experts=columns,
        row_tiles=row_tiles,
        num_tiles=num_tiles,
        tiles_per_block=-(-num_tiles // workgroups),
    )


def op_of(device: Device) -> partial[None]:
    """The op on `device`."""
    return partial(fused_router_sorting_fwd, device)
