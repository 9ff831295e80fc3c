"""Gradients of tensors that are silu(before + bias), taken on to `before` by who has found them.

They are in registers then: what is left of a pass of its own is to read `before`.
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.silu import silu_and_twice_slope


@triton.jit
def through_silu(x, of, rows, inside, part, head, heads, FAST: tl.constexpr):
    """Gradients x [ROWS, DIM] of some rows of a head, taken on; x itself if `of` has no `before`.

    rows: [ROWS], where they stand in `before`; those that are not inside have x = 0.
    of: `before` [T, heads, DIM] or None, its stride from row to row, the bias [heads, DIM], and
    float32 sums over these rows, to be written, [parts, heads, DIM].
    part: which of these, always the same of the same rows: they are added up in this order.
    """
    before_ptr, before_stride, bias_ptr, sums_ptr = of
    if before_ptr is not None:
        ROWS: tl.constexpr = x.shape[0]
        DIM: tl.constexpr = x.shape[1]
        dtype: tl.constexpr = before_ptr.dtype.element_ty
        columns = head * DIM + tl.arange(0, DIM)
        at = rows.to(tl.int64)[:, None] * before_stride + columns[None, :]
        before = tl.load(before_ptr + at, mask=inside[:, None], other=0).to(tl.float32)
        bias = tl.load(bias_ptr + columns).to(tl.float32)[None, :]
        _value, twice_slope = silu_and_twice_slope(before * 0.5 + bias * 0.5, FAST)
        x *= 0.5 * twice_slope
        sums_at = sums_ptr + part.to(tl.int64) * (heads * DIM) + columns
        if dtype.primitive_bitwidth == 16:  # by tensor cores: threads take longer to exchange them
            row = tl.arange(0, ROWS)[:, None]
            ones = tl.full([ROWS, ROWS], 1.0, tl.float32).to(dtype)
            tl.store(sums_at[None, :] + row * 0, tl.dot(ones, x.to(dtype)), mask=row == 0)
        else:
            tl.store(sums_at, tl.sum(x, 0))
    return x
