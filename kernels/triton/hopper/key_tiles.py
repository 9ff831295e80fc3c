"""Key tiles for programs that stay: sums of tiles that come in segments."""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc"
from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.triton.hopper.pipeline import CONSUMERS


@gluon.jit
def unknown_zero(block):
    """0, but the compiler does not know. Where an operand of products lies is then found in the
    loop, by the uniform datapath, which has time; not before it, for registers that must spill."""
    return block >> 30


@gluon.jit
def _sums_at(ptr, row, head, heads, sums):
    """Of a segment: pointers to its rows of a float32 buffer [rows, heads, dim]."""
    ROWS: gl.constexpr = sums.shape[0]
    DIM: gl.constexpr = sums.shape[1]
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, sums.type.layout))
    columns = head * DIM + gl.arange(0, DIM, gl.SliceLayout(0, sums.type.layout))
    return ptr + rows.to(gl.int64)[:, None] * (heads * DIM) + columns[None, :]


@gluon.jit
def _sum_of_segments(ptr, row, segments, TILE: gl.constexpr, head, heads, like):
    """The sum over a tile's segments."""
    total = gl.zeros_like(like)
    for segment in range(segments):
        total += gl.load(_sums_at(ptr, row + segment * TILE, head, heads, like))
    return total


@gluon.jit
def add_segments(dk, dv, sums, of_segment, done_ptr, first, head, heads):
    """A half tile's dk and dv, and whether they are complete: those of all segments, for the last
    to be done; it adds them up in order.

    sums: pointers to float32 [segments * rows of a tile, heads, dim]. done_ptr: to int32
    [segments, CONSUMERS, heads], zero before and after.
    """
    sums_k_ptr, sums_v_ptr = sums
    segment, segments, slot = of_segment
    TILE: gl.constexpr = dk.shape[0] * CONSUMERS
    last = True
    if segments > 1:
        row = slot * TILE + first
        gl.store(_sums_at(sums_k_ptr, row + segment * TILE, head, heads, dk), dk)
        gl.store(_sums_at(sums_v_ptr, row + segment * TILE, head, heads, dv), dv)
        tl.debug_barrier()  # all threads have stored
        done_at = done_ptr + (slot * CONSUMERS + first // dk.shape[0]) * heads + head
        last = gl.atomic_add(done_at, 1) == segments - 1
        if last:
            gl.store(done_at, 0)  # as the next launch wants it
            dk = _sum_of_segments(sums_k_ptr, row, segments, TILE, head, heads, dk)
            dv = _sum_of_segments(sums_v_ptr, row, segments, TILE, head, heads, dv)
    return dk, dv, last
