"""dq, dk and dv of one source by programs that stay: the sums of `kernels.triton.backward`.

Tiles are of keys, for dk and dv, or of queries, for dq. What is fetched is alike: a tile of rows of
k and v meets blocks of q and dout, or the other way round. So is what is multiplied, but that dk
and dv take four products a block, with scores transposed, [keys, queries], and dq three.

One warp hands out tiles, of both kinds in turn if a launch has both, and fetches. Two warpgroups
compute, each half of a tile's rows. A warpgroup waits for its products; meanwhile the tensor cores
have those of the other.
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.triton.hopper.key_tiles import add_segments, hide_keys, unknown_zero
from kernels.triton.hopper.masked import find_masked, find_row, load_masked
from kernels.triton.hopper.pipeline import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    announce,
    fetch,
    give,
    leave_counters,
    next_place,
    ring_of,
    ring_of_places,
    room_for,
    take,
)
from kernels.triton.hopper.rows import hide, load_bounds, load_riders, load_rows, write
from kernels.triton.launcher import remembered
from kernels.triton.runs import FULL_RUNS, MASKED_RUNS, load_runs, load_segment, tile_at
from kernels.triton.silu import silu_and_twice_slope


@gluon.jit
def _kind_at(place, num_query_tiles, num_key_tiles, HEADS: gl.constexpr):
    """1 if a place is of queries, and which it is of those of its kind: both come in turn."""
    tile = place // HEADS
    pairs = gl.minimum(num_query_tiles, num_key_tiles)
    paired = tile < 2 * pairs
    of_queries = gl.where(paired, tile % 2, gl.where(num_query_tiles > pairs, 1, 0))
    return of_queries, gl.where(paired, tile // 2, tile - pairs) * HEADS + place % HEADS


@gluon.jit
def _record_at(of_queries, place, lists, HEADS: gl.constexpr):
    """The head and the record of a place among those of its kind."""
    query_tiles_ptr, key_tiles_ptr = lists
    in_queries = tile_at(query_tiles_ptr, place, HEADS, PARTS=1, SOURCES=1)
    in_keys = tile_at(key_tiles_ptr, place, HEADS, PARTS=1, SOURCES=1)
    return in_keys[0], gl.where(of_queries == 1, in_queries[2], in_keys[2])


@gluon.jit
def _fetch_tile(of_tile, of_block, bounds_desc, record, head, so_far, rings, counters_ptr):
    """The tile's rows, half of them into one ring and half into another; its blocks, masked ones
    first; unless None, bounds of those. Returns how many there were so far: tiles, blocks, bounds;
    and the next place.
    """
    upper, lower, blocks, bounds = rings
    i, n, m = so_far
    ROWS: gl.constexpr = of_tile[0].block_type.shape[0]
    BLOCK: gl.constexpr = of_block[0].block_type.shape[0]
    row0 = gl.load(record)
    fetch(of_tile, row0, head, upper, i)
    fetch(of_tile, row0 + ROWS, head, lower, i)
    of_masked = load_masked(record, MASKED_RUNS, BLOCK)
    full, runs = load_runs(record, 0, FULL_RUNS, BLOCK)
    masked = of_masked[0]
    place = -1
    for block in range(masked + full):
        if block == masked + full - 1:
            place = gl.atomic_add(counters_ptr, 1)
        row = find_row(of_masked, runs, block, BLOCK)
        fetch(of_block, row, head, blocks, n)
        if bounds_desc is not None:  # noqa: SIM102 (known to the compiler)
            if block < masked:
                fetch((bounds_desc,), row, 0, bounds, m)
                m += 1
        n += 1
    if masked + full == 0:
        place = gl.atomic_add(counters_ptr, 1)
    return i + 1, n, m, place


@gluon.jit
def _produce(descs, lists, counts, rings, HEADS: gl.constexpr):
    """One warp's: all tiles in turn. counters_ptr: int32 [2], zero before and after a launch."""
    of_queries, of_keys, bounds_desc = descs
    num_query_tiles_ptr, num_key_tiles_ptr, more_key_tiles, counters_ptr = counts
    places, upper, lower, blocks, bounds = rings
    to_fill = upper, lower, blocks, bounds
    num_query_tiles = gl.load(num_query_tiles_ptr)
    num_key_tiles = gl.load(num_key_tiles_ptr) + more_key_tiles
    count = (num_query_tiles + num_key_tiles) * HEADS
    place = gl.atomic_add(counters_ptr, 1)
    i = 0  # tiles so far
    n = 0  # blocks
    m = 0  # bounds
    while place < count:
        kind, at = _kind_at(place, num_query_tiles, num_key_tiles, HEADS)
        head, record = _record_at(kind, at, lists, HEADS)
        if load_rows(record)[3] > 0:
            announce(places, i, 2 * at + kind)
            of = record, head, (i, n, m), to_fill, counters_ptr
            if kind == 1:
                i, n, m, place = _fetch_tile(of_queries, of_keys, None, *of)
            else:
                i, n, m, place = _fetch_tile(of_keys, of_queries, bounds_desc, *of)
        else:
            place = gl.atomic_add(counters_ptr, 1)
    announce(places, i, -1)
    leave_counters(counters_ptr)


@gluon.jit
def _load_tile(
    place, lists, bounds_ptr, first, HEADS: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """What a warpgroup is to know of a tile; of any, behind the last."""
    place = gl.maximum(place, 0)
    of_queries = place % 2
    head, record = _record_at(of_queries, place // 2, lists, HEADS)
    rows = load_rows(record)
    wanted = rows[0], rows[1], rows[2], rows[3] * of_queries
    of_rows = load_bounds(bounds_ptr, wanted, first, ROWS, layout)
    masked = load_masked(record, MASKED_RUNS, BLOCK)
    full = load_runs(record, 0, FULL_RUNS, BLOCK)
    return of_queries, head, rows, of_rows, masked, full, load_segment(record)


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
def _consume(HALF: gl.constexpr, matrices, work, rings, staged, HEADS: gl.constexpr):
    """One warpgroup's: half of the rows of each tile. staged: where to have them copied from."""
    of_q, of_dout, of_dq, of_dk, of_dv, sums_k_ptr, sums_v_ptr, done_ptr = matrices
    lists, half_alpha, scale, bounds_ptr = work
    places, tiles, blocks, bounds = rings
    ROWS: gl.constexpr = tiles[0][0].shape[1]
    QK_DIM: gl.constexpr = tiles[0][0].shape[2]
    V_DIM: gl.constexpr = tiles[0][1].shape[2]
    BLOCK: gl.constexpr = blocks[0][0].shape[1]
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
    m = 0  # bounds
    place = next_place(places, i)
    tile = _load_tile(place, lists, bounds_ptr, first, HEADS, ROWS, BLOCK, bounds_layout)
    while place >= 0:
        of_queries, head, rows, of_rows, of_masked, of_full, of_segment = tile
        masked, second, masked_runs = of_masked
        full, _runs = of_full
        at, v_at = head * QK_DIM, head * V_DIM
        of_tile = take(tiles, i)
        if of_queries == 1:
            low1, high1, low2, high2 = of_rows
            if rows[1] < rows[3]:
                load_riders(of_tile[0], of_q[0], of_q[1], rows, first, at)
                load_riders(of_tile[1], of_dout[0], of_dout[1], rows, first, v_at)
            dq = gl.zeros([ROWS, QK_DIM], gl.float32, qk_layout)
            for kind in gl.static_range(2):  # masked blocks, then full ones
                for block in range(masked if kind == 0 else full):
                    k, _v, scores, dweights = _begin(tiles, i, blocks, n, block, zeros)
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
                    give(blocks, n)
                    n += 1
            give(tiles, i)
            i += 1
            place = next_place(places, i)
            tile = _load_tile(place, lists, bounds_ptr, first, HEADS, ROWS, BLOCK, bounds_layout)
            write(of_dq, dq * (scale * half_alpha), rows, first, at, staged)
        else:
            dk = gl.zeros([ROWS, QK_DIM], gl.float32, qk_layout)
            dv = gl.zeros([ROWS, V_DIM], gl.float32, v_layout)
            for kind in gl.static_range(2):
                for block in range(masked if kind == 0 else full):
                    q, dout, scores, dweights = _begin(tiles, i, blocks, n, block, zeros)
                    half_scores = warpgroup_mma_wait(1, deps=[scores]) * half_alpha
                    if kind == 0:
                        row, end = find_masked(masked_runs, second, block, BLOCK)
                        which = block < second, row, end, rows[0] + first
                        half_scores = hide_keys(half_scores, bounds, m, *which)
                        m += 1
                    weights, slope = silu_and_twice_slope(half_scores, True)
                    weights = gl.convert_layout(weights.to(dtype), weights_layout)
                    dv_sums = warpgroup_mma(weights, dout, dv, is_async=True)
                    slopes = (warpgroup_mma_wait(1, deps=[dweights]) * slope).to(dtype)
                    slopes = gl.convert_layout(slopes, slopes_layout)
                    dk_sums = warpgroup_mma(slopes, q, dk, is_async=True)
                    dv, weights, dk, slopes = warpgroup_mma_wait(
                        0, deps=[dv_sums, weights, dk_sums, slopes]
                    )
                    give(blocks, n)
                    n += 1
            give(tiles, i)
            i += 1
            place = next_place(places, i)
            tile = _load_tile(place, lists, bounds_ptr, first, HEADS, ROWS, BLOCK, bounds_layout)
            sums = sums_k_ptr, sums_v_ptr
            dk, dv, last = add_segments(dk, dv, sums, of_segment, done_ptr, first, head, HEADS)
            if last:
                write(of_dk, dk * (scale * half_alpha), rows, first, at, staged)
                write(of_dv, dv * scale, rows, first, v_at, staged)
    tma.store_wait(0)


@remembered
@gluon.jit(
    do_not_specialize=["half_alpha", "scale", "more_key_tiles"],
    do_not_specialize_on_alignment=["num_query_tiles_ptr", "num_key_tiles_ptr"],
)
def resident_gradients_kernel(
    q_desc,
    q_ptr,
    q_stride,
    dout_desc,
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
    bounds_desc,
    HEADS: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dq, dk and dv, each plus another if wanted; of tiles of queries alone, or of keys alone, if
    there are none of the others. 16-bit q, dout, k, v.

    All descriptors are of half of a tile's rows, or as many of a block; those of outputs None if
    one is not of 16 bits, or if head dims differ. Segments of key tiles leave their sums as in
    `kernels.triton.backward`, half a tile each time; so done_ptr.
    Grid: any; as many as there are multiprocessors to fill them.
    """
    places = ring_of_places()
    of_queries, of_keys = (q_desc, dout_desc), (k_desc, v_desc)
    upper, lower = ring_of(of_keys, TILES, 1), ring_of(of_keys, TILES, 1)
    blocks, bounds = ring_of(of_keys, STAGES), ring_of((bounds_desc,), STAGES)
    upper_out, lower_out = 0, 0
    if dq_desc is not None:
        upper_out, lower_out = room_for(dq_desc, 1).index(0), room_for(dq_desc, 1).index(0)
    fence_async_shared()  # barriers are there
    of_dq = dq_ptr, dq_stride, dq_desc, add_q_ptr, add_q_stride
    of_dk = dk_ptr, dk_stride, dk_desc, add_k_ptr, add_k_stride
    of_dv = dv_ptr, dv_stride, dv_desc, add_v_ptr, add_v_stride
    of_q, of_dout = (q_ptr, q_stride), (dout_ptr, dout_stride)
    matrices = of_q, of_dout, of_dq, of_dk, of_dv, sums_k_ptr, sums_v_ptr, done_ptr
    lists = query_tiles_ptr, key_tiles_ptr
    work = lists, half_alpha, scale, bounds_ptr
    counts = num_query_tiles_ptr, num_key_tiles_ptr, more_key_tiles, counters_ptr
    descs, to_fill = (of_queries, of_keys, bounds_desc), (places, upper, lower, blocks, bounds)
    of_upper, of_lower = (places, upper, blocks, bounds), (places, lower, blocks, bounds)
    gl.warp_specialize(
        [
            (_consume, (0, matrices, work, of_upper, upper_out, HEADS)),
            (_consume, (1, matrices, work, of_lower, lower_out, HEADS)),
            (_produce, (descs, lists, counts, to_fill, HEADS)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
