"""dq of one source by programs that stay: the sums of `kernels.triton.backward`.

Tiles are handed out and fetched as in the forward. Three products a block: scores and what a unit
of each weight is worth, for the slopes, and what these give for dq. A warpgroup waits for its
products; meanwhile the tensor cores have those of the other.
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

from kernels.triton.hopper.masked import find_masked
from kernels.triton.hopper.pipeline import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    give,
    next_place,
    ring_of,
    ring_of_places,
    room_for,
    take,
)
from kernels.triton.hopper.query_tiles import load_tile, produce
from kernels.triton.hopper.rows import copy_rows, hide, load_added, load_riders, store_rows
from kernels.triton.launcher import remembered
from kernels.triton.silu import silu_and_twice_slope


@gluon.jit
def _consume(HALF: gl.constexpr, matrices, work, rings, staged, HEADS: gl.constexpr):
    """One warpgroup's: half of the rows of each tile. staged: where to have them copied from."""
    of_q, of_dout, of_add, of_dq, dq_desc = matrices
    q_ptr, q_stride = of_q
    dout_ptr, dout_stride = of_dout
    add_ptr, add_stride = of_add
    dq_ptr, dq_stride = of_dq
    tiles_ptr, half_alpha, scale, bounds_ptr = work
    places, queries, keys, values = rings
    ROWS: gl.constexpr = queries[0][0].shape[1]
    QK_DIM: gl.constexpr = queries[0][0].shape[2]
    V_DIM: gl.constexpr = queries[0][1].shape[2]
    BLOCK: gl.constexpr = keys[0][0].shape[1]
    dtype: gl.constexpr = queries[0][0].dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QK_DIM, 16])
    slopes_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    bounds_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    first: gl.constexpr = HALF * ROWS
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, scores_layout)

    i = 0  # tiles so far
    n = 0  # blocks
    place = next_place(places, i)
    tile = load_tile(tiles_ptr, place, HEADS, bounds_ptr, first, ROWS, BLOCK, bounds_layout)
    while place >= 0:
        head, rows, bounds, of_masked, of_full = tile
        low1, high1, low2, high2 = bounds
        masked, second, masked_runs = of_masked
        full, _runs = of_full
        at = head * QK_DIM
        q, dout = take(queries, i)
        if rows[1] < rows[3]:
            load_riders(q, q_ptr, q_stride, rows, first, at)
            load_riders(dout, dout_ptr, dout_stride, rows, first, head * V_DIM)
        dq = gl.zeros([ROWS, QK_DIM], gl.float32, sums_layout)
        if add_ptr is not None:
            dq = load_added(add_ptr, add_stride, rows, first, at, ROWS, QK_DIM, sums_layout)
            dq /= scale * half_alpha
        for kind in gl.static_range(2):  # masked blocks, then full ones
            for block in range(masked if kind == 0 else full):
                k, v = take(keys, n)[0], take(values, n)[0]
                k_columns, v_columns = k.permute([1, 0]), v.permute([1, 0])
                scores = warpgroup_mma(q, k_columns, zeros, use_acc=False, is_async=True)
                dweights = warpgroup_mma(dout, v_columns, zeros, use_acc=False, is_async=True)
                half_scores = warpgroup_mma_wait(1, deps=[scores]) * half_alpha
                if kind == 0:
                    row, _end = find_masked(masked_runs, second, block, BLOCK)
                    low = gl.where(block < second, low2, low1)
                    high = gl.where(block < second, high2, high1)
                    half_scores = hide(half_scores, row, low, high)
                _weights, slope = silu_and_twice_slope(half_scores, True)
                slopes = (warpgroup_mma_wait(0, deps=[dweights]) * slope).to(dtype)
                give(values, n)
                slopes = gl.convert_layout(slopes, slopes_layout)
                sums = warpgroup_mma(slopes, k, dq, is_async=True)
                dq, slopes = warpgroup_mma_wait(0, deps=[sums, slopes])
                give(keys, n)
                n += 1
        if masked + full == 0:  # the block that nobody sees
            _k, _v = take(keys, n), take(values, n)
            give(keys, n)
            give(values, n)
            n += 1
        give(queries, i)
        i += 1
        place = next_place(places, i)
        tile = load_tile(tiles_ptr, place, HEADS, bounds_ptr, first, ROWS, BLOCK, bounds_layout)
        out = (dq * (scale * half_alpha)).to(dq_ptr.dtype.element_ty)
        if dq_desc is None:
            store_rows(dq_ptr, dq_stride, out, rows, first, at)
        else:
            copy_rows(dq_ptr, dq_stride, dq_desc, out, rows, first, at, staged)
    if dq_desc is not None:
        tma.store_wait(0)


@remembered
@gluon.jit(
    do_not_specialize=["half_alpha", "scale"],
    do_not_specialize_on_alignment=["num_tiles_ptr"],
)
def resident_query_kernel(
    dout_desc,
    dout_ptr,
    dout_stride,
    q_desc,
    q_ptr,
    q_stride,
    add_ptr,
    add_stride,
    dq_ptr,
    dq_stride,
    dq_desc,
    tiles_ptr,
    num_tiles_ptr,
    counters_ptr,
    half_alpha,
    scale,
    k_desc,
    v_desc,
    bounds_ptr,
    HEADS: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dq = scale * alpha (add / (scale * alpha) + sum silu'(s) dp k). 16-bit dout, q, k, v.

    Descriptors, buffers and grid as in the forward.
    """
    places = ring_of_places()
    upper, lower = ring_of((q_desc, dout_desc), TILES, 1), ring_of((q_desc, dout_desc), TILES, 1)
    keys, values = ring_of((k_desc,), STAGES), ring_of((v_desc,), STAGES)
    upper_out, lower_out = 0, 0
    if dq_desc is not None:
        upper_out, lower_out = room_for(dq_desc, 1).index(0), room_for(dq_desc, 1).index(0)
    fence_async_shared()  # barriers are there
    of_q, of_dout = (q_ptr, q_stride), (dout_ptr, dout_stride)
    matrices = of_q, of_dout, (add_ptr, add_stride), (dq_ptr, dq_stride), dq_desc
    work = tiles_ptr, half_alpha, scale, bounds_ptr
    tiles, of_block = (tiles_ptr, num_tiles_ptr, counters_ptr), (k_desc, v_desc)
    to_fill = places, upper, lower, keys, values
    of_upper, of_lower = (places, upper, keys, values), (places, lower, keys, values)
    gl.warp_specialize(
        [
            (_consume, (0, matrices, work, of_upper, upper_out, HEADS)),
            (_consume, (1, matrices, work, of_lower, lower_out, HEADS)),
            (produce, ((q_desc, dout_desc), of_block, tiles, to_fill, HEADS)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
