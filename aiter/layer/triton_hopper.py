"""How are the products of prefill computed where some warps only load and others only multiply?

`triton_kernels` has the formulas; this is the same in Gluon, Triton's lower layer, for compute
capability 9.0. There a tile's loads, products and stores can run at the same time as its neighbours':

    4 warps load     rows by cp.async, as `hidden` has to be gathered and no descriptor gathers here, and
                     weights by tensor descriptor, into the next of STAGES stages in shared memory
    8 warps multiply a stage after the other, apply bias and activation, and hand the tile, through
                     shared memory, to a descriptor's store, which runs on while they go on

A program per multiprocessor goes through the tiles; the loading warps are STAGES stages ahead, across
the ends of tiles. `ready[stage]` is the barrier of what has been loaded (each loading thread arrives
when its copies have, and the descriptor's bytes count), `empty[stage]` that of what has been multiplied.

A tile is BM slots of one block by WIDTH columns of the weights. A block's slots are filled from the
front: a second half of a tile's slots that is padding is not multiplied (HALVES), and padding rows are
not loaded. A store is a box of BM rows all the same: what it writes to padding rows is never read.

Programs take every num_programs-th tile, so those at work share weights and rows in the L2 as long as
their tiles take equally long. Half tiles seem to end that, by the times alone, as the loop's code is the
same: the first product of Qwen3 loses 12 % by them (M=8192: 809 us against 724), although it multiplies
5 % less, and never takes them. The second product, whose weights are smaller, gains (398 against 439).
The form in which Triton itself gives the loads to other warps (`tl.range(warp_specialize=True)`, 3.6)
takes no gathered rows, and where it compiled had not returned after a minute.

Both outputs lie in the order of the slots: `middle` [slots, INTER] and `entry` [slots, D], where
`sum_over_slots` finds a token's entries by `place`, which the second product writes.

Long because a kernel names all of its arguments, and so does each call of one of its parts.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# NOTE: Gluon's names change with Triton's releases: the first is that of 3.9, the second that of 3.6.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_rows = (
    async_copy.async_load
    if hasattr(async_copy, "async_load")
    else async_copy.async_copy_global_to_shared
)
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

SWIGLU = gl.constexpr(2)
MINUS_SWIGLU_ALPHA = gl.constexpr(-1.702)
TOKEN_BITS = gl.constexpr(24)
TOKEN_MASK = gl.constexpr((1 << 24) - 1)
FILL = gl.constexpr(1024)
LOADING_WARPS = gl.constexpr(4)
LOADING_REGISTERS = gl.constexpr(56)
ALL = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def _tile_of(program, row_tiles, COLUMN_TILES: gl.constexpr, GROUP: gl.constexpr):
    """Row and column tile, as in `triton_kernels`."""
    group = program // (GROUP * COLUMN_TILES)
    first = group * GROUP
    height = gl.minimum(row_tiles - first, GROUP)
    inside = program - group * (GROUP * COLUMN_TILES)
    return first + inside % height, inside // height


@gluon.jit
def _load_tiles(
    source, w, sorted_ids, sorted_expert_ids, place, x_smem, w_smem, up_smem, ready, empty,
    row_tiles, tiles,
    FIRST: gl.constexpr, INNER: gl.constexpr, COLUMNS: gl.constexpr, TOPK: gl.constexpr,
    ROW: gl.constexpr, BY_INNER: gl.constexpr, TWO: gl.constexpr, COLUMN_TILES: gl.constexpr,
    BM: gl.constexpr, WIDTH: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """What the loading warps do."""
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // (BK // 8), BK // 8], [LOADING_WARPS, 1], [1, 0]
    )
    BYTES: gl.constexpr = (2 if TWO else 1) * WIDTH * BK * 2
    inside = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))
    k = gl.arange(0, BK, gl.SliceLayout(0, LAYOUT))
    count = 0
    for each in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row_tile, tile = _tile_of(each, row_tiles, COLUMN_TILES, GROUP)
        rows = row_tile * BM + inside
        ids = gl.load(sorted_ids + rows)
        expert = gl.load(sorted_expert_ids + row_tile)
        slot = (ids >> TOKEN_BITS) & 255
        used = slot < TOPK
        token = gl.where(used, ids & TOKEN_MASK, 0)
        if FIRST:
            from_rows = source + token.to(gl.int64)[:, None] * ROW
        else:
            from_rows = source + rows.to(gl.int64)[:, None] * ROW
            gl.store(place + token * TOPK + slot, rows, mask=used & (tile + inside * 0 == 0))
        from_rows = from_rows + k[None, :]
        mask = used[:, None] & (k < BK)[None, :]
        for start in range(0, INNER, BK):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES) & 1 ^ 1)
            arrived = ready.index(stage)
            mbarrier.expect(arrived, BYTES)
            if BY_INNER:
                first = expert * ((2 if FIRST else 1) * COLUMNS) + tile * WIDTH
                load_box(w, [first, start], arrived, w_smem.index(stage))
                if TWO:
                    load_box(w, [first + COLUMNS, start], arrived, up_smem.index(stage))
            else:
                first = expert * INNER + start
                load_box(w, [first, tile * WIDTH], arrived, w_smem.index(stage))
                if TWO:
                    load_box(w, [first, COLUMNS + tile * WIDTH], arrived, up_smem.index(stage))
            copy_rows(x_smem.index(stage), from_rows + start, mask=mask)
            async_copy.mbarrier_arrive(arrived, increment_count=False)
            count += 1


@gluon.jit
def _gated(gate, up, ACTIVATION: gl.constexpr, LIMIT: gl.constexpr):
    """As in `triton_kernels`."""
    if ACTIVATION == SWIGLU:
        gate = gl.minimum(gate, LIMIT, propagate_nan=ALL)
        up = gl.minimum(up, LIMIT, propagate_nan=ALL)
        up = gl.maximum(up, -LIMIT, propagate_nan=ALL)
        return gate / (1.0 + gl.exp(gate * MINUS_SWIGLU_ALPHA)) * (up + 1.0)
    else:
        return gate / (1.0 + gl.exp(-gate)) * up


@gluon.jit
def _weights_of(smem, stage, BY_INNER: gl.constexpr):
    """A stage's weights as [BK, columns]."""
    if BY_INNER:
        return smem.index(stage).permute((1, 0))
    else:
        return smem.index(stage)


@gluon.jit
def _store_tile(value, to, smem, row, column, BM: gl.constexpr, ROWS: gl.constexpr):
    """Begins to store ROWS rows of a tile; waits for the store before it to have read its own."""
    tma.store_wait(0)
    barrier()
    part = smem
    if ROWS < BM:
        part = part.slice(0, ROWS, dim=0)
    part.store(value)
    fence_async_shared()
    barrier()
    store_box(to, [row, column], smem)


@gluon.jit
def _multiply_tile(
    count, row_tile, tile, bias, sorted_expert_ids, to, x_smem, w_smem, up_smem, out_smem, ready,
    empty,
    FIRST: gl.constexpr, STEPS: gl.constexpr, BIAS_E: gl.constexpr, BIAS_COLUMNS: gl.constexpr,
    HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr, LIMIT: gl.constexpr,
    BY_INNER: gl.constexpr, TWO: gl.constexpr, BM: gl.constexpr, WIDTH: gl.constexpr,
    OUT: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """ROWS rows of a tile; returns the stages that were read so far."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0],
        [8, 1] if ROWS == 128 else [4, 2],
        [16, WIDTH if ROWS == 128 else WIDTH // 2, 16],
    )
    acc = gl.zeros((ROWS, WIDTH), gl.float32, SUMS)
    acc_up = gl.zeros((ROWS, WIDTH if TWO else 1), gl.float32, SUMS)
    for step in range(STEPS):
        stage = count % STAGES
        mbarrier.wait(ready.index(stage), (count // STAGES) & 1)
        fence_async_shared()
        x = x_smem.index(stage)
        if ROWS < BM:
            x = x.slice(0, ROWS, dim=0)
        w = _weights_of(w_smem, stage, BY_INNER)
        acc = warpgroup_mma(x, w, acc, is_async=True)
        if TWO:
            w = _weights_of(up_smem, stage, BY_INNER)
            acc_up = warpgroup_mma(x, w, acc_up, is_async=True)
            acc, acc_up = warpgroup_mma_wait(2, deps=[acc, acc_up])
        else:
            acc = warpgroup_mma_wait(1, deps=[acc])
        # NOTE: what is over now is the step before, so its stage is free.
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1, pred=step > 0)
        count += 1
    if TWO:
        acc, acc_up = warpgroup_mma_wait(0, deps=[acc, acc_up])
    else:
        acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
    dtype: gl.constexpr = to.dtype
    if HAS_BIAS:
        expert = gl.load(sorted_expert_ids + row_tile).to(gl.int64)
        n = tile * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, SUMS))
        row = bias + expert * BIAS_E
        here = gl.load(row + n, mask=n < BIAS_COLUMNS, other=0.0)
        acc += here.to(dtype).to(gl.float32)[None, :]
        if TWO:
            here = gl.load(row + BIAS_COLUMNS + n, mask=n < BIAS_COLUMNS, other=0.0)
            acc_up += here.to(dtype).to(gl.float32)[None, :]
    if FIRST:
        if TWO:
            value = _gated(acc, acc_up, ACTIVATION, LIMIT)
        else:
            gate, up = gl.split(gl.reshape(acc, (ROWS, WIDTH // 2, 2)))
            value = _gated(gate, up, ACTIVATION, LIMIT)
    else:
        value = acc
    _store_tile(value.to(dtype), to, out_smem, row_tile * BM, tile * OUT, BM, ROWS)
    return count


@gluon.jit
def _multiply_tiles(
    bias, sorted_ids, sorted_expert_ids, to, x_smem, w_smem, up_smem, out_smem, ready, empty,
    row_tiles, tiles,
    FIRST: gl.constexpr, STEPS: gl.constexpr, TOPK: gl.constexpr, BIAS_E: gl.constexpr,
    BIAS_COLUMNS: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr, BY_INNER: gl.constexpr, TWO: gl.constexpr, COLUMN_TILES: gl.constexpr,
    BM: gl.constexpr, WIDTH: gl.constexpr, OUT: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """What the multiplying warps do."""
    count = 0
    for each in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row_tile, tile = _tile_of(each, row_tiles, COLUMN_TILES, GROUP)
        if HALVES:
            middle_id = gl.load(sorted_ids + row_tile * BM + BM // 2)
            half = ((middle_id >> TOKEN_BITS) & 255) >= TOPK
        else:
            half: gl.constexpr = False
        if half:
            count = _multiply_tile(
                count, row_tile, tile, bias, sorted_expert_ids, to, x_smem, w_smem, up_smem,
                out_smem, ready, empty, FIRST, STEPS, BIAS_E, BIAS_COLUMNS, HAS_BIAS, ACTIVATION,
                LIMIT, BY_INNER, TWO, BM, WIDTH, OUT, STAGES, BM // 2,
            )  # fmt: skip
        else:
            count = _multiply_tile(
                count, row_tile, tile, bias, sorted_expert_ids, to, x_smem, w_smem, up_smem,
                out_smem, ready, empty, FIRST, STEPS, BIAS_E, BIAS_COLUMNS, HAS_BIAS, ACTIVATION,
                LIMIT, BY_INNER, TWO, BM, WIDTH, OUT, STAGES, BM,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def hopper_product(
    source, w, bias, sorted_ids, sorted_expert_ids, num_valid_ids, to, place, entries,
    FIRST: gl.constexpr, INNER: gl.constexpr, COLUMNS: gl.constexpr, TOPK: gl.constexpr,
    ROW: gl.constexpr, BIAS_E: gl.constexpr, HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr, LIMIT: gl.constexpr, BY_INNER: gl.constexpr, TWO: gl.constexpr,
    COMPLETE: gl.constexpr, BM: gl.constexpr, WIDTH: gl.constexpr, BK: gl.constexpr,
    OUT: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """`middle` of rows of `hidden` (FIRST), or `entry` of rows of `middle`.

    w: descriptor of the weights as [experts * rows, inner] (BY_INNER) or [experts * inner, columns],
    boxes of WIDTH columns; `to`: descriptor of the output, boxes of BM by OUT. COLUMNS: of the output.
    """
    COLUMN_TILES: gl.constexpr = (COLUMNS + OUT - 1) // OUT
    dtype: gl.constexpr = to.dtype
    x_smem = gl.allocate_shared_memory(
        dtype, [STAGES, BM, BK], gl.NVMMASharedLayout(128, 16, 2)
    )  # fmt: skip
    SHAPE: gl.constexpr = [STAGES, WIDTH, BK] if BY_INNER else [STAGES, BK, WIDTH]
    w_smem = gl.allocate_shared_memory(dtype, SHAPE, w.layout)
    if TWO:
        up_smem = gl.allocate_shared_memory(dtype, SHAPE, w.layout)
    else:
        up_smem = w_smem
    out_smem = gl.allocate_shared_memory(dtype, [BM, OUT], to.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=32 * LOADING_WARPS + 1)
        mbarrier.init(empty.index(stage), count=1)
    barrier()
    gdc_wait()
    gdc_launch_dependents()
    if FIRST and not COMPLETE:
        index = gl.arange(0, FILL, gl.BlockedLayout([4], [32], [8], [0]))
        for start in range(gl.program_id(0) * FILL, entries, gl.num_programs(0) * FILL):
            minus = gl.full([FILL], -1, gl.int32, gl.BlockedLayout([4], [32], [8], [0]))
            gl.store(place + start + index, minus, mask=start + index < entries)
    row_tiles = gl.load(num_valid_ids) // BM
    tiles = row_tiles * COLUMN_TILES
    gl.warp_specialize(
        [
            (_multiply_tiles, (
                bias, sorted_ids, sorted_expert_ids, to, x_smem, w_smem, up_smem, out_smem, ready,
                empty, row_tiles, tiles, FIRST, INNER // BK, TOPK, BIAS_E,
                COLUMNS * (2 if FIRST and not TWO else 1), HAS_BIAS, ACTIVATION, LIMIT, BY_INNER, TWO,
                COLUMN_TILES, BM, WIDTH, OUT, GROUP, STAGES, HALVES,
            )),
            (_load_tiles, (
                source, w, sorted_ids, sorted_expert_ids, place, x_smem, w_smem, up_smem, ready,
                empty, row_tiles, tiles, FIRST, INNER, COLUMNS, TOPK, ROW, BY_INNER, TWO,
                COLUMN_TILES, BM, WIDTH, BK, GROUP, STAGES,
            )),
        ],
        [LOADING_WARPS],
        [LOADING_REGISTERS],
    )  # fmt: skip
