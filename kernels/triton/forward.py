"""Attention forward: one program per query tile and head, walking the key blocks it sees."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.runs import (
    FULL_AT,
    FULL_RUNS,
    MASKED_AT,
    MASKED_RUNS,
    RECORD,
    find_block,
    load_runs,
)
from kernels.triton.silu import silu


@triton.jit
def load_bounds(bounds_ptr, num_rows, rows, end):
    """The key rows [a0, a1) and [b0, b1) that query rows see; nothing from row `end` on."""
    inside = rows < end
    at = bounds_ptr + rows
    a0 = tl.load(at, mask=inside, other=0)
    a1 = tl.load(at + num_rows.to(tl.int64), mask=inside, other=0)
    b0 = tl.load(at + num_rows.to(tl.int64) * 2, mask=inside, other=0)
    b1 = tl.load(at + num_rows.to(tl.int64) * 3, mask=inside, other=0)
    return a0, a1, b0, b1


@triton.jit
def visible(bounds, keys):
    """Which key rows are inside the bounds; shapes broadcast."""
    a0, a1, b0, b1 = bounds
    return ((keys >= a0) & (keys < a1)) | ((keys >= b0) & (keys < b1))


@triton.jit
def store_rows(ptr, x, row0, row_end, row_stride, column0, ADD: tl.constexpr):
    """x [ROWS, COLUMNS] to rows of a matrix, but none from row_end on. ADD: onto what is there."""
    rows = row0 + tl.arange(0, x.shape[0])
    at = rows.to(tl.int64)[:, None] * row_stride + column0 + tl.arange(0, x.shape[1])[None, :]
    inside = (rows < row_end)[:, None]
    if ADD:
        x += tl.load(ptr + at, mask=inside, other=0)
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "half_alpha", "scale"])
def forward_kernel(
    q_desc,
    k_desc,
    v_desc,
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
    ADD: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = scale * sum silu(alpha q . k) v. Grid: query tiles x (TILE / BLOCK_M) x HEADS."""
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

    blocks, runs = load_runs(record, FULL_AT, FULL_RUNS, BLOCK_N)
    for block in tl.range(0, blocks):
        row, _ = find_block(runs, block, BLOCK_N)
        k = k_desc.load([row, head * QK_DIM])
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        weights = silu(scores * half_alpha, FAST)
        v = v_desc.load([row, head * V_DIM])
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

    bounds = load_bounds(bounds_ptr, num_rows, (row0 + tl.arange(0, BLOCK_M))[:, None], row_end)
    blocks, runs = load_runs(record, MASKED_AT, MASKED_RUNS, BLOCK_N)
    for block in tl.range(0, blocks):
        row, end = find_block(runs, block, BLOCK_N)
        k = k_desc.load([row, head * QK_DIM])
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        weights = silu(scores * half_alpha, FAST)
        keys = row + tl.arange(0, BLOCK_N)
        keys = tl.where(keys < end, keys, -1)[None, :]
        weights = tl.where(visible(bounds, keys), weights, 0.0)
        v = v_desc.load([row, head * V_DIM])
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

    store_rows(out_ptr, acc * scale, row0, row_end, HEADS * V_DIM, head * V_DIM, ADD)
