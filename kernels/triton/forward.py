"""Attention forward: one program per query tile and head, walking the key blocks it sees.

Keys may be those of two sources, the second perhaps still on its way when the kernel begins. What
finds it there when it has done with the first goes on with it; what does not leaves its sums to a
program that comes later: in the same launch, if that finds it, or in the next. Nothing waits, and
results are the same, bit by bit.
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.launcher import remembered
from kernels.triton.runs import (
    KINDS,
    RECORD,
    find_block,
    goes_on,
    leave,
    load_runs,
    query_rows,
    query_tile_at,
)
from kernels.triton.silu import UNSEEN, silu


@triton.jit
def load_bounds(bounds_ptr, interval: tl.constexpr, queries, inside, AXIS: tl.constexpr):
    """One of two intervals of key rows [low, high) that queries see, empty if not `inside`.

    AXIS: 1 makes them a column, for scores [queries, keys]; 0 a row.
    """
    at = bounds_ptr + queries.to(tl.int64) * 4 + 2 * interval
    low = tl.load(at, mask=inside, other=0)
    high = tl.load(at + 1, mask=inside, other=0)
    return tl.expand_dims(low, AXIS), tl.expand_dims(high, AXIS)


@triton.jit
def load_rows(ptr, rows, inside, row_stride, column0, COLUMNS: tl.constexpr):
    """Rows of a matrix [ROWS, COLUMNS], zeros for those that are not inside."""
    at = rows.to(tl.int64)[:, None] * row_stride + column0 + tl.arange(0, COLUMNS)[None, :]
    return tl.load(ptr + at, mask=inside[:, None], other=0)


@triton.jit
def store_rows(ptr, stride, add_ptr, add_stride, x, rows, inside, column0):
    """x [ROWS, COLUMNS] to rows of a matrix, but for those that are not inside.

    add_ptr: another matrix, whose rows are added first; None for none, `ptr` itself if you like.
    Strides are from row to row.
    """
    columns = column0 + tl.arange(0, x.shape[1])[None, :]
    rows = rows.to(tl.int64)[:, None]
    if add_ptr is not None:
        x += tl.load(add_ptr + rows * add_stride + columns, mask=inside[:, None], other=0)
    tl.store(ptr + rows * stride + columns, x.to(ptr.dtype.element_ty), mask=inside[:, None])


# Sources come last among the arguments of every kernel, the second of them None for none.
UNSPECIALIZED = [
    *("heads", "half_alpha", "scale", "count", "again_from", "agains"),
    *("key_parts", "query_parts"),
]


@remembered
@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q_ptr,
    q_stride,
    add_ptr,
    add_stride,
    out_ptr,
    out_stride,
    tiles_ptr,
    heads,
    half_alpha,
    scale,
    counter_ptr,
    count,
    left_ptr,
    again_from,
    agains,
    sums_ptr,
    k_desc,
    v_desc,
    bounds_ptr,
    next_k_desc,
    next_v_desc,
    next_bounds_ptr,
    QK_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """out = scale * (add / scale + sum silu(alpha q . k) v).

    Grid: query tiles x (TILE / BLOCK_M) x heads, and `agains`. With a counter, tiles whose second
    source has not come are left, with float32 sums [Tq, heads, V_DIM].
    """
    PARTS: tl.constexpr = TILE // BLOCK_M
    left = counter_ptr, count, left_ptr, again_from, agains
    turn, tile, found, some = query_tile_at(tiles_ptr, *left, heads, PARTS, SOURCES, BLOCK_M)
    if not some:
        return
    place, again = turn
    head, part, record = tile
    queries, inside = found

    q = load_rows(q_ptr, queries, inside, q_stride, head * QK_DIM, QK_DIM)
    if add_ptr is None:
        acc = tl.zeros([BLOCK_M, V_DIM], dtype=tl.float32)
    else:  # now, not at the end: there is no room for it beside the sums then
        acc = load_rows(add_ptr, queries, inside, add_stride, head * V_DIM, V_DIM) / scale
    if left_ptr is not None:  # noqa: SIM102 (known to the compiler)
        if again:
            acc = load_rows(sums_ptr, queries, inside, heads * V_DIM, head * V_DIM, V_DIM)
    blocks: tl.constexpr = (BLOCK_N, FAST, PRECISION)
    mask = queries, inside, bounds_ptr
    acc = _attend(acc, q, k_desc, v_desc, record, mask, head, half_alpha, again, blocks)
    if SOURCES == 2:
        if left_ptr is not None:  # noqa: SIM102 (known to the compiler)
            if not goes_on(counter_ptr, count, again):
                rows, real, _ = query_rows(record, part, BLOCK_M)
                store_rows(sums_ptr, heads * V_DIM, None, 0, acc, rows, real, head * V_DIM)
                leave(left_ptr, place)
                return
        mask = queries, inside, next_bounds_ptr
        record += RECORD
        keys = next_k_desc, next_v_desc
        acc = _attend(acc, q, *keys, record, mask, head, half_alpha, False, blocks)

    queries, inside, _ = query_rows(record, part, BLOCK_M)  # again: registers are dear
    out = acc * scale
    store_rows(out_ptr, out_stride, None, 0, out, queries, inside, head * V_DIM)


@triton.jit
def _attend(acc, q, k_desc, v_desc, record, mask, head, half_alpha, done, BLOCKS: tl.constexpr):
    """acc plus the sum over one source, unless it has been done already."""
    queries, inside, bounds_ptr = mask
    BLOCK_N: tl.constexpr = BLOCKS[0]
    FAST: tl.constexpr = BLOCKS[1]
    PRECISION: tl.constexpr = BLOCKS[2]
    for kind in tl.static_range(KINDS):  # a loop each: the full blocks' never looks at the mask
        blocks, runs = load_runs(record, kind, 2, BLOCK_N)
        blocks = tl.where(done, 0, blocks)
        if kind > 0:
            low, high = load_bounds(bounds_ptr, kind - 1, queries, inside, 1)
        for block in tl.range(blocks):
            row, _ = find_block(runs, block, BLOCK_N)
            k = k_desc.load([row, head * q.shape[1]])
            half_scores = tl.dot(q, k.T, input_precision=PRECISION) * half_alpha
            if kind > 0:
                keys = (row + tl.arange(0, BLOCK_N))[None, :]
                half_scores = tl.where((keys >= low) & (keys < high), half_scores, UNSEEN)
            weights = silu(half_scores, FAST)
            v = v_desc.load([row, head * acc.shape[1]])
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc
