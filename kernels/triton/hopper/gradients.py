"""dq, dk and dv of one source by programs that stay: the sums of `kernels.triton.backward`.

Tiles are of keys, for dk and dv, or of queries, for dq. What is fetched is alike: a tile of rows of
k and v meets blocks of q and dout, or the other way round. So is what is multiplied, but that dk
and dv take four products a block, with scores transposed, [keys, queries], and dq three.

One warp hands out tiles, of both kinds in turn if a launch has both, and one fetches. Two
warpgroups compute, each half of a tile's rows. A warpgroup waits for its products; meanwhile the
tensor cores have those of the other.
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc"
from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.triton.halves import unseen_by
from kernels.triton.hopper.key_tiles import add_segments, unknown_zero
from kernels.triton.hopper.masks import hide_keys, look, masks_for
from kernels.triton.hopper.pipeline import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    PRODUCER_REGISTERS,
    give,
    ring_of,
    skip,
    take,
)
from kernels.triton.hopper.records import HEAD_AT, LIST_AT, look_up, next_record, schedule
from kernels.triton.hopper.rows import hide, load_bounds, load_riders, write
from kernels.triton.hopper.schedule import fetch_tile, hand_out
from kernels.triton.launcher import remembered
from kernels.triton.masked import find_masked, load_masked
from kernels.triton.runs import (
    FULL_RUNS,
    MASKED_RUNS,
    load_rows,
    load_runs,
    load_segment,
    number_at,
)
from kernels.triton.silu import silu_and_twice_slope


@gluon.jit
def _fetch(descs, of_schedule, rings):
    """One warp's: all tiles, half of their rows into one ring and half into another."""
    of_queries, of_keys, pieces = descs
    upper, lower, blocks = rings
    i = 0  # tiles so far
    n = 0  # blocks
    head = look_up(of_schedule[0], i, HEAD_AT)
    while head >= 0:
        if look_up(of_schedule[0], i, LIST_AT) == 0:
            of_rows, of_blocks = (of_queries, upper, lower), ((of_keys, blocks),)
            n = fetch_tile(of_schedule, i, n, of_rows, of_blocks)
        else:
            of_rows, of_blocks = (of_keys, upper, lower), ((of_queries, blocks),)
            n = fetch_tile(of_schedule, i, n, of_rows, of_blocks, pieces=pieces)
        i += 1
        head = look_up(of_schedule[0], i, HEAD_AT)


@gluon.jit
def _next_tile(
    records, i, bounds_ptr, HALF: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """What a warpgroup is to know of the i-th tile; of any, behind the last."""
    record = next_record(records, i)
    head, of_keys = number_at(record, HEAD_AT), number_at(record, LIST_AT)
    row0, own, rider0, count = load_rows(record)
    rows = row0, own, rider0, gl.where(of_keys > 0, own, count)  # riders of keys are queries
    wanted = row0, own, rider0, gl.where(of_keys > 0, 0, count)
    of_rows = load_bounds(bounds_ptr, wanted, HALF * ROWS, ROWS, layout)
    masked = load_masked(record, MASKED_RUNS, BLOCK)
    full, _runs = load_runs(record, 0, FULL_RUNS, BLOCK)
    seen = masked, full, unseen_by(record, HALF)
    return head, of_keys, rows, of_rows, seen, load_segment(record)


@gluon.jit
def _begin(tiles, i, blocks, n, block, zeros):
    """The n-th block's (c, d), and, being computed, the products a c^T and b d^T with the i-th
    tile's (a, b). block: which of the tile's blocks it is."""
    TILES: gl.constexpr = tiles[0][0].shape[0]
    zero = unknown_zero(block)
    a, b = tiles[0][0].index(i % TILES + zero), tiles[0][1].index(i % TILES + zero)
    c, d = take(blocks, n)
    c_columns, d_columns = c.permute([1, 0]), d.permute([1, 0])
    scores = warpgroup_mma(a, c_columns, zeros, use_acc=False, is_async=True)
    dweights = warpgroup_mma(b, d_columns, zeros, use_acc=False, is_async=True)
    return c, d, scores, dweights


@gluon.jit
def _give_before(tiles, i, owes):
    """If it is owed, give away the buffers of the tile before the i-th, once its results are copied
    from there: if there are more, not before products run. Returns what is owed now."""
    tma.store_wait(0)
    give(tiles, i - 1, owes)
    return owes & False


@gluon.jit
def _consume(HALF: gl.constexpr, matrices, work, rings, heads):
    """One warpgroup's: half of the rows of each tile, from whose buffers results are copied."""
    of_q, of_dout, of_dq, of_dk, of_dv, sums_k_ptr, sums_v_ptr, done_ptr = matrices
    half_alpha, scale, bounds_ptr = work
    records, tiles, blocks, masks = rings
    ROWS: gl.constexpr = tiles[0][0].shape[1]
    QK_DIM: gl.constexpr = tiles[0][0].shape[2]
    V_DIM: gl.constexpr = tiles[0][1].shape[2]
    BLOCK: gl.constexpr = blocks[0][0].shape[1]
    TILES: gl.constexpr = tiles[0][0].shape[0]
    dtype: gl.constexpr = tiles[0][0].dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    qk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QK_DIM, 16])
    v_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_DIM, 16])
    slopes_layout: gl.constexpr = gl.DotOperandLayout(0, qk_layout, 2)
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, v_layout, 2)
    bounds_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    first: gl.constexpr = HALF * ROWS
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, scores_layout)
    i = 0  # tiles so far
    n = 0  # blocks
    m = 0  # masks
    tile = _next_tile(records, i, bounds_ptr, HALF, ROWS, BLOCK, bounds_layout)
    while tile[0] >= 0:
        head, of_keys, rows, of_rows, seen, of_segment = tile
        of_masked, full, unseen = seen
        masked, second, masked_runs = of_masked
        at, v_at = head * QK_DIM, head * V_DIM
        owes = i > 0
        if TILES == 1:
            owes = _give_before(tiles, i, owes)
        of_tile = take(tiles, i)
        if of_keys == 0:
            low1, high1, low2, high2 = of_rows
            if rows[1] < rows[3]:
                load_riders(of_tile[0], of_q[0], of_q[1], rows, first, at)
                load_riders(of_tile[1], of_dout[0], of_dout[1], rows, first, v_at)
            dq = gl.zeros([ROWS, QK_DIM], gl.float32, qk_layout)
            for kind in gl.static_range(2):  # masked blocks, then full ones
                block = 0
                if kind == 1:
                    owes = _give_before(tiles, i, owes)
                if kind == 0:
                    block = skip(unseen, block, ((blocks, n),))
                while block < (masked if kind == 0 else full):
                    at_block = n + block if kind == 0 else n + masked + block
                    k, _v, scores, dweights = _begin(tiles, i, blocks, at_block, block, zeros)
                    if kind == 0:
                        owes = _give_before(tiles, i, owes)
                    half_scores = warpgroup_mma_wait(1, deps=[scores]) * half_alpha
                    if kind == 0:
                        row, _end = find_masked(masked_runs, second, block, BLOCK)
                        low = gl.where(block < second, low2, low1)
                        high = gl.where(block < second, high2, high1)
                        half_scores = hide(half_scores, row, low, high)
                    _weights, slope = silu_and_twice_slope(half_scores, True)
                    slopes = (warpgroup_mma_wait(0, deps=[dweights]) * slope).to(dtype)
                    slopes = gl.convert_layout(slopes, slopes_layout)
                    sums = warpgroup_mma(slopes, k, dq, is_async=True)
                    dq, slopes = warpgroup_mma_wait(0, deps=[sums, slopes])
                    give(blocks, at_block)
                    block += 1
                    if kind == 0:
                        block = skip(unseen, block, ((blocks, n),))
            i += 1
            n += masked + full
            tile = _next_tile(records, i, bounds_ptr, HALF, ROWS, BLOCK, bounds_layout)
            write(of_dq, dq * (scale * half_alpha), rows, first, at, of_tile[0])
        else:
            dk = gl.zeros([ROWS, QK_DIM], gl.float32, qk_layout)
            dv = gl.zeros([ROWS, V_DIM], gl.float32, v_layout)
            for kind in gl.static_range(2):
                block = 0
                if kind == 1:
                    owes = _give_before(tiles, i, owes)
                if kind == 0:
                    block = skip(unseen, block, ((blocks, n), (masks, m)))
                while block < (masked if kind == 0 else full):
                    at_block = n + block if kind == 0 else n + masked + block
                    q, dout, scores, dweights = _begin(tiles, i, blocks, at_block, block, zeros)
                    if kind == 0:
                        owes = _give_before(tiles, i, owes)
                        numbers = look(masks, m + block, HALF, zeros)
                    half_scores = warpgroup_mma_wait(1, deps=[scores]) * half_alpha
                    if kind == 0:
                        half_scores = hide_keys(half_scores, numbers)
                    weights, slope = silu_and_twice_slope(half_scores, True)
                    weights = gl.convert_layout(weights.to(dtype), weights_layout)
                    dv_sums = warpgroup_mma(weights, dout, dv, is_async=True)
                    slopes = (warpgroup_mma_wait(1, deps=[dweights]) * slope).to(dtype)
                    slopes = gl.convert_layout(slopes, slopes_layout)
                    dk_sums = warpgroup_mma(slopes, q, dk, is_async=True)
                    dv, weights, dk, slopes = warpgroup_mma_wait(
                        0, deps=[dv_sums, weights, dk_sums, slopes]
                    )
                    give(blocks, at_block)
                    if kind == 0:
                        give(masks, m + block)
                    block += 1
                    if kind == 0:
                        block = skip(unseen, block, ((blocks, n), (masks, m)))
            m += masked
            i += 1
            n += masked + full
            tile = _next_tile(records, i, bounds_ptr, HALF, ROWS, BLOCK, bounds_layout)
            sums = sums_k_ptr, sums_v_ptr
            dk, dv, last = add_segments(dk, dv, sums, of_segment, done_ptr, first, head, heads)
            if last:
                write(of_dk, dk * (scale * half_alpha), rows, first, at, of_tile[0])
                write(of_dv, dv * scale, rows, first, v_at, of_tile[1])
        tl.debug_barrier()  # here, not in the loops that read other tiles' rows
    tma.store_wait(0)


@remembered
@gluon.jit(
    do_not_specialize=["half_alpha", "scale", "early", "heads", "more_key_tiles"],
    do_not_specialize_on_alignment=["num_query_tiles_ptr", "num_key_tiles_ptr"],
)
def resident_gradients_kernel(
    q_desc,
    q_pieces_desc,
    q_ptr,
    q_stride,
    dout_desc,
    dout_pieces_desc,
    dout_ptr,
    dout_stride,
    k_desc,
    v_desc,
    add_q_ptr,
    add_q_stride,
    add_k_ptr,
    add_k_stride,
    add_v_ptr,
    add_v_stride,
    dq_ptr,
    dq_stride,
    dq_desc,
    dk_ptr,
    dk_stride,
    dk_desc,
    dv_ptr,
    dv_stride,
    dv_desc,
    sums_k_ptr,
    sums_v_ptr,
    done_ptr,
    query_tiles_ptr,
    num_query_tiles_ptr,
    key_tiles_ptr,
    num_key_tiles_ptr,
    more_key_tiles,
    counters_ptr,
    half_alpha,
    scale,
    bounds_ptr,
    early,
    heads,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dq, dk and dv, each plus another if wanted; of tiles of queries alone, or of keys alone, if
    there are none of the others. 16-bit q, dout, k, v.

    All descriptors are of half of a tile's rows, or as many of a block, but for those of pieces
    of blocks, of as many columns as are swizzled together; those of outputs are None if one is not
    of 16 bits, or has rows that cannot be copied. Segments of key tiles leave their sums
    as in `kernels.triton.backward`, half a tile each time; so done_ptr.
    Grid: any; as many as there are multiprocessors to fill them.
    """
    BLOCK: gl.constexpr = q_desc.block_type.shape[0]
    records, claim = schedule()
    of_schedule = records, claim, early
    of_queries, of_keys = (q_desc, dout_desc), (k_desc, v_desc)
    upper, lower = ring_of(of_keys, TILES, 1), ring_of(of_keys, TILES, 1)
    blocks = ring_of(of_keys, STAGES)
    masks = masks_for(CONSUMERS * BLOCK, BLOCK, 2)  # there is no room for more
    fence_async_shared()  # barriers are there
    of_dq = dq_ptr, dq_stride, dq_desc, add_q_ptr, add_q_stride
    of_dk = dk_ptr, dk_stride, dk_desc, add_k_ptr, add_k_stride
    of_dv = dv_ptr, dv_stride, dv_desc, add_v_ptr, add_v_stride
    of_q, of_dout = (q_ptr, q_stride), (dout_ptr, dout_stride)
    matrices = of_q, of_dout, of_dq, of_dk, of_dv, sums_k_ptr, sums_v_ptr, done_ptr
    work = half_alpha, scale, bounds_ptr
    query_tiles = query_tiles_ptr, num_query_tiles_ptr, 0
    key_tiles = key_tiles_ptr, num_key_tiles_ptr, more_key_tiles
    descs = of_queries, of_keys, (q_pieces_desc, dout_pieces_desc)
    to_fill = upper, lower, blocks
    lists = query_tiles, key_tiles
    of_upper, of_lower = (records, upper, blocks, masks), (records, lower, blocks, masks)
    of_masks = bounds_ptr, masks
    gl.warp_specialize(
        [
            (_consume, (0, matrices, work, of_upper, heads)),
            (_consume, (1, matrices, work, of_lower, heads)),
            (_fetch, (descs, of_schedule, to_fill)),
            (hand_out, (lists, counters_ptr, of_schedule, of_masks, BLOCK, heads)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
