"""Key tiles for programs that stay: who sees them, and sums of tiles that come in segments."""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc"
from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.triton.hopper.pipeline import CONSUMERS, take
from kernels.triton.hopper.rows import between
from kernels.triton.silu import UNSEEN


@gluon.jit
def hide_keys(half_scores, ring, n, by_second, row, end, key_row):
    """half_scores [keys, queries] where the queries of a block, those from `row` on and before
    `end`, see the keys by one of their intervals. ring: bounds of such blocks, this one's n-th: to
    be given away when the scores have been used. (Given away sooner, after a barrier behind the
    reads, they were seen to change in the midst of a read: TMA does not wait for reads that are
    still queued.)"""
    layout: gl.constexpr = half_scores.type.layout
    bounds = take(ring, n)[0]
    queries = (row + gl.arange(0, half_scores.shape[1], gl.SliceLayout(0, layout)))[None, :]
    keys = (key_row + gl.arange(0, half_scores.shape[0], gl.SliceLayout(1, layout)))[:, None]
    # As it came: for want of a swizzle, no other order than that of memory.
    rows_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    shape: gl.constexpr = [half_scores.shape[1], 4]
    of_rows = bounds._reinterpret(gl.int32, shape, rows_layout).permute([1, 0])
    low = gl.where(by_second, of_rows.slice(2, 1).load(layout), of_rows.slice(0, 1).load(layout))
    high = gl.where(by_second, of_rows.slice(3, 1).load(layout), of_rows.slice(1, 1).load(layout))
    seen = between(keys, low, gl.where(queries < end, high, low))
    return gl.where(seen, half_scores, UNSEEN)


@gluon.jit
def unknown_zero(block):
    """0, but the compiler does not know. Where an operand of products lies is then found in the
    loop, by the uniform datapath, which has time; not before it, for registers that must spill."""
    return block >> 30


@gluon.jit
def _sums_at(ptr, row, head, HEADS: gl.constexpr, sums):
    """Of a segment: pointers to its rows of a float32 buffer [rows, HEADS, dim]."""
    ROWS: gl.constexpr = sums.shape[0]
    DIM: gl.constexpr = sums.shape[1]
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, sums.type.layout))
    columns = head * DIM + gl.arange(0, DIM, gl.SliceLayout(0, sums.type.layout))
    return ptr + rows.to(gl.int64)[:, None] * (HEADS * DIM) + columns[None, :]


@gluon.jit
def _sum_of_segments(ptr, row, segments, TILE: gl.constexpr, head, HEADS: gl.constexpr, like):
    """The sum over a tile's segments."""
    total = gl.zeros_like(like)
    for segment in range(segments):
        total += gl.load(_sums_at(ptr, row + segment * TILE, head, HEADS, like))
    return total


@gluon.jit
def add_segments(dk, dv, sums, of_segment, done_ptr, first, head, HEADS: gl.constexpr):
    """A half tile's dk and dv, and whether they are complete: those of all segments, for the last
    to be done; it adds them up in order.

    sums: pointers to float32 [segments * rows of a tile, HEADS, dim]. done_ptr: to int32
    [segments, CONSUMERS, HEADS], zero before and after.
    """
    sums_k_ptr, sums_v_ptr = sums
    segment, segments, slot = of_segment
    TILE: gl.constexpr = dk.shape[0] * CONSUMERS
    last = True
    if segments > 1:
        row = slot * TILE + first
        gl.store(_sums_at(sums_k_ptr, row + segment * TILE, head, HEADS, dk), dk)
        gl.store(_sums_at(sums_v_ptr, row + segment * TILE, head, HEADS, dv), dv)
        tl.debug_barrier()  # all threads have stored
        done_at = done_ptr + (slot * CONSUMERS + first // dk.shape[0]) * HEADS + head
        last = gl.atomic_add(done_at, 1) == segments - 1
        if last:
            gl.store(done_at, 0)  # as the next launch wants it
            dk = _sum_of_segments(sums_k_ptr, row, segments, TILE, head, HEADS, dk)
            dv = _sum_of_segments(sums_v_ptr, row, segments, TILE, head, HEADS, dv)
    return dk, dv, last
