"""Attention forward of one source by programs that stay: the sums of `kernels.triton.forward`.

One warp hands out tiles, and one fetches: a tile's first blocks come while the one before is
computed. Two warpgroups compute, each half of a tile's rows. Each has the scores of the next block
computed while it adds what the weights of the last one give; and while one finds weights, the
tensor cores work for the other.
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

from kernels.triton.halves import is_unseen, unseen_by
from kernels.triton.hopper.pipeline import (
    CONSUMER_REGISTERS,
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
from kernels.triton.hopper.rows import (
    hide,
    load_added,
    load_bounds,
    load_riders,
    write,
)
from kernels.triton.hopper.schedule import fetch_tile, hand_out
from kernels.triton.launcher import remembered
from kernels.triton.masked import load_edge
from kernels.triton.runs import (
    FULL_RUNS,
    load_rows,
    load_runs,
    number_at,
)
from kernels.triton.silu import silu

# First blocks of the second interval and of the first, full ones, last blocks of the first interval
# and of the second: what a half of a tile does not see comes first or last, as far as it can.
RUNS_IN_ORDER, STEPS = gl.constexpr(0x159840), gl.constexpr(6)


@gluon.jit
def _fetch(descs, of_schedule, rings):
    """One warp's: all tiles, half of their rows into one ring and half into another. A tile that
    sees nothing has one block, which nobody sees."""
    upper, lower, keys, values = rings
    q_desc, k_desc, v_desc = descs
    of_rows = (q_desc,), upper, lower
    of_blocks = ((k_desc,), keys), ((v_desc,), values)
    i = 0  # tiles so far
    n = 0  # blocks
    head = look_up(of_schedule[0], i, HEAD_AT)
    while head >= 0:
        before = n
        n = fetch_tile(of_schedule, i, n, of_rows, of_blocks, RUNS_IN_ORDER, STEPS)
        if n == before:
            fetch((k_desc,), 0, head, keys, n)
            fetch((v_desc,), 0, head, values, n)
            n += 1
        i += 1
        head = look_up(of_schedule[0], i, HEAD_AT)


@gluon.jit
def _next_tile(
    records, i, bounds_ptr, HALF: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
    layout: gl.constexpr, MOST: gl.constexpr,
):  # fmt: skip
    """What a warpgroup is to know of the i-th tile; of any, behind the last. MOST: blocks that a
    half may leave out at either end."""
    record = next_record(records, i)
    head = number_at(record, HEAD_AT)
    rows = load_rows(record)
    bounds = load_bounds(bounds_ptr, rows, HALF * ROWS, ROWS, layout)
    edges = load_edge(record, 0, BLOCK), load_edge(record, 1, BLOCK)
    full, _runs = load_runs(record, 0, FULL_RUNS, BLOCK)
    begin, left = _unseen_at_ends(unseen_by(record, HALF), edges, full, MOST)
    return head, rows, bounds, edges, full, begin, left


@gluon.jit
def _mask_at(edge, bounds, block, SECOND_FIRST: gl.constexpr, BLOCK: gl.constexpr):
    """Of a block at one edge: its first row, and the interval to be tested."""
    first, second, row1, row2 = edge
    low1, high1, low2, high2 = bounds
    if SECOND_FIRST:
        by_second = block < second
        row = gl.where(by_second, row2, row1 - second * BLOCK) + block * BLOCK
    else:
        by_second = block >= first
        row = gl.where(by_second, row2 - first * BLOCK, row1) + block * BLOCK
    return row, gl.where(by_second, low2, low1), gl.where(by_second, high2, high1)


@gluon.jit
def _unseen_at_ends(unseen, edges, full, MOST: gl.constexpr):
    """How many of a tile's first blocks a half does not see, and how many of its last ones: one
    block is left, and no more than MOST are found."""
    first, second = edges[0][0], edges[0][1]
    last_first, last_second = edges[1][0], edges[1][1]
    tails = last_first + last_second
    most = gl.where(second > 0, second, first) - gl.where(full + tails > 0, 0, 1)
    at = gl.where(second > 0, 0, last_second)  # as halves.py counts them
    begin = 0
    while (begin < gl.minimum(most, MOST)) & is_unseen(unseen, at + begin):
        begin += 1
    one = gl.where((last_first > 0) & (last_second > 0), 0, 1)
    most = gl.where(last_second > 0, last_second, last_first) - one
    at = second + last_second + gl.where(last_second > 0, 0, first + last_first)
    left = 0
    while (left < gl.minimum(most, MOST)) & is_unseen(unseen, gl.maximum(at - 1 - left, 0)):
        left += 1
    return begin, left


@gluon.jit
def _pass_by(count, n, keys, values):
    """Do without so many blocks, from the n-th on; returns which is next."""
    for _block in range(count):
        take(keys, n)
        give(keys, n)
        take(values, n)
        give(values, n)
        n += 1
    return n


@gluon.jit
def _rounded(weights, dtype: gl.constexpr, layout: gl.constexpr):
    """To be multiplied by values."""
    return gl.convert_layout(weights.to(dtype), layout)


@gluon.jit
def _consume(HALF: gl.constexpr, matrices, work, rings, staged):
    """One warpgroup's: half of the rows of each tile. staged: where to have them copied from."""
    q_ptr, q_stride, add_ptr, add_stride, out_ptr, out_stride, out_desc = matrices
    half_alpha, scale, bounds_ptr = work
    records, queries, keys, values, order = rings
    ROWS: gl.constexpr = queries[0][0].shape[1]
    QK_DIM: gl.constexpr = queries[0][0].shape[2]
    STAGES: gl.constexpr = values[0][0].shape[0]
    BLOCK: gl.constexpr = values[0][0].shape[1]
    V_DIM: gl.constexpr = values[0][0].shape[2]
    dtype: gl.constexpr = queries[0][0].dtype
    # Numbers of 16 bits that a loop carries on it puts together in every round. Where there is room
    # in registers, weights are rounded where they are multiplied.
    ROOM: gl.constexpr = QK_DIM + V_DIM <= 256
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    bounds_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    first: gl.constexpr = HALF * ROWS
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, scores_layout)

    i = 0  # tiles so far
    n = 0  # blocks
    # There are buffers for so many: before the other half has begun, or one's last sums ended.
    most: gl.constexpr = STAGES - 1
    tile = _next_tile(records, i, bounds_ptr, HALF, ROWS, BLOCK, bounds_layout, most)
    while tile[0] >= 0:
        head, rows, bounds, edges, full, begin, left = tile
        heads, tails = edges[0][0] + edges[0][1], edges[1][0] + edges[1][1]
        v_at = head * V_DIM
        q = take(queries, i)[0]
        if rows[1] < rows[3]:
            load_riders(q, q_ptr, q_stride, rows, first, head * QK_DIM)
        n = _pass_by(begin, n, keys, values)
        k = take(keys, n)[0].permute([1, 0])
        if HALF == 1:  # out of step with the other, whose products then run while this one has none
            mbarrier.wait(order.index(i % STAGES), turn(i, STAGES))
        scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        half_scores = warpgroup_mma_wait(0, deps=[scores]) * half_alpha
        if HALF == 0:
            mbarrier.arrive(order.index(i % STAGES), count=1)
        give(keys, n)
        if (begin < heads) | (full == 0):
            row, low, high = _mask_at(edges[0], bounds, begin, True, BLOCK)
            if begin == heads:
                row, low, high = _mask_at(edges[1], bounds, 0, False, BLOCK)
            half_scores = hide(half_scores, row, low, high)
        weights = silu(half_scores, True)
        if not ROOM:
            weights = _rounded(weights, dtype, weights_layout)
        acc = gl.zeros([ROWS, V_DIM], gl.float32, sums_layout)
        if add_ptr is not None:
            acc = load_added(add_ptr, add_stride, rows, first, v_at, ROWS, V_DIM, sums_layout)
            acc /= scale
        for part in gl.static_range(3):  # first blocks, full ones, last blocks; but for the first
            if part == 0:
                start, end = begin + 1, heads
            elif part == 1:
                start, end = gl.where(begin < heads, 0, 1), full
            else:
                start, end = gl.where((begin < heads) | (full > 0), 0, 1), tails - left
            for block in range(start, end):
                k = take(keys, n + 1)[0].permute([1, 0])
                scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                rounded = _rounded(weights, dtype, weights_layout)
                sums = warpgroup_mma(rounded, take(values, n)[0], acc, is_async=True)
                half_scores = warpgroup_mma_wait(1, deps=[scores]) * half_alpha
                give(keys, n + 1)
                if part == 0:
                    row, low, high = _mask_at(edges[0], bounds, block, True, BLOCK)
                    half_scores = hide(half_scores, row, low, high)
                if part == 2:
                    row, low, high = _mask_at(edges[1], bounds, block, False, BLOCK)
                    half_scores = hide(half_scores, row, low, high)
                weights = silu(half_scores, True)
                if not ROOM:
                    weights = _rounded(weights, dtype, weights_layout)
                acc, rounded = warpgroup_mma_wait(0, deps=[sums, rounded])
                give(values, n)
                n += 1
        give(queries, i)
        rounded = _rounded(weights, dtype, weights_layout)
        sums = warpgroup_mma(rounded, take(values, n)[0], acc, is_async=True)
        i += 1
        # While the products run.
        tile = _next_tile(records, i, bounds_ptr, HALF, ROWS, BLOCK, bounds_layout, most)
        acc, rounded = warpgroup_mma_wait(0, deps=[sums, rounded])
        give(values, n)
        of_out = out_ptr, out_stride, out_desc, None, 0
        tma.store_wait(0)
        write(of_out, acc * scale, rows, first, v_at, staged)
        # Not before: they may not have come while the other half reads what is in their place.
        n = _pass_by(left, n + 1, keys, values)
    if out_desc is not None:
        tma.store_wait(0)


@remembered
@gluon.jit(
    do_not_specialize=["half_alpha", "scale", "early", "heads"],
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
    early,
    heads,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """out = scale * (add / scale + sum silu(alpha q . k) v). 16-bit q, k, v.

    Descriptors have half of a tile's rows, and those of a block; out's is None where there is no
    room in shared memory. TILES, STAGES: buffers for each.
    Grid: any; as many as there are multiprocessors to fill them.
    """
    BLOCK: gl.constexpr = k_desc.block_type.shape[0]
    records, claim = schedule(2)  # a tile's, and the next one's
    of_schedule = records, claim, early
    upper, lower = ring_of((q_desc,), TILES, 1), ring_of((q_desc,), TILES, 1)
    keys, values = ring_of((k_desc,), STAGES), ring_of((v_desc,), STAGES)
    upper_out, lower_out = None, None
    if out_desc is not None:
        upper_out, lower_out = room_for(out_desc, 1).index(0), room_for(out_desc, 1).index(0)
    order = barriers(STAGES, 1)  # a tile's: the first one's keys are needed for one so many later
    fence_async_shared()  # barriers are there
    matrices = q_ptr, q_stride, add_ptr, add_stride, out_ptr, out_stride, out_desc
    work = half_alpha, scale, bounds_ptr
    to_fill = upper, lower, keys, values
    of_upper, of_lower = (
        (records, upper, keys, values, order),
        (records, lower, keys, values, order),
    )
    lists = ((tiles_ptr, num_tiles_ptr, 0),)
    gl.warp_specialize(
        [
            (_consume, (0, matrices, work, of_upper, upper_out)),
            (_consume, (1, matrices, work, of_lower, lower_out)),
            (_fetch, ((q_desc, k_desc, v_desc), of_schedule, to_fill)),
            (hand_out, (lists, counters_ptr, of_schedule, None, BLOCK, heads)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
