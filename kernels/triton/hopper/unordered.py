"""dq, dk and dv of one source by programs that stay, in one pass: five products a block, where
`gradients.py` takes seven.

One warp hands out key tiles, and one fetches. Two warpgroups compute, each half of a tile's keys,
and scores transposed, [keys, queries]; what they find of the slopes they share, and each adds half
of the dims of dq, of all of the tile's keys, to float32 in global memory: in whatever order tiles
come to it, so that results differ in their last bits from run to run. That product is of the block
before: no warpgroup waits for the other, which computes while this one finds slopes.
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.triton.hopper.adding import async_add_shared_to_global
from kernels.triton.hopper.key_tiles import add_segments, unknown_zero
from kernels.triton.hopper.masks import hide_keys, look, masks_for
from kernels.triton.hopper.pipeline import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    PRODUCER_REGISTERS,
    barriers,
    fetch,
    give,
    ring_of,
    room_for,
    take,
    turn,
)
from kernels.triton.hopper.records import HEAD_AT, look_up, next_record, schedule
from kernels.triton.hopper.rows import clear_rows, write
from kernels.triton.hopper.schedule import fetch_tile, hand_out
from kernels.triton.launcher import remembered
from kernels.triton.masked import find_masked, load_masked
from kernels.triton.runs import (
    FULL_RUNS,
    MASKED_RUNS,
    find_block,
    load_rows,
    load_runs,
    load_segment,
    number_at,
)
from kernels.triton.silu import silu_and_twice_slope


@gluon.jit
def _fetch(descs, of_schedule, rings):
    """One warp's: all tiles."""
    k_desc, v_desc, q_desc, dout_desc = descs
    keys, values, queries = rings
    i = 0  # tiles so far
    n = 0  # blocks
    head = look_up(of_schedule[0], i, HEAD_AT)
    while head >= 0:
        fetch((v_desc,), look_up(of_schedule[0], i, 0), head, values, i)
        of_blocks = (((q_desc, dout_desc), queries),)
        n = fetch_tile(of_schedule, i, n, ((k_desc,), keys), of_blocks)
        i += 1
        head = look_up(of_schedule[0], i, HEAD_AT)


@gluon.jit
def _next_tile(records, i, BLOCK: gl.constexpr):
    """What a warpgroup is to know of the i-th tile; of any, behind the last."""
    record = next_record(records, i)
    head = number_at(record, HEAD_AT)
    masked = load_masked(record, MASKED_RUNS, BLOCK)
    full = load_runs(record, 0, FULL_RUNS, BLOCK)
    return head, load_rows(record), masked, full, load_segment(record)


@gluon.jit
def _begin_dq(slopes, n, k, column: gl.constexpr, none):
    """What the n-th block's slopes give for some dims of dq, being computed."""
    of_queries = slopes.index(n % 2).permute([1, 0])
    k_columns = k.slice(column, none.shape[1], dim=1)
    return warpgroup_mma(of_queries, k_columns, none, use_acc=False, is_async=True)


@gluon.jit
def _hand_over(dq, dq_desc, empty, n, row, column, room):
    """Have what the n-th block's slopes gave added to dq. Other slopes may take their place."""
    mbarrier.arrive(empty.index(n % 2), count=1)
    tma.store_wait(0)
    room.store(dq)
    fence_async_shared()  # copies read it
    async_add_shared_to_global(dq_desc, [row, column], room)


@gluon.jit
def _consume(HALF: gl.constexpr, matrices, work, rings, shared, heads):
    """One warpgroup's: half of the keys of each tile, and half of the dims of dq."""
    of_dk, of_dv, sums_k_ptr, sums_v_ptr, done_ptr, dq_desc = matrices
    half_alpha, scale = work
    records, keys, values, queries, masks = rings
    slopes, slopes_full, slopes_empty, room = shared
    TILE: gl.constexpr = keys[0][0].shape[1]
    DIM: gl.constexpr = keys[0][0].shape[2]
    BLOCK: gl.constexpr = queries[0][0].shape[1]
    ROWS: gl.constexpr = TILE // 2
    COLUMNS: gl.constexpr = DIM // 2
    dtype: gl.constexpr = keys[0][0].dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    gl.static_assert(BLOCK >= ROWS and values[0][0].shape[0] == 1)  # as `room` and V are used
    first: gl.constexpr = HALF * ROWS
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, scores_layout)
    none = gl.zeros([BLOCK, COLUMNS], gl.float32, dq_layout)

    i = 0  # tiles so far
    n = 0  # blocks
    m = 0  # masked ones
    tile = _next_tile(records, i, BLOCK)
    while tile[0] >= 0:
        head, rows, of_masked, of_full, of_segment = tile
        masked, second, masked_runs = of_masked
        full, runs = of_full
        at = head * DIM
        dk = gl.zeros([ROWS, DIM], gl.float32, sums_layout)
        dv = gl.zeros([ROWS, DIM], gl.float32, sums_layout)
        k, v = take(keys, i)[0], take(values, i)[0]
        if rows[1] < TILE:  # others' keys, which no interval was tested for, must give dq nothing
            clear_rows(k.slice(first, ROWS), rows[1] - first)
            clear_rows(v.slice(first, ROWS), rows[1] - first)  # nor may 0 times infinity
        start = n
        last_row = rows[0]
        for kind in gl.static_range(2):  # masked ones, then full ones
            for block in range(masked if kind == 0 else full):
                zero = unknown_zero(block)
                k = keys[0][0].index(i % keys[0][0].shape[0] + zero)
                v = values[0][0].index(zero)
                q, dout = take(queries, n)
                q_columns, dout_columns = q.permute([1, 0]), dout.permute([1, 0])
                k_rows, v_rows = k.slice(first, ROWS), v.slice(first, ROWS)
                scores = warpgroup_mma(k_rows, q_columns, zeros, use_acc=False, is_async=True)
                dweights = warpgroup_mma(v_rows, dout_columns, zeros, use_acc=False, is_async=True)
                if kind == 0:
                    row, _end = find_masked(masked_runs, second, block, BLOCK)
                    numbers = look(masks, m, HALF, zeros)
                else:
                    row, _end = find_block(runs, block, BLOCK)
                half_scores = warpgroup_mma_wait(1, deps=[scores]) * half_alpha
                if kind == 0:
                    half_scores = hide_keys(half_scores, numbers)
                weights, slope = silu_and_twice_slope(half_scores, True)
                weights = gl.convert_layout(weights.to(dtype), left_layout)
                dv_sums = warpgroup_mma(weights, dout, dv, is_async=True)
                found = (warpgroup_mma_wait(1, deps=[dweights]) * slope).to(dtype)
                left = gl.convert_layout(found, left_layout)
                dk_sums = warpgroup_mma(left, q, dk, is_async=True)
                mbarrier.wait(slopes_empty.index(n % 2), turn(n, 2) ^ 1)
                slopes.index(n % 2).slice(first, ROWS).store(found)
                fence_async_shared()  # tensor cores read it
                mbarrier.arrive(slopes_full.index(n % 2), count=1)
                # Of the block before; of a tile's first block it is thrown away.
                before = slopes_full.index((n + 1) % 2)
                mbarrier.wait(before, turn(n + 1, 2) ^ 1, pred=n > start)
                product = _begin_dq(slopes, n + 1, k, HALF * COLUMNS, none)
                dv, weights, dk, left = warpgroup_mma_wait(
                    1, deps=[dv_sums, weights, dk_sums, left]
                )
                give(queries, n)
                if kind == 0:
                    give(masks, m)
                    m += 1
                dq = warpgroup_mma_wait(0, deps=[product])
                if n > start:
                    column = at + HALF * COLUMNS
                    _hand_over(dq, dq_desc, slopes_empty, n + 1, last_row, column, room)
                last_row = row
                n += 1
        give(values, i)
        if n > start:
            mbarrier.wait(slopes_full.index((n + 1) % 2), turn(n + 1, 2) ^ 1)
            k = keys[0][0].index(i % keys[0][0].shape[0])
            product = _begin_dq(slopes, n + 1, k, HALF * COLUMNS, none)
            dq = warpgroup_mma_wait(0, deps=[product])
            column = at + HALF * COLUMNS
            _hand_over(dq, dq_desc, slopes_empty, n + 1, last_row, column, room)
        give(keys, i)
        i += 1
        tile = _next_tile(records, i, BLOCK)
        sums = sums_k_ptr, sums_v_ptr
        dk, dv, last = add_segments(dk, dv, sums, of_segment, done_ptr, first, head, heads)
        if last:
            tma.store_wait(0)
            write(of_dk, dk * (scale * half_alpha), rows, first, at, room)
            tma.store_wait(0)
            write(of_dv, dv * scale, rows, first, at, room)
    tma.store_wait(0)


@remembered
@gluon.jit(
    do_not_specialize=["half_alpha", "scale", "early", "heads", "more_tiles"],
    do_not_specialize_on_alignment=["num_tiles_ptr"],
)
def resident_unordered_kernel(
    k_desc,
    v_desc,
    dk_ptr,
    dk_stride,
    dk_desc,
    dv_ptr,
    dv_stride,
    dv_desc,
    sums_k_ptr,
    sums_v_ptr,
    done_ptr,
    dq_desc,
    tiles_ptr,
    num_tiles_ptr,
    more_tiles,
    counters_ptr,
    half_alpha,
    scale,
    q_desc,
    dout_desc,
    bounds_ptr,
    early,
    heads,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dk, dv, and 2 / (scale * alpha) of dq added to zeros, float32. All else of 16 bits.

    Descriptors of k and v have the rows of a tile, those of dk and dv half of them; those of q,
    dout the rows of a block, that of dq half of its dims. One head dim for all. There is
    one buffer for V. Segments of tiles leave their sums as in `kernels.triton.backward`, half a
    tile each time; so done_ptr.
    Grid: any; as many as there are multiprocessors to fill them.
    """
    records, claim = schedule()
    of_schedule = records, claim, early
    keys, values = ring_of((k_desc,), TILES), ring_of((v_desc,), 1)
    queries = ring_of((q_desc, dout_desc), STAGES)
    TILE: gl.constexpr = k_desc.block_type.shape[0]
    BLOCK: gl.constexpr = q_desc.block_type.shape[0]
    masks = masks_for(TILE, BLOCK, STAGES)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, BLOCK], k_desc.dtype)
    slopes = gl.allocate_shared_memory(k_desc.dtype, [2, TILE, BLOCK], layout)
    full, empty = barriers(2, CONSUMERS), barriers(2, CONSUMERS)
    room = room_for(dq_desc, CONSUMERS)
    fence_async_shared()  # barriers are there
    of_dk, of_dv = (dk_ptr, dk_stride, dk_desc, None, 0), (dv_ptr, dv_stride, dv_desc, None, 0)
    matrices = of_dk, of_dv, sums_k_ptr, sums_v_ptr, done_ptr, dq_desc
    work = half_alpha, scale
    to_fill = keys, values, queries
    rings = records, keys, values, queries, masks
    descs = k_desc, v_desc, q_desc, dout_desc
    lists = ((tiles_ptr, num_tiles_ptr, more_tiles),)
    of_upper, of_lower = (slopes, full, empty, room.index(0)), (slopes, full, empty, room.index(1))
    of_masks = bounds_ptr, masks
    gl.warp_specialize(
        [
            (_consume, (0, matrices, work, rings, of_upper, heads)),
            (_consume, (1, matrices, work, rings, of_lower, heads)),
            (_fetch, (descs, of_schedule, to_fill)),
            (hand_out, (lists, counters_ptr, of_schedule, of_masks, BLOCK, heads)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
