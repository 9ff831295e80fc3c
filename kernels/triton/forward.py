"""Attention forward: one program per query tile and head, walking the key blocks it sees."""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.runs import RECORD, find_block, load_runs
from kernels.triton.silu import UNSEEN, silu


@triton.jit
def load_bounds(bounds_ptr, num_rows, queries, end, AXIS: tl.constexpr):
    """What queries see, none from `end` on: key rows [low, high) but for a hole [low, high).

    AXIS: 1 makes them a column, for scores [queries, keys]; 0 a row.
    """
    inside = queries < end
    at = bounds_ptr + queries
    low = tl.load(at, mask=inside, other=0)
    high = tl.load(at + num_rows.to(tl.int64), mask=inside, other=0)
    hole_low = tl.load(at + num_rows.to(tl.int64) * 2, mask=inside, other=0)
    hole_high = tl.load(at + num_rows.to(tl.int64) * 3, mask=inside, other=0)
    return (
        tl.expand_dims(low, AXIS),
        tl.expand_dims(high, AXIS),
        tl.expand_dims(hole_low, AXIS),
        tl.expand_dims(hole_high, AXIS),
    )


@triton.jit
def sees(bounds, keys):
    """Which pairs are visible. Queries may be the rows or the columns."""
    low, high, hole_low, hole_high = bounds
    return (keys >= low) & (keys < high) & ((keys < hole_low) | (keys >= hole_high))


@triton.jit
def store_rows(ptr, add_ptr, x, row0, row_end, row_stride, column0):
    """x [ROWS, COLUMNS] to rows of a matrix, but none from row_end on.

    add_ptr: another matrix, whose rows are added first; None for none, `ptr` itself if you like.
    """
    rows = row0 + tl.arange(0, x.shape[0])
    at = rows.to(tl.int64)[:, None] * row_stride + column0 + tl.arange(0, x.shape[1])[None, :]
    inside = (rows < row_end)[:, None]
    if add_ptr is not None:
        x += tl.load(add_ptr + at, mask=inside, other=0)
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "half_alpha", "scale"])
def forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    add_ptr,
    out_ptr,
    tiles_ptr,
    bounds_ptr,
    num_rows,
    half_alpha,
    scale,
    HEADS: tl.constexpr,
    QK_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = add + scale * sum silu(alpha q . k) v. Grid: query tiles x (TILE / BLOCK_M) x HEADS."""
    PARTS: tl.constexpr = TILE // BLOCK_M
    head = tl.program_id(0) % HEADS
    part = tl.program_id(0) // HEADS % PARTS
    record = tiles_ptr + (tl.program_id(0) // (HEADS * PARTS)).to(tl.int64) * RECORD
    row0 = tl.load(record) + part * BLOCK_M
    row_end = tl.load(record + 1)
    if row0 >= row_end:
        return

    q = q_desc.load([row0, head * QK_DIM])
    acc = tl.zeros([BLOCK_M, V_DIM], dtype=tl.float32)
    queries = row0 + tl.arange(0, BLOCK_M)
    blocks, full_blocks, runs = load_runs(record, BLOCK_N)
    for masked in tl.static_range(2):  # two loops: the full blocks' never looks at the mask
        if masked:
            bounds = load_bounds(bounds_ptr, num_rows, queries, row_end, 1)
        for block in tl.range(full_blocks * masked, blocks if masked else full_blocks):
            row = find_block(runs, block, BLOCK_N)
            k = k_desc.load([row, head * QK_DIM])
            half_scores = tl.dot(q, k.T, input_precision=PRECISION) * half_alpha
            if masked:
                keys = (row + tl.arange(0, BLOCK_N))[None, :]
                half_scores = tl.where(sees(bounds, keys), half_scores, UNSEEN)
            weights = silu(half_scores, FAST)
            v = v_desc.load([row, head * V_DIM])
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

    store_rows(out_ptr, add_ptr, acc * scale, row0, row_end, HEADS * V_DIM, head * V_DIM)
