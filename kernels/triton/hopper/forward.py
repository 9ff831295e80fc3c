"""Attention forward of one source by programs that stay: the sums of `kernels.triton.forward`.

One warp hands out tiles and fetches: a tile's first blocks come while the one before is computed.
Two warpgroups compute, each half of a tile's rows. Each has the scores of the next block computed
while it adds what the weights of the last one give; and while one finds weights, the tensor cores
work for the other.
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

from kernels.triton.hopper.masked import find_masked, find_row, load_masked
from kernels.triton.hopper.pipeline import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    announce,
    barriers,
    fetch,
    give,
    leave_counters,
    next_place,
    ring_of,
    ring_of_places,
    room_for,
    take,
    turn,
)
from kernels.triton.hopper.rows import (
    hide,
    load_added,
    load_bounds,
    load_riders,
    load_rows,
    write,
)
from kernels.triton.launcher import remembered
from kernels.triton.runs import FULL_RUNS, find_block, load_runs, tile_at
from kernels.triton.silu import silu


@gluon.jit
def _produce(descs, tiles, rings, HEADS: gl.constexpr):
    """One warp's: all tiles in turn, half of their rows into one ring and half into another; and
    their blocks, masked ones first. A tile that sees nothing has one block, which nobody sees.

    counters_ptr: int32 [2], zero before and after a launch.
    """
    tiles_ptr, num_tiles_ptr, counters_ptr = tiles
    places, upper, lower, keys, values = rings
    q_desc, k_desc, v_desc = descs
    BLOCK: gl.constexpr = k_desc.block_type.shape[0]
    ROWS: gl.constexpr = q_desc.block_type.shape[0]
    count = gl.load(num_tiles_ptr) * HEADS
    # Counted from the first on: a program whose multiprocessor is busy elsewhere comes late.
    place = gl.atomic_add(counters_ptr, 1)
    i = 0  # tiles so far
    n = 0  # blocks
    while place < count:
        head, _part, record = tile_at(tiles_ptr, place, HEADS, PARTS=1, SOURCES=1)
        rows = load_rows(record)
        of_masked = load_masked(record, 2, BLOCK)
        full, runs = load_runs(record, 0, FULL_RUNS, BLOCK)
        if rows[3] > 0:
            announce(places, i, place)
            fetch((q_desc,), rows[0], head, upper, i)
            fetch((q_desc,), rows[0] + ROWS, head, lower, i)
            blocks = gl.maximum(of_masked[0] + full, 1)
            for block in range(blocks):
                if block == blocks - 1:  # who claims a tile long before its turn makes a tail
                    place = gl.atomic_add(counters_ptr, 1)
                row = find_row(of_masked, runs, block, BLOCK)
                fetch((k_desc,), row, head, keys, n)
                fetch((v_desc,), row, head, values, n)
                n += 1
            i += 1
        else:
            place = gl.atomic_add(counters_ptr, 1)
    announce(places, i, -1)
    leave_counters(counters_ptr)


@gluon.jit
def _load_tile(
    tiles_ptr, place, HEADS: gl.constexpr, bounds_ptr, first, ROWS: gl.constexpr,
    BLOCK: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """What a warpgroup is to know of a tile; of any, behind the last."""
    head, _part, record = tile_at(tiles_ptr, gl.maximum(place, 0), HEADS, PARTS=1, SOURCES=1)
    rows = load_rows(record)
    bounds = load_bounds(bounds_ptr, rows, first, ROWS, layout)
    full, runs = load_runs(record, 0, FULL_RUNS, BLOCK)
    return head, rows, bounds, load_masked(record, 2, BLOCK), (full, runs)


@gluon.jit
def _consume(HALF: gl.constexpr, matrices, work, rings, staged, HEADS: gl.constexpr):
    """One warpgroup's: half of the rows of each tile. staged: where to have them copied from."""
    q_ptr, q_stride, add_ptr, add_stride, out_ptr, out_stride, out_desc = matrices
    tiles_ptr, half_alpha, scale, bounds_ptr = work
    places, queries, keys, values, order = rings
    ROWS: gl.constexpr = queries[0][0].shape[1]
    QK_DIM: gl.constexpr = queries[0][0].shape[2]
    STAGES: gl.constexpr = values[0][0].shape[0]
    BLOCK: gl.constexpr = values[0][0].shape[1]
    V_DIM: gl.constexpr = values[0][0].shape[2]
    dtype: gl.constexpr = queries[0][0].dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    bounds_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    first: gl.constexpr = HALF * ROWS
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, scores_layout)

    i = 0  # tiles so far
    n = 0  # blocks
    place = next_place(places, i)
    tile = _load_tile(tiles_ptr, place, HEADS, bounds_ptr, first, ROWS, BLOCK, bounds_layout)
    while place >= 0:
        head, rows, bounds, of_masked, of_full = tile
        low1, high1, low2, high2 = bounds
        masked, second, masked_runs = of_masked
        full, runs = of_full
        v_at = head * V_DIM
        q = take(queries, i)[0]
        if rows[1] < rows[3]:
            load_riders(q, q_ptr, q_stride, rows, first, head * QK_DIM)
        k = take(keys, n)[0].permute([1, 0])
        if HALF == 1:  # out of step with the other, whose products then run while this one has none
            mbarrier.wait(order.index(i % STAGES), turn(i, STAGES))
        scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        row, _end = find_masked(masked_runs, second, 0, BLOCK)
        low = gl.where(second > 0, low2, low1)
        high = gl.where(second > 0, high2, high1)
        if masked == 0:  # a full one, an interval that is the block; or the one that nobody sees
            row, _end = find_block(runs, 0, BLOCK)
            low = low * 0 + row
            high = low + gl.where(full > 0, BLOCK, 0)
        half_scores = warpgroup_mma_wait(0, deps=[scores]) * half_alpha
        if HALF == 0:
            mbarrier.arrive(order.index(i % STAGES), count=1)
        give(keys, n)
        weights = silu(hide(half_scores, row, low, high), True).to(dtype)
        weights = gl.convert_layout(weights, weights_layout)
        acc = gl.zeros([ROWS, V_DIM], gl.float32, sums_layout)
        if add_ptr is not None:
            acc = load_added(add_ptr, add_stride, rows, first, v_at, ROWS, V_DIM, sums_layout)
            acc /= scale
        for kind in gl.static_range(2):  # masked blocks, then full ones, but for the first
            start = 1 if kind == 0 else gl.where(masked > 0, 0, 1)
            for block in range(start, masked if kind == 0 else full):
                k = take(keys, n + 1)[0].permute([1, 0])
                scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                sums = warpgroup_mma(weights, take(values, n)[0], acc, is_async=True)
                half_scores = warpgroup_mma_wait(1, deps=[scores]) * half_alpha
                give(keys, n + 1)
                if kind == 0:
                    row, _end = find_masked(masked_runs, second, block, BLOCK)
                    low = gl.where(block < second, low2, low1)
                    high = gl.where(block < second, high2, high1)
                    half_scores = hide(half_scores, row, low, high)
                following = silu(half_scores, True).to(dtype)
                following = gl.convert_layout(following, weights_layout)
                acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])
                give(values, n)
                weights = following
                n += 1
        give(queries, i)
        sums = warpgroup_mma(weights, take(values, n)[0], acc, is_async=True)
        i += 1
        place = next_place(places, i)
        tile = _load_tile(  # while the products run
            tiles_ptr, place, HEADS, bounds_ptr, first, ROWS, BLOCK, bounds_layout
        )
        acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])
        give(values, n)
        n += 1
        of_out = out_ptr, out_stride, out_desc, None, 0
        write(of_out, acc * scale, rows, first, v_at, staged)
    if out_desc is not None:
        tma.store_wait(0)


@remembered
@gluon.jit(
    do_not_specialize=["half_alpha", "scale"],
    do_not_specialize_on_alignment=["num_tiles_ptr"],
)
def resident_forward_kernel(
    q_desc,
    q_ptr,
    q_stride,
    add_ptr,
    add_stride,
    out_ptr,
    out_stride,
    out_desc,
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
    """out = scale * (add / scale + sum silu(alpha q . k) v). 16-bit q, k, v.

    Descriptors have half of a tile's rows, and those of a block; out's is None where there is no
    room in shared memory. TILES, STAGES: buffers for each.
    Grid: any; as many as there are multiprocessors to fill them.
    """
    places = ring_of_places()
    upper, lower = ring_of((q_desc,), TILES, 1), ring_of((q_desc,), TILES, 1)
    keys, values = ring_of((k_desc,), STAGES), ring_of((v_desc,), STAGES)
    upper_out, lower_out = 0, 0
    if out_desc is not None:
        upper_out, lower_out = room_for(out_desc, 1).index(0), room_for(out_desc, 1).index(0)
    order = barriers(STAGES, 1)  # a tile's: the first one's keys are needed for one so many later
    fence_async_shared()  # barriers are there
    matrices = q_ptr, q_stride, add_ptr, add_stride, out_ptr, out_stride, out_desc
    work = tiles_ptr, half_alpha, scale, bounds_ptr
    tiles = tiles_ptr, num_tiles_ptr, counters_ptr
    to_fill = places, upper, lower, keys, values
    of_upper, of_lower = (places, upper, keys, values, order), (places, lower, keys, values, order)
    gl.warp_specialize(
        [
            (_consume, (0, matrices, work, of_upper, upper_out, HEADS)),
            (_consume, (1, matrices, work, of_lower, lower_out, HEADS)),
            (_produce, ((q_desc, k_desc, v_desc), tiles, to_fill, HEADS)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
