"""SiLU over columns of a buffer; its gradient, a cast and the sum over rows in one pass."""

# ruff: noqa: N803 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.rows import STAGES, add_up, block_shape, store_sums, summing_programs

MAX_COLUMNS = 1024  # of a block: here it need not hold whole rows


def silu(x: Tensor) -> Tensor:
    """silu(x), contiguous, in x's dtype. x: [rows, width], rows contiguous in themselves."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        block_rows, block, warps = block_shape(min(width, MAX_COLUMNS))
        grid = (triton.cdiv(rows, block_rows), triton.cdiv(width, block))
        silu_forward_kernel[grid](
            x,
            out,
            rows,
            x.stride(0),
            WIDTH=width,
            ROWS=block_rows,
            COLUMNS=block,
            num_warps=warps,
        )
    return out


def gradient(dout: Tensor, before: Tensor | None, dbefore: Tensor) -> Tensor:
    """dout * silu'(before), or dout if that is None, into dbefore; its sum over rows, float32.

    All [rows, width]; before and dbefore may be columns of wider buffers, dbefore of another dtype.
    """
    rows, width = dout.shape
    dout = dout if dout.stride(1) == 1 else dout.contiguous()
    block_rows, block, warps = block_shape(min(width, MAX_COLUMNS))
    column_blocks = triton.cdiv(width, block)
    most = max(1, summing_programs(dout.device) // column_blocks)
    programs = min(triton.cdiv(rows, block_rows), most)
    sums = torch.empty(1, programs, width, dtype=torch.float32, device=dout.device)
    if rows:
        silu_backward_kernel[(programs, column_blocks)](
            dout,
            before,
            dbefore,
            sums,
            rows,
            dout.stride(0),
            0 if before is None else before.stride(0),
            dbefore.stride(0),
            WIDTH=width,
            ROWS=block_rows,
            COLUMNS=block,
            SILU=before is not None,
            STAGES=STAGES,
            num_warps=warps,
        )
    return add_up(sums)[0]


@triton.jit(do_not_specialize=["num_rows"])
def silu_forward_kernel(
    x_ptr,
    out_ptr,
    num_rows,
    x_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0)
    x = x.to(tl.float32)
    out_at = out_ptr + rows[:, None] * WIDTH + columns[None, :]
    tl.store(out_at, (x * tl.sigmoid(x)).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def silu_backward_kernel(
    dout_ptr,
    before_ptr,
    dbefore_ptr,
    sums_ptr,
    num_rows,
    dout_stride,
    before_stride,
    dbefore_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    SILU: tl.constexpr,
):
    """Grid: programs, each with every so-manieth block of rows, x blocks of columns."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for block in tl.range(
        tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES
    ):
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        dout_at = dout_ptr + rows[:, None] * dout_stride + columns[None, :]
        dbefore = tl.load(dout_at, mask=inside, other=0).to(tl.float32)
        if SILU:
            before_at = before_ptr + rows[:, None] * before_stride + columns[None, :]
            x = tl.load(before_at, mask=inside, other=0).to(tl.float32)
            sigmoid = tl.sigmoid(x)
            # silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x)))
            dbefore *= sigmoid * (1 + x * (1 - sigmoid))
        dbefore_at = dbefore_ptr + rows[:, None] * dbefore_stride + columns[None, :]
        tl.store(dbefore_at, dbefore.to(dbefore_ptr.dtype.element_ty), mask=inside)
        total += dbefore
    store_sums(sums_ptr, 0, total, columns, WIDTH)
