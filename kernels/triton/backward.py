"""Attention backward without atomics: dk and dv per key tile, dq per query tile.

With s = alpha q . k, p = silu(s) and dp = dout . v, all sums over the visible pairs:
dv = scale sum p dout, dk = scale alpha sum silu'(s) dp q, dq = scale alpha sum silu'(s) dp k.
Both kernels recompute s and dp: seven matrix products where one kernel with unordered sums does
five, but no dq traffic, and the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.forward import load_bounds, store_rows, visible
from kernels.triton.runs import (
    FULL_AT,
    FULL_RUNS,
    MASKED_AT,
    MASKED_RUNS,
    RECORD,
    find_block,
    load_runs,
)
from kernels.triton.silu import silu_and_twice_slope


@triton.jit(do_not_specialize=["num_rows", "half_alpha", "scale"])
def key_value_kernel(
    dout_desc,
    q_desc,
    k_desc,
    v_desc,
    dk_ptr,
    dv_ptr,
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
    """dk and dv. Scores are transposed, [keys, queries]. Grid: key tiles x (TILE / BLOCK_N) x HEADS."""
    PARTS: tl.constexpr = TILE // BLOCK_N
    head = tl.program_id(0) % HEADS
    part = tl.program_id(0) // HEADS % PARTS
    record = tiles_ptr + (tl.program_id(0) // (HEADS * PARTS)).to(tl.int64) * RECORD
    row0 = tl.load(record) + part * BLOCK_N
    row_end = tl.load(record + 1)
    if row0 >= row_end:
        return

    k = k_desc.load([row0, head * QK_DIM])
    v = v_desc.load([row0, head * V_DIM])
    dk = tl.zeros([BLOCK_N, QK_DIM], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, V_DIM], dtype=tl.float32)

    blocks, runs = load_runs(record, FULL_AT, FULL_RUNS, BLOCK_M)
    for block in tl.range(0, blocks):
        row, _ = find_block(runs, block, BLOCK_M)
        q = q_desc.load([row, head * QK_DIM])
        scores = tl.dot(k, q.T, input_precision=PRECISION)
        dout = dout_desc.load([row, head * V_DIM])
        dweights = tl.dot(v, dout.T, input_precision=PRECISION)
        weights, slope = silu_and_twice_slope(scores * half_alpha, FAST)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dk = tl.dot((dweights * slope).to(q.dtype), q, dk, input_precision=PRECISION)

    keys = (row0 + tl.arange(0, BLOCK_N))[:, None]
    blocks, runs = load_runs(record, MASKED_AT, MASKED_RUNS, BLOCK_M)
    for block in tl.range(0, blocks):
        row, end = find_block(runs, block, BLOCK_M)
        q = q_desc.load([row, head * QK_DIM])
        scores = tl.dot(k, q.T, input_precision=PRECISION)
        dout = dout_desc.load([row, head * V_DIM])
        dweights = tl.dot(v, dout.T, input_precision=PRECISION)
        weights, slope = silu_and_twice_slope(scores * half_alpha, FAST)
        rows = (row + tl.arange(0, BLOCK_M))[None, :]
        seen = visible(load_bounds(bounds_ptr, num_rows, rows, end), keys)
        weights = tl.where(seen, weights, 0.0)
        dscores = tl.where(seen, dweights * slope, 0.0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)

    store_rows(
        dk_ptr, dk * (scale * half_alpha), row0, row_end, HEADS * QK_DIM, head * QK_DIM, False
    )
    store_rows(dv_ptr, dv * scale, row0, row_end, HEADS * V_DIM, head * V_DIM, False)


@triton.jit(do_not_specialize=["num_rows", "half_alpha", "scale"])
def query_kernel(
    dout_desc,
    q_desc,
    k_desc,
    v_desc,
    dq_ptr,
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
    """dq. Grid: query tiles x (TILE / BLOCK_M) x HEADS."""
    PARTS: tl.constexpr = TILE // BLOCK_M
    head = tl.program_id(0) % HEADS
    part = tl.program_id(0) // HEADS % PARTS
    record = tiles_ptr + (tl.program_id(0) // (HEADS * PARTS)).to(tl.int64) * RECORD
    row0 = tl.load(record) + part * BLOCK_M
    row_end = tl.load(record + 1)
    if row0 >= row_end:
        return

    q = q_desc.load([row0, head * QK_DIM])
    dout = dout_desc.load([row0, head * V_DIM])
    dq = tl.zeros([BLOCK_M, QK_DIM], dtype=tl.float32)

    blocks, runs = load_runs(record, FULL_AT, FULL_RUNS, BLOCK_N)
    for block in tl.range(0, blocks):
        row, _ = find_block(runs, block, BLOCK_N)
        k = k_desc.load([row, head * QK_DIM])
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        v = v_desc.load([row, head * V_DIM])
        dweights = tl.dot(dout, v.T, input_precision=PRECISION)
        _, slope = silu_and_twice_slope(scores * half_alpha, FAST)
        dq = tl.dot((dweights * slope).to(k.dtype), k, dq, input_precision=PRECISION)

    bounds = load_bounds(bounds_ptr, num_rows, (row0 + tl.arange(0, BLOCK_M))[:, None], row_end)
    blocks, runs = load_runs(record, MASKED_AT, MASKED_RUNS, BLOCK_N)
    for block in tl.range(0, blocks):
        row, end = find_block(runs, block, BLOCK_N)
        k = k_desc.load([row, head * QK_DIM])
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        v = v_desc.load([row, head * V_DIM])
        dweights = tl.dot(dout, v.T, input_precision=PRECISION)
        _, slope = silu_and_twice_slope(scores * half_alpha, FAST)
        keys = row + tl.arange(0, BLOCK_N)
        keys = tl.where(keys < end, keys, -1)[None, :]
        dscores = tl.where(visible(bounds, keys), dweights * slope, 0.0)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)

    store_rows(
        dq_ptr, dq * (scale * half_alpha), row0, row_end, HEADS * QK_DIM, head * QK_DIM, False
    )
