"""silu(x + bias) over columns of a buffer; its gradients, the bias's too, in one pass."""

# ruff: noqa: N803 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.integers import cdiv
from kernels.triton.launcher import remembered
from kernels.triton.rows import (
    STAGES,
    block_at,
    block_shape,
    load_block,
    store_block,
    store_sums,
    summing_programs,
)

MIN_COLUMNS, MAX_COLUMNS = 128, 1024


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """silu(x + bias), contiguous, in x's dtype. x: [rows, width], rows contiguous in themselves."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        block_rows, block, warps = block_shape(_columns(width))
        grid = (cdiv(rows, block_rows), cdiv(width, block))
        silu_forward_kernel[grid](
            x,
            bias,
            out,
            rows,
            x.stride(0),
            WIDTH=width,
            ROWS=block_rows,
            COLUMNS=block,
            num_warps=warps,
        )
    return out


def backward(dout: Tensor, x: Tensor, bias: Tensor, dx: Tensor) -> Tensor:
    """dout * silu'(x + bias) into dx; its sum over rows, float32.

    dout, x, dx: [rows, width], x and dx perhaps columns of wider buffers.
    """
    rows, width = dout.shape
    dout = dout if dout.stride(1) == 1 else dout.contiguous()
    block_rows, block, warps = block_shape(_columns(width))
    column_blocks = cdiv(width, block)
    most = max(1, summing_programs(dout.device) // column_blocks)
    programs = min(cdiv(rows, block_rows), most)
    sums = torch.empty(1, programs, width, dtype=torch.float32, device=dout.device)
    if rows:
        silu_backward_kernel[(programs, column_blocks)](
            dout,
            x,
            bias,
            dx,
            sums,
            rows,
            dout.stride(0),
            x.stride(0),
            dx.stride(0),
            WIDTH=width,
            ROWS=block_rows,
            COLUMNS=block,
            STAGES=STAGES,
            num_warps=warps,
        )
    return sums[0].sum(0)


def _columns(width: int) -> int:
    """Of a block, which here need not hold whole rows. A power of two, if many of it are a row."""
    divisor = width & -width
    return min(divisor if divisor >= MIN_COLUMNS else width, MAX_COLUMNS)


@remembered
@triton.jit(do_not_specialize=["num_rows"])
def silu_forward_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    x_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row_block, column_block = tl.program_id(0), tl.program_id(1)
    rows, columns, inside = block_at(row_block, column_block, num_rows, WIDTH, ROWS, COLUMNS)
    x = load_block(x_ptr, x_stride, rows, columns, inside)
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    x = x.to(tl.float32) + bias[None, :]
    store_block(out_ptr, WIDTH, x * tl.sigmoid(x), rows, columns, inside)


@remembered
@triton.jit(do_not_specialize=["num_rows"])
def silu_backward_kernel(
    dout_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    sums_ptr,
    num_rows,
    dout_stride,
    x_stride,
    dx_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: programs, each with every so-manieth block of rows, x blocks of columns."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for block in tl.range(
        tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES
    ):
        rows, _, inside = block_at(block, tl.program_id(1), num_rows, WIDTH, ROWS, COLUMNS)
        dout = load_block(dout_ptr, dout_stride, rows, columns, inside).to(tl.float32)
        x = load_block(x_ptr, x_stride, rows, columns, inside)
        x = x.to(tl.float32) + bias[None, :]
        sigmoid = tl.sigmoid(x)
        # silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x)))
        dx = dout * sigmoid * (1 + x * (1 - sigmoid))
        store_block(dx_ptr, dx_stride, dx, rows, columns, inside)
        total += dx
    store_sums(sums_ptr, 0, total, columns, WIDTH)
