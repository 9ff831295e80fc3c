"""Gradients of tensors that are silu(before + bias), taken on to `before` by who has found them.

They are in the cache then: what is left of a pass of its own is to read `before`.
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.silu import silu_and_twice_slope

CHUNK = tl.constexpr(64)  # columns at a time: a program's registers were full before


@triton.jit
def through_silu(
    ptr,
    stride,
    of,
    rows,
    inside,
    head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    FAST: tl.constexpr,
):
    """Of gradients [T, HEADS, DIM], those that a program has stored: some rows of a head.

    of: None, or `before`, laid out in the same way, and its stride from row to row; the bias
    [HEADS, DIM]; and float32 sums over these rows, to be written, [programs of a head, HEADS, DIM].
    """
    before_ptr, before_stride, bias_ptr, sums_ptr = of
    if before_ptr is not None:
        tl.debug_barrier()  # all threads have stored
        COLUMNS: tl.constexpr = min(CHUNK, DIM)
        part = (tl.program_id(0) // HEADS).to(tl.int64)
        rows = rows.to(tl.int64)[:, None]
        for start in tl.range(0, DIM, COLUMNS, num_stages=1):
            columns = head * DIM + start + tl.arange(0, COLUMNS)
            at = ptr + rows * stride + columns[None, :]
            dout = tl.load(at, mask=inside[:, None], other=0).to(tl.float32)
            at_before = before_ptr + rows * before_stride + columns[None, :]
            before = tl.load(at_before, mask=inside[:, None], other=0).to(tl.float32)
            before += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
            _value, slope = silu_and_twice_slope(before * 0.5, FAST)
            dbefore = dout * (slope * 0.5)
            tl.store(at, dbefore.to(ptr.dtype.element_ty), mask=inside[:, None])
            tl.store(sums_ptr + part * (HEADS * DIM) + columns, tl.sum(dbefore, 0))
