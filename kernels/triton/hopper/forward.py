"""Attention forward of one source by programs that stay: the sums of `kernels.triton.forward`.

One warp hands out tiles and fetches: a tile's first blocks come while the one before is computed.
Two warpgroups compute, each half of a tile's rows. Each has the scores of the next block computed
while it adds what the weights of the last one give, and a tile's first ones while it stores the
tile before; and while one finds weights, the tensor cores work for the other.
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.triton.hopper.pipeline import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    announce,
    fetch,
    give,
    next_place,
    ring_of,
    ring_of_places,
    take,
)
from kernels.triton.hopper.query_rows import (
    hide,
    load_added,
    load_bounds,
    load_riders,
    load_rows,
    store_rows,
)
from kernels.triton.launcher import remembered
from kernels.triton.runs import find_block, load_runs, tile_at
from kernels.triton.silu import silu


@gluon.jit
def _load_masked(record, BLOCK: gl.constexpr):
    """Blocks for which an interval is to be tested, first those for the second: how many, how many
    for the second, and the runs of both."""
    second, runs2 = load_runs(record, 2, 2, BLOCK)
    first, runs1 = load_runs(record, 1, 2, BLOCK)
    return second + first, second, (runs2, runs1)


@gluon.jit
def _find_masked(runs, second, block, BLOCK: gl.constexpr):
    """The first row of a masked block."""
    row2, _end2 = find_block(runs[0], block, BLOCK)
    row1, _end1 = find_block(runs[1], block - second, BLOCK)
    return gl.where(block < second, row2, row1)


@gluon.jit
def _produce(descs, tiles, rings, HEADS: gl.constexpr):
    """One warp's: all tiles in turn, and their blocks, masked ones first.

    counters_ptr: int32 [2], zero before and after a launch.
    """
    q_desc, k_desc, v_desc = descs
    tiles_ptr, num_tiles_ptr, counters_ptr = tiles
    places, queries, keys, values = rings
    BLOCK: gl.constexpr = k_desc.block_type.shape[0]
    programs = gl.num_programs(0)
    count = gl.load(num_tiles_ptr) * HEADS
    # Counted from the first on: a program whose multiprocessor is busy elsewhere comes late.
    place = gl.atomic_add(counters_ptr, 1)
    i = 0  # tiles so far
    n = 0  # blocks
    while place < count:
        head, _part, record = tile_at(tiles_ptr, place, HEADS, PARTS=1, SOURCES=1)
        rows = load_rows(record)
        if rows[3] > 0:
            announce(places, i, place)
            fetch(q_desc, rows[0], head, queries, i)
            masked, second, of_masked = _load_masked(record, BLOCK)
            for block in range(masked):
                row = _find_masked(of_masked, second, block, BLOCK)
                fetch(k_desc, row, head, keys, n)
                fetch(v_desc, row, head, values, n)
                n += 1
            full, runs = load_runs(record, 0, 2, BLOCK)
            for block in range(full):
                row, _end = find_block(runs, block, BLOCK)
                fetch(k_desc, row, head, keys, n)
                fetch(v_desc, row, head, values, n)
                n += 1
            if masked + full == 0:  # one that nobody sees
                fetch(k_desc, 0, head, keys, n)
                fetch(v_desc, 0, head, values, n)
                n += 1
            i += 1
        # Only now: who claims a tile long before he can compute it makes a tail.
        place = gl.atomic_add(counters_ptr, 1)
    announce(places, i, -1)
    if gl.atomic_add(counters_ptr + 1, 1) == programs - 1:  # nobody asks for a tile any more
        gl.store(counters_ptr, 0)
        gl.store(counters_ptr + 1, 0)


@gluon.jit
def _consume(HALF: gl.constexpr, matrices, work, rings, HEADS: gl.constexpr):
    """One warpgroup's: half of the rows of each tile."""
    q_ptr, q_stride, add_ptr, add_stride, out_ptr, out_stride = matrices
    tiles_ptr, half_alpha, scale, bounds_ptr, num_rows = work
    places, queries, keys, values = rings
    ROWS: gl.constexpr = queries[0].shape[1] // 2
    QK_DIM: gl.constexpr = queries[0].shape[2]
    BLOCK: gl.constexpr = values[0].shape[1]
    V_DIM: gl.constexpr = values[0].shape[2]
    dtype: gl.constexpr = queries[0].dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    bounds_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    first: gl.constexpr = HALF * ROWS
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, scores_layout)

    i = 0  # tiles so far
    n = 0  # blocks
    place = next_place(places, i)
    # The tile before, yet to be stored: in the beginning one without rows.
    out = gl.zeros([ROWS, V_DIM], out_ptr.dtype.element_ty, sums_layout)
    last = place * 0, place * 0, place * 0, place * 0
    last_at = place * 0
    while place >= 0:
        head, _part, record = tile_at(tiles_ptr, place, HEADS, PARTS=1, SOURCES=1)
        rows, v_at = load_rows(record), head * V_DIM
        low1, high1, low2, high2 = load_bounds(
            bounds_ptr, num_rows, rows, first, ROWS, bounds_layout
        )
        masked, second, of_masked = _load_masked(record, BLOCK)
        full, runs = load_runs(record, 0, 2, BLOCK)
        q = take(queries, i).slice(first, ROWS)
        if rows[1] < rows[3]:
            load_riders(q, q_ptr, q_stride, rows, first, head * QK_DIM)

        k = take(keys, n).permute([1, 0])
        scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        store_rows(out_ptr, out_stride, out, last, first, last_at)
        row = _find_masked(of_masked, second, 0, BLOCK)
        low = gl.where(second > 0, low2, low1)
        high = gl.where(second > 0, high2, high1)
        if masked == 0:  # a full one, an interval that is the block; or the one that nobody sees
            row, _end = find_block(runs, 0, BLOCK)
            low = gl.zeros([ROWS], gl.int32, bounds_layout) + row
            high = low + gl.where(full > 0, BLOCK, 0)
        half_scores = warpgroup_mma_wait(0, deps=[scores]) * half_alpha
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
                k = take(keys, n + 1).permute([1, 0])
                scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                sums = warpgroup_mma(weights, take(values, n), acc, is_async=True)
                half_scores = warpgroup_mma_wait(1, deps=[scores]) * half_alpha
                give(keys, n + 1)
                if kind == 0:
                    row = _find_masked(of_masked, second, block, BLOCK)
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
        sums = warpgroup_mma(weights, take(values, n), acc, is_async=True)
        last, last_at = rows, v_at
        i += 1
        place = next_place(places, i)
        acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])
        give(values, n)
        out = (acc * scale).to(out.dtype)
        n += 1
    store_rows(out_ptr, out_stride, out, last, first, last_at)


@remembered
@gluon.jit(
    do_not_specialize=["half_alpha", "scale", "num_rows"],
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
    tiles_ptr,
    num_tiles_ptr,
    counters_ptr,
    half_alpha,
    scale,
    k_desc,
    v_desc,
    bounds_ptr,
    num_rows,
    HEADS: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """out = scale * (add / scale + sum silu(alpha q . k) v). 16-bit q, k, v.

    Descriptors have the rows of a tile, and those of a block. TILES, STAGES: buffers for each.
    Grid: any; as many as there are multiprocessors to fill them.
    """
    places, queries = ring_of_places(), ring_of(q_desc, TILES)
    keys, values = ring_of(k_desc, STAGES), ring_of(v_desc, STAGES)
    fence_async_shared()  # barriers are there
    matrices = q_ptr, q_stride, add_ptr, add_stride, out_ptr, out_stride
    work = tiles_ptr, half_alpha, scale, bounds_ptr, num_rows
    rings = places, queries, keys, values
    descs, tiles = (q_desc, k_desc, v_desc), (tiles_ptr, num_tiles_ptr, counters_ptr)
    gl.warp_specialize(
        [
            (_consume, (0, matrices, work, rings, HEADS)),
            (_consume, (1, matrices, work, rings, HEADS)),
            (_produce, (descs, tiles, rings, HEADS)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
