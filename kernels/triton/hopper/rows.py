"""The rows of a tile, as a warpgroup that computes half of them needs them.

`rows` is what `load_rows` says of a tile; `first` where in the tile the half begins.
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc"
from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from kernels.triton.silu import UNSEEN


@gluon.jit
def _rows_at(rows, at):
    """The tile's rows at `at`, and which of them there are."""
    row0, own, rider0, count = rows
    return gl.where(at < own, row0, rider0 - own) + at, at < count


@gluon.jit
def _matrix_at(
    ptr, stride, rows, first, column, ROWS: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr
):
    """Pointers to the half's rows, from a column on; where in the tile they are; which exist."""
    at = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    row, inside = _rows_at(rows, at)
    columns = column + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    pointers = ptr + row.to(gl.int64)[:, None] * stride + columns[None, :]
    return pointers, at[:, None], inside[:, None]


@gluon.jit
def load_riders(q, q_ptr, q_stride, rows, first, column):
    """Complete the half's rows in shared memory, where the tile's own were fetched, by riders; and
    by zeros, which take the tensor cores less power than what was fetched of other sequences."""
    ROWS: gl.constexpr = q.shape[0]
    WIDTH: gl.constexpr = q.shape[1]
    layout: gl.constexpr = _as_in_memory(WIDTH)
    pointers, at, inside = _matrix_at(q_ptr, q_stride, rows, first, column, ROWS, WIDTH, layout)
    own = at < rows[1]
    riders = gl.load(pointers, mask=inside & ~own, other=0)
    q.store(gl.where(own, q.load(layout), riders))
    fence_async_shared()  # tensor cores read it
    tl.debug_barrier()  # here, not in the loop that reads it


@gluon.jit
def clear_rows(x, count):
    """Rows in shared memory from `count` on."""
    layout: gl.constexpr = _as_in_memory(x.shape[1])
    inside = gl.arange(0, x.shape[0], gl.SliceLayout(1, layout)) < count
    x.store(gl.where(inside[:, None], x.load(layout), 0))
    fence_async_shared()  # tensor cores read it
    tl.debug_barrier()  # here, not in the loop that reads it


@gluon.constexpr_function
def _as_in_memory(width):
    """A layout for rows that are read and written: a thread has 16 bytes of a 16-bit row."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.jit
def load_added(
    ptr, stride, rows, first, column, ROWS: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr
):
    pointers, _at, inside = _matrix_at(ptr, stride, rows, first, column, ROWS, WIDTH, layout)
    return gl.load(pointers, mask=inside, other=0).to(gl.float32)


@gluon.jit
def store_rows(ptr, stride, x, rows, first, column):
    """x, all of the half, to where there are rows."""
    ROWS: gl.constexpr = x.shape[0]
    WIDTH: gl.constexpr = x.shape[1]
    # Of float32, a warp writes whole sectors as the numbers are; there is no room to sort them.
    layout: gl.constexpr = x.type.layout if x.dtype == gl.float32 else _as_in_memory(WIDTH)
    pointers, _at, inside = _matrix_at(ptr, stride, rows, first, column, ROWS, WIDTH, layout)
    gl.store(pointers, gl.convert_layout(x, layout), mask=inside)


@gluon.jit
def copy_rows(ptr, stride, desc, x, rows, first, column, staged):
    """The same by way of shared memory, which nothing may be copied from any more, and which is
    there again after `tma.store_wait`. desc: of the half's rows, or None; asynchronously, if they
    all are the tile's own."""
    ROWS: gl.constexpr = x.shape[0]
    WIDTH: gl.constexpr = x.shape[1]
    staged.store(x)
    fence_async_shared()  # copies read it, or write there next
    whole = False
    if desc is not None:
        whole = first + ROWS <= rows[1]
        if whole:
            tma.async_copy_shared_to_global(desc, [rows[0] + first, column], staged)
    if not whole:
        layout: gl.constexpr = _as_in_memory(WIDTH)
        pointers, _at, inside = _matrix_at(ptr, stride, rows, first, column, ROWS, WIDTH, layout)
        gl.store(pointers, staged.load(layout), mask=inside)


@gluon.jit
def write(of, x, rows, first, column, staged):
    """x, plus what there is to add to it; of 16 bits by way of `staged`, unless that is None."""
    ptr, stride, desc, add_ptr, add_stride = of
    if add_ptr is not None:
        ROWS: gl.constexpr = x.shape[0]
        WIDTH: gl.constexpr = x.shape[1]
        layout: gl.constexpr = x.type.layout
        x += load_added(add_ptr, add_stride, rows, first, column, ROWS, WIDTH, layout)
    out = x.to(ptr.dtype.element_ty)
    if staged is None or not (out.dtype == gl.bfloat16 or out.dtype == gl.float16):
        store_rows(ptr, stride, out, rows, first, column)
    else:
        room_layout: gl.constexpr = staged.layout if desc is None else desc.layout
        room = staged._reinterpret(out.dtype, [out.shape[0], out.shape[1]], room_layout)
        copy_rows(ptr, stride, desc, out, rows, first, column, room)


@gluon.jit
def load_bounds(bounds_ptr, rows, first, ROWS: gl.constexpr, layout: gl.constexpr):
    """Both intervals of key rows that the half's queries see, [low, high) and [low, high); empty
    ones of rows that there are not."""
    row, inside = _rows_at(rows, first + gl.arange(0, ROWS, layout))
    at = bounds_ptr + row.to(gl.int64) * 4
    low1 = gl.load(at, mask=inside, other=0)
    high1 = gl.load(at + 1, mask=inside, other=0)
    low2 = gl.load(at + 2, mask=inside, other=0)
    high2 = gl.load(at + 3, mask=inside, other=0)
    return low1, high1, low2, high2


@gluon.jit
def hide(half_scores, row, low, high):
    """half_scores [queries, keys] where the keys, those from `row` on, lie in [low, high)."""
    columns: gl.constexpr = gl.SliceLayout(0, half_scores.type.layout)
    keys = (row + gl.arange(0, half_scores.shape[1], columns))[None, :]
    return gl.where(between(keys, low[:, None], high[:, None]), half_scores, UNSEEN)


@gluon.jit
def between(x, low, high):
    """low <= x < high, by one comparison an element."""
    return (x - low).to(gl.uint32) < gl.maximum(high - low, 0).to(gl.uint32)
