"""How are the experts' two products computed from the sorted buffers, in Triton?

With p a slot of the sorted buffers, (e, t, k) and r the expert, token, slot number and weight there:

    middle[p]         = activation(hidden[t] @ w1[e].T + bias1[e])        `first_product`
    entry[t * K + k]  = middle[p] @ w2[e].T + bias2[e]                    `second_product`
    out[t]            = sum over k of r * entry[t * K + k]                `sum_over_slots`

`middle` and `entry` are of the layer's dtype, as the formula of `fused_moe` has it; sums are float32.
A tile of the products is BM slots of one block, so of one expert, by BN columns. Programs past
num_valid_ids return at once, and nothing is read back. Padding rows multiply row 0 of `hidden`, or
whatever `middle` holds, and are not written. Slots fill a block from its front: with HALVES, a tile
whose second half is padding is multiplied as half a tile, and with TAIL a narrow last column tile as
that many columns. The bits are the same, as the order of the sums is.

For one token, where a row of a tile would be one in 16, the same is done without matrix units, over
blocks of one slot (`first_vector`, `second_vector`): every weight is read once, by the whole GPU. The
second one's columns are shared by SPLIT programs, each with the entries of its own; the last to arrive
adds the others' sums, in their order and not in that of arrival, so that the bits do not change.

No float is added atomically. `place[t * K + k]` says in which slot an entry lies, -1 for an entry that
is nowhere (masked, behind num_local_tokens, no expert): the first product writes the -1, the second
the slots. If every entry is known to be there (COMPLETE), nobody writes or asks for a -1.
`triton_hopper` has the products for the largest M on compute capability 9.0; its entries lie by slot
(BY_SLOT), entry[p], and are summed here.

OVERLAP (compute capability 9.0): a launch may start up while the one before it still runs, and waits
by `griddepcontrol.wait` before it touches what that one writes. The first product lets the next launch
begin only once it has itself waited for the routing. So the second product may read what the routing
wrote, and the weights, before it waits: it fetches its first weights into the L2 while the last
programs of the first product are still at work.

How the weights lie in memory is a constexpr. A gated tile has the columns of gate and up side by side,
g0, u0, g1, u1, ..., whichever way the weights have them, because the accumulator's neighbours are in one
thread then; where the rows are dense along the columns and the halves far apart, there are two
tiles (TWO). With DESC, the weights come by tensor descriptors.

Long because a Triton kernel names all of its arguments, and so does each call of one of its parts.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
SWIGLU = tl.constexpr(2)
MINUS_SWIGLU_ALPHA = tl.constexpr(-1.702)
TOKEN_BITS = tl.constexpr(24)
TOKEN_MASK = tl.constexpr((1 << 24) - 1)
FILL = tl.constexpr(1024)
UNROLLED = tl.constexpr(16)  # slots of a token whose loads are all in flight at once
LINE = tl.constexpr(64)  # elements of 16 bits in the 128 bytes that one prefetch fetches


@triton.jit
def _silu_or_gelu(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == SILU:
        return x / (1.0 + tl.exp(-x))
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gated(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr):
    """The activation of float32 gate and up; Swiglu as gpt-oss has it, clamped to LIMIT."""
    if ACTIVATION == SWIGLU:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        return gate / (1.0 + tl.exp(gate * MINUS_SWIGLU_ALPHA)) * (up + 1.0)
    return _silu_or_gelu(gate, ACTIVATION) * up


@triton.jit
def _tile_of(program, row_tiles, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """Row and column tile of a program: GROUP row tiles go through all columns together.

    Neighbouring programs so read the same weights and a few rows, both from the L2.
    """
    group = program // (GROUP * COLUMN_TILES)
    first = group * GROUP
    height = min(row_tiles - first, GROUP)
    inside = program - group * (GROUP * COLUMN_TILES)
    return first + inside % height, inside // height


@triton.jit
def _slots_of(sorted_ids, row_tile, SLOTS: tl.constexpr, TOPK: tl.constexpr, BM: tl.constexpr,
              ROWS: tl.constexpr):  # fmt: skip
    """Block, slots, token, slot number and use of the first ROWS of a row tile's BM rows."""
    TILES: tl.constexpr = (SLOTS + BM - 1) // BM
    block = row_tile // TILES
    inside = (row_tile % TILES) * BM + tl.arange(0, ROWS)
    if SLOTS % BM == 0:
        rows = block * SLOTS + inside
        ids = tl.load(sorted_ids + rows)
        slot = (ids >> TOKEN_BITS) & 255
        used = slot < TOPK
    else:
        rows = block * SLOTS + tl.minimum(inside, SLOTS - 1)
        ids = tl.load(sorted_ids + rows)
        slot = (ids >> TOKEN_BITS) & 255
        used = (slot < TOPK) & (inside < SLOTS)
    token = tl.where(used, ids & TOKEN_MASK, 0)
    return block, rows, token, slot, used


@triton.jit
def _prefetch(w, column, W_K: tl.constexpr, W_N: tl.constexpr, BN: tl.constexpr,
              LINES: tl.constexpr):  # fmt: skip
    """Asks the L2 for the first LINES * BN lines of 128 bytes of BN columns of w, some twice."""
    if W_K == 1:
        lines = (tl.arange(0, LINES) * LINE)[:, None] + (tl.arange(0, BN) * W_N)[None, :]
    else:
        lines = (tl.arange(0, LINES * BN) * W_K)[:, None] + tl.zeros((1, 1), tl.int32)
    address = (w + column * W_N + lines).to(tl.int64, bitcast=True)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _times(x, w, acc, PRECISION: tl.constexpr):
    """acc + x @ w. The interpreter would multiply the bits of bfloat16; it is given float32."""
    if PRECISION == "interpreted":
        return tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit
def _weight_tile(w, k, columns, k_end, column_end, W_K: tl.constexpr, W_N: tl.constexpr,
                 MASK_K: tl.constexpr, MASK_N: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """w[columns, k] as [k, columns]; zero outside."""
    if WIDE:
        k_offsets, n_offsets = k.to(tl.int64) * W_K, columns.to(tl.int64) * W_N
    else:
        k_offsets, n_offsets = k * W_K, columns * W_N
    pointers = w + k_offsets[:, None] + n_offsets[None, :]
    if MASK_K and MASK_N:
        mask = (k < k_end)[:, None] & (columns < column_end)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    if MASK_K:
        return tl.load(pointers, mask=(k < k_end)[:, None], other=0.0)
    if MASK_N:
        return tl.load(pointers, mask=(columns < column_end)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _desc_tile(w, expert, k, column, W_K: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH columns from `column` on and BK of the inner dimension, as [BK, WIDTH]."""
    if W_K == 1:
        return w.load([expert, column, k]).reshape(WIDTH, BK).T
    return w.load([expert, k, column]).reshape(BK, WIDTH)


@triton.jit
def _row_tile(pointers, k, k_end, STRIDE: tl.constexpr, MASK_K: tl.constexpr):
    if MASK_K:
        return tl.load(pointers + (k * STRIDE)[None, :], mask=(k < k_end)[None, :], other=0.0)
    return tl.load(pointers + (k * STRIDE)[None, :])


@triton.jit
def _columns_of(column, INTER: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
                BN: tl.constexpr):  # fmt: skip
    """The rows of w1 behind BN columns from `column` on: gate and up take turns if GATED.

    Clamped, as a column past the end is not written.
    """
    if not GATED:
        columns = column + tl.arange(0, BN)
        if INTER % BN != 0:
            columns = tl.minimum(columns, INTER - 1)
    elif INTERLEAVED:
        columns = column * 2 + tl.arange(0, 2 * BN)
        if INTER % BN != 0:
            columns = tl.minimum(columns, 2 * INTER - 1)
    else:
        pair = tl.arange(0, 2 * BN)
        columns = column + pair // 2
        if INTER % BN != 0:
            columns = tl.minimum(columns, INTER - 1)
        columns = columns + (pair % 2) * INTER
    return columns


@triton.jit
def _split_pairs(x, BM: tl.constexpr, BN: tl.constexpr):
    return tl.split(tl.reshape(x, (BM, BN, 2)))


@triton.jit
def _half_is_enough(sorted_ids, row_tile, SLOTS: tl.constexpr, TOPK: tl.constexpr,
                    BM: tl.constexpr):  # fmt: skip
    """Whether the second half of a row tile is padding. Slots fill a block from its front.

    Looks at all ids, so that they are in the L1 when the tile reads them.
    """
    block, rows, token, slot, used = _slots_of(sorted_ids, row_tile, SLOTS, TOPK, BM, BM)
    return tl.sum(used.to(tl.int32)) <= BM // 2


@triton.jit
def _first_tile(
    row_tile, column,
    hidden, w1, bias1, sorted_ids, sorted_weights, sorted_expert_ids, middle,
    D: tl.constexpr, INTER: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr,
    HIDDEN_ROW: tl.constexpr, HIDDEN_COLUMN: tl.constexpr,
    W_E: tl.constexpr, W_N: tl.constexpr, W_K: tl.constexpr, WIDE: tl.constexpr,
    BIAS_E: tl.constexpr, BIAS_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr, TWO: tl.constexpr, DESC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The first ROWS rows of a row tile, BN columns from `column` on, of `first_product`."""
    block, rows, token, slot, used = _slots_of(sorted_ids, row_tile, SLOTS, TOPK, BM, ROWS)
    expert = tl.load(sorted_expert_ids + block)
    WIDTH: tl.constexpr = 2 * BN if GATED and not TWO else BN
    MASK_K: tl.constexpr = D % BK != 0
    MASK_N: tl.constexpr = INTER % BN != 0
    from_rows = hidden + token.to(tl.int64)[:, None] * HIDDEN_ROW
    n = column + tl.arange(0, BN)
    columns = n if TWO else _columns_of(column, INTER, GATED, INTERLEAVED, BN)
    w = w1 if DESC else w1 + expert.to(tl.int64) * W_E
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    acc_up = tl.zeros((ROWS, BN if TWO else 1), tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        x = _row_tile(from_rows, k, D, HIDDEN_COLUMN, MASK_K)
        if DESC:
            part = _desc_tile(w, expert, start, column * (WIDTH // BN), W_K, BK, WIDTH)
            acc = _times(x, part, acc, PRECISION)
            if TWO:
                part = _desc_tile(w, expert, start, INTER + column, W_K, BK, BN)
                acc_up = _times(x, part, acc_up, PRECISION)
        else:
            part = _weight_tile(w, k, columns, D, INTER, W_K, W_N, MASK_K, MASK_N and TWO, WIDE)
            acc = _times(x, part, acc, PRECISION)
            if TWO:
                part = _weight_tile(w, k, INTER + n, D, 2 * INTER, W_K, W_N, MASK_K, MASK_N, WIDE)
                acc_up = _times(x, part, acc_up, PRECISION)
    if WEIGHT_FIRST:
        weight = tl.load(sorted_weights + rows, mask=used, other=0.0)[:, None]
        acc *= weight
        acc_up *= weight
    dtype = middle.dtype.element_ty
    if HAS_BIAS:
        bias = bias1 + expert.to(tl.int64) * BIAS_E
        if TWO:
            here = n < INTER
            acc += tl.load(bias + n * BIAS_N, mask=here, other=0.0).to(dtype).to(tl.float32)
            up_bias = tl.load(bias + (INTER + n) * BIAS_N, mask=here, other=0.0)
            acc_up += up_bias.to(dtype).to(tl.float32)
        else:
            acc += tl.load(bias + columns * BIAS_N).to(dtype).to(tl.float32)[None, :]
    if TWO:
        value = _gated(acc, acc_up, ACTIVATION, LIMIT)
    elif GATED:
        gate, up = _split_pairs(acc, ROWS, BN)
        value = _gated(gate, up, ACTIVATION, LIMIT)
    else:
        value = _silu_or_gelu(acc, ACTIVATION)
    to = middle + rows.to(tl.int64)[:, None] * INTER + n[None, :]
    written = used[:, None] & (n < INTER)[None, :] if MASK_N else used[:, None]
    tl.store(to, value.to(dtype), mask=written)


@triton.jit
def first_product(
    hidden, w1, bias1, sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids,
    middle, place, entries,
    D: tl.constexpr, INTER: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr,
    HIDDEN_ROW: tl.constexpr, HIDDEN_COLUMN: tl.constexpr,
    W_E: tl.constexpr, W_N: tl.constexpr, W_K: tl.constexpr, WIDE: tl.constexpr,
    BIAS_E: tl.constexpr, BIAS_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr, COMPLETE: tl.constexpr,
    TWO: tl.constexpr, DESC: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """middle [slots, INTER] of hidden [M, D], in tiles of BM slots by BN columns.

    A program does one tile; if PERSISTENT, it does every num_programs-th.
    """
    program = tl.program_id(0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    if not COMPLETE:
        for start in range(program * FILL, entries, tl.num_programs(0) * FILL):
            index = start + tl.arange(0, FILL)
            tl.store(place + index, tl.full((FILL,), -1, tl.int32), mask=index < entries)
    row_tiles = tl.load(num_valid_ids) // SLOTS * ((SLOTS + BM - 1) // BM)
    COLUMN_TILES: tl.constexpr = (INTER + BN - 1) // BN
    tiles = row_tiles * COLUMN_TILES
    if PERSISTENT:
        for each in tl.range(program, tiles, tl.num_programs(0), flatten=True):
            row_tile, tile = _tile_of(each, row_tiles, COLUMN_TILES, GROUP)
            _first_tile(
                row_tile, tile * BN, hidden, w1, bias1, sorted_ids, sorted_weights, sorted_expert_ids,
                middle, D, INTER, TOPK, SLOTS, HIDDEN_ROW, HIDDEN_COLUMN, W_E, W_N, W_K, WIDE,
                BIAS_E, BIAS_N, HAS_BIAS, GATED, INTERLEAVED, ACTIVATION, LIMIT, WEIGHT_FIRST, TWO, DESC,
                PRECISION, BM, BM, BN, BK,
            )  # fmt: skip
    elif program < tiles:
        row_tile, tile = _tile_of(program, row_tiles, COLUMN_TILES, GROUP)
        if HALVES:
            half = _half_is_enough(sorted_ids, row_tile, SLOTS, TOPK, BM)
        else:
            half: tl.constexpr = False
        if half:
            _first_tile(
                row_tile, tile * BN, hidden, w1, bias1, sorted_ids, sorted_weights,
                sorted_expert_ids, middle, D, INTER, TOPK, SLOTS, HIDDEN_ROW, HIDDEN_COLUMN, W_E,
                W_N, W_K, WIDE, BIAS_E, BIAS_N, HAS_BIAS, GATED, INTERLEAVED, ACTIVATION, LIMIT,
                WEIGHT_FIRST, TWO, DESC, PRECISION, BM, BM // 2, BN, BK,
            )  # fmt: skip
        else:
            _first_tile(
                row_tile, tile * BN, hidden, w1, bias1, sorted_ids, sorted_weights,
                sorted_expert_ids, middle, D, INTER, TOPK, SLOTS, HIDDEN_ROW, HIDDEN_COLUMN, W_E,
                W_N, W_K, WIDE, BIAS_E, BIAS_N, HAS_BIAS, GATED, INTERLEAVED, ACTIVATION, LIMIT,
                WEIGHT_FIRST, TWO, DESC, PRECISION, BM, BM, BN, BK,
            )  # fmt: skip


@triton.jit
def _second_tile(
    row_tile, column,
    middle, w2, bias2, sorted_ids, sorted_expert_ids, entry, place,
    D: tl.constexpr, INTER: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr,
    W_E: tl.constexpr, W_N: tl.constexpr, W_K: tl.constexpr, WIDE: tl.constexpr,
    BIAS_E: tl.constexpr, BIAS_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    DESC: tl.constexpr, WAIT: tl.constexpr, PREFETCH: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The first ROWS rows of a row tile, BN columns from `column` on, of `second_product`.

    WAIT: for the first product, before anything of it is read.
    """
    block, rows, token, slot, used = _slots_of(sorted_ids, row_tile, SLOTS, TOPK, BM, ROWS)
    expert = tl.load(sorted_expert_ids + block)
    MASK_K: tl.constexpr = INTER % BK != 0
    MASK_N: tl.constexpr = D % BN != 0
    n = column + tl.arange(0, BN)
    w = w2 if DESC else w2 + expert.to(tl.int64) * W_E
    if PREFETCH and not DESC:
        _prefetch(w, column, W_K, W_N, BN, PREFETCH)
    if WAIT:
        gdc_wait()
        gdc_launch_dependents()
    from_rows = middle + rows.to(tl.int64)[:, None] * INTER
    acc = tl.zeros((ROWS, BN), tl.float32)
    for start in range(0, INTER, BK):
        k = start + tl.arange(0, BK)
        x = _row_tile(from_rows, k, INTER, 1, MASK_K)
        if DESC:
            part = _desc_tile(w, expert, start, column, W_K, BK, BN)
        else:
            part = _weight_tile(w, k, n, INTER, D, W_K, W_N, MASK_K, MASK_N, WIDE)
        acc = _times(x, part, acc, PRECISION)
    dtype = entry.dtype.element_ty
    if HAS_BIAS:
        bias = bias2 + expert.to(tl.int64) * BIAS_E
        acc += tl.load(bias + n * BIAS_N, mask=n < D, other=0.0).to(dtype).to(tl.float32)[None, :]
    row = token.to(tl.int64) * TOPK + slot
    written = used[:, None] & (n < D)[None, :] if MASK_N else used[:, None]
    tl.store(entry + row[:, None] * D + n[None, :], acc.to(dtype), mask=written)
    # NOTE: a mask and no branch, as a loop over tiles is not flattened around a branch.
    tl.store(place + row, rows, mask=used & (column + tl.zeros_like(rows) == 0))


@triton.jit
def second_product(
    middle, w2, bias2, sorted_ids, sorted_expert_ids, num_valid_ids, entry, place,
    D: tl.constexpr, INTER: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr,
    W_E: tl.constexpr, W_N: tl.constexpr, W_K: tl.constexpr, WIDE: tl.constexpr,
    BIAS_E: tl.constexpr, BIAS_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    DESC: tl.constexpr, OVERLAP: tl.constexpr, PREFETCH: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr, HALVES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """entry [M * K, D] of middle [slots, INTER], in tiles of BM slots by BN columns, as above."""
    program = tl.program_id(0)
    row_tiles = tl.load(num_valid_ids) // SLOTS * ((SLOTS + BM - 1) // BM)
    COLUMN_TILES: tl.constexpr = (D + BN - 1) // BN
    tiles = row_tiles * COLUMN_TILES
    if PERSISTENT:
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
        for each in tl.range(program, tiles, tl.num_programs(0), flatten=True):
            row_tile, tile = _tile_of(each, row_tiles, COLUMN_TILES, GROUP)
            _second_tile(
                row_tile, tile * BN, middle, w2, bias2, sorted_ids, sorted_expert_ids, entry, place,
                D, INTER, TOPK, SLOTS, W_E, W_N, W_K, WIDE, BIAS_E, BIAS_N, HAS_BIAS,
                DESC, False, 0, PRECISION, BM, BM, BN, BK,
            )  # fmt: skip
    elif program < tiles:
        row_tile, tile = _tile_of(program, row_tiles, COLUMN_TILES, GROUP)
        if TAIL:
            tail = tile == COLUMN_TILES - 1
        else:
            tail: tl.constexpr = False
        if HALVES:
            half = _half_is_enough(sorted_ids, row_tile, SLOTS, TOPK, BM)
        else:
            half: tl.constexpr = False
        if tail:
            _second_tile(
                row_tile, tile * BN, middle, w2, bias2, sorted_ids, sorted_expert_ids, entry, place,
                D, INTER, TOPK, SLOTS, W_E, W_N, W_K, WIDE, BIAS_E, BIAS_N, HAS_BIAS,
                DESC, OVERLAP, 0, PRECISION, BM, BM, TAIL, BK,
            )  # fmt: skip
        elif half:
            _second_tile(
                row_tile, tile * BN, middle, w2, bias2, sorted_ids, sorted_expert_ids, entry, place,
                D, INTER, TOPK, SLOTS, W_E, W_N, W_K, WIDE, BIAS_E, BIAS_N, HAS_BIAS,
                DESC, OVERLAP, 0, PRECISION, BM, BM // 2, BN, BK,
            )  # fmt: skip
        else:
            _second_tile(
                row_tile, tile * BN, middle, w2, bias2, sorted_ids, sorted_expert_ids, entry, place,
                D, INTER, TOPK, SLOTS, W_E, W_N, W_K, WIDE, BIAS_E, BIAS_N, HAS_BIAS,
                DESC, OVERLAP, PREFETCH, PRECISION, BM, BM, BN, BK,
            )  # fmt: skip
    elif OVERLAP:
        # NOTE: waits all the same, as a launch that is over has to mean that those before it are.
        gdc_wait()


@triton.jit
def _weighted(entry, place, sorted_weights, row, n, D: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
              COMPLETE: tl.constexpr, BY_SLOT: tl.constexpr):  # fmt: skip
    """Entry `row`, which lies in its slot if BY_SLOT, in float32, weighted; zero if it is nowhere."""
    slot = tl.load(place + row)
    if BY_SLOT:
        row = slot.to(tl.int64)
    here = n < D
    if not COMPLETE:
        here = (n < D) & (slot + tl.zeros_like(n) >= 0)
    value = tl.load(entry + row * D + n, mask=here, other=0.0).to(tl.float32)
    if WEIGHT_FIRST:
        return value
    if COMPLETE:
        return value * tl.load(sorted_weights + slot)
    weight = tl.load(sorted_weights + tl.maximum(slot, 0))
    return tl.where(here, value * weight, 0.0)


@triton.jit
def sum_over_slots(
    entry, place, sorted_weights, out,
    D: tl.constexpr, TOPK: tl.constexpr, WEIGHT_FIRST: tl.constexpr, COMPLETE: tl.constexpr,
    BY_SLOT: tl.constexpr, OVERLAP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [M, D]; a program is BN columns of one token."""
    COLUMN_TILES: tl.constexpr = (D + BN - 1) // BN
    program = tl.program_id(0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    token = program // COLUMN_TILES
    n = (program % COLUMN_TILES) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    first = token.to(tl.int64) * TOPK
    if TOPK <= UNROLLED:
        for k in tl.static_range(TOPK):
            acc += _weighted(
                entry, place, sorted_weights, first + k, n, D, WEIGHT_FIRST, COMPLETE, BY_SLOT
            )  # fmt: skip
    else:
        for k in range(TOPK):
            acc += _weighted(
                entry, place, sorted_weights, first + k, n, D, WEIGHT_FIRST, COMPLETE, BY_SLOT
            )  # fmt: skip
    tl.store(out + token.to(tl.int64) * D + n, acc.to(out.dtype.element_ty), mask=n < D)


@triton.jit
def first_vector(
    hidden, w1, bias1, sorted_weights, sorted_expert_ids, num_valid_ids, middle, arrived,
    D: tl.constexpr, INTER: tl.constexpr, HIDDEN_COLUMN: tl.constexpr,
    W_E: tl.constexpr, W_N: tl.constexpr, W_K: tl.constexpr, WIDE: tl.constexpr,
    BIAS_E: tl.constexpr, BIAS_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr, TWO: tl.constexpr, OVERLAP: tl.constexpr,
    COUNTERS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """middle [K, INTER] of one token, sorted in blocks of one slot; a program is BN columns of one.

    Programs of the first slot zero `arrived`, for the second product.
    """
    COLUMN_TILES: tl.constexpr = (INTER + BN - 1) // BN
    program = tl.program_id(0)
    slot, tile = program // COLUMN_TILES, program % COLUMN_TILES
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    if program == 0 and COUNTERS:
        index = tl.arange(0, triton.next_power_of_2(COUNTERS))
        tl.store(arrived + index, tl.zeros_like(index), mask=index < COUNTERS)
    if slot >= tl.load(num_valid_ids):
        return
    expert = tl.load(sorted_expert_ids + slot).to(tl.int64)
    w1 += expert * W_E
    WIDTH: tl.constexpr = 2 * BN if GATED and not TWO else BN
    n = tile * BN + tl.arange(0, BN)
    MASK_N: tl.constexpr = INTER % BN != 0
    columns = n if TWO else _columns_of(tile * BN, INTER, GATED, INTERLEAVED, BN)
    MASK_K: tl.constexpr = D % BK != 0
    acc = tl.zeros((BK, WIDTH), tl.float32)
    acc_up = tl.zeros((BK, BN if TWO else 1), tl.float32)
    for start in tl.range(0, D, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        x = tl.load(hidden + k * HIDDEN_COLUMN, mask=k < D, other=0.0).to(tl.float32)[:, None]
        w = _weight_tile(w1, k, columns, D, INTER, W_K, W_N, MASK_K, MASK_N and TWO, WIDE)
        acc += x * w.to(tl.float32)
        if TWO:
            w = _weight_tile(w1, k, INTER + n, D, 2 * INTER, W_K, W_N, MASK_K, MASK_N, WIDE)
            acc_up += x * w.to(tl.float32)
    total = tl.sum(acc, 0)
    total_up = tl.sum(acc_up, 0)
    if WEIGHT_FIRST:
        weight = tl.load(sorted_weights + slot)
        total *= weight
        total_up *= weight
    dtype = middle.dtype.element_ty
    if HAS_BIAS:
        bias1 += expert * BIAS_E
        if TWO:
            total += tl.load(bias1 + n * BIAS_N, mask=n < INTER, other=0.0).to(dtype).to(tl.float32)
            up_bias = tl.load(bias1 + (INTER + n) * BIAS_N, mask=n < INTER, other=0.0)
            total_up += up_bias.to(dtype).to(tl.float32)
        else:
            total += tl.load(bias1 + columns * BIAS_N).to(dtype).to(tl.float32)
    if TWO:
        value = _gated(total, total_up, ACTIVATION, LIMIT)
    elif GATED:
        gate, up = tl.split(tl.reshape(total, (BN, 2)))
        value = _gated(gate, up, ACTIVATION, LIMIT)
    else:
        value = _silu_or_gelu(total, ACTIVATION)
    tl.store(middle + slot * INTER + n, value.to(dtype), mask=n < INTER)


@triton.jit
def second_vector(
    middle, w2, bias2, sorted_weights, sorted_expert_ids, num_valid_ids, part, arrived, out,
    D: tl.constexpr, INTER: tl.constexpr,
    W_E: tl.constexpr, W_N: tl.constexpr, W_K: tl.constexpr, WIDE: tl.constexpr,
    BIAS_E: tl.constexpr, BIAS_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr, OVERLAP: tl.constexpr, PREFETCH: tl.constexpr,
    SPLIT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [1, D] of middle [K, INTER]; SPLIT programs share BN columns, each takes every SPLIT-th slot.

    part: float32 [SPLIT, D]; arrived: int32 [column tiles], zero.
    """
    COLUMN_TILES: tl.constexpr = (D + BN - 1) // BN
    program = tl.program_id(0)
    share, tile = program // COLUMN_TILES, program % COLUMN_TILES
    n = tile * BN + tl.arange(0, BN)
    slots = tl.load(num_valid_ids)
    MASK_K: tl.constexpr = INTER % BK != 0
    MASK_N: tl.constexpr = D % BN != 0
    if PREFETCH:
        if share < slots:
            first = w2 + tl.load(sorted_expert_ids + share).to(tl.int64) * W_E
            _prefetch(first, tile * BN, W_K, W_N, BN, PREFETCH)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((BK, BN), tl.float32)
    bias = tl.zeros((BN,), tl.float32)
    for slot in range(share, slots, SPLIT):
        expert = tl.load(sorted_expert_ids + slot).to(tl.int64)
        weight = 1.0
        if not WEIGHT_FIRST:
            weight = tl.load(sorted_weights + slot)
        of_expert = w2 + expert * W_E
        for start in tl.range(0, INTER, BK, num_stages=STAGES):
            k = start + tl.arange(0, BK)
            x = tl.load(middle + slot * INTER + k, mask=k < INTER, other=0.0).to(tl.float32)
            w = _weight_tile(of_expert, k, n, INTER, D, W_K, W_N, MASK_K, MASK_N, WIDE)
            acc += (x * weight)[:, None] * w.to(tl.float32)
        if HAS_BIAS:
            here = tl.load(bias2 + expert * BIAS_E + n * BIAS_N, mask=n < D, other=0.0)
            bias += here.to(middle.dtype.element_ty).to(tl.float32) * weight
    total = tl.sum(acc, 0) + bias
    if SPLIT > 1:
        tl.store(part + share * D + n, total, mask=n < D)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
        if before != SPLIT - 1:
            return
        total = tl.zeros((BN,), tl.float32)
        for other in range(SPLIT):
            total += tl.load(part + other * D + n, mask=n < D, other=0.0, cache_modifier=".cg")
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < D)
