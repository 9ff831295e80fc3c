"""Blocks of whole rows in registers: their sizes, and the layer norm of each row.

For the kernels between the matrix products, which move bytes and compute little: a program takes
about 2048 elements at a time. Sums over rows (gradients of weights and biases) are kept per
program and added up afterwards by PyTorch, in a fixed order: the same bits in every run.
"""

# ruff: noqa: N803 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from kernels.triton.integers import next_power_of_2
from kernels.triton.launcher import multiprocessors

# Measured on a Hopper GPU at width 1024: 85 to 99 % of a plain copy's bandwidth, 75 with dropout.
ELEMENTS = 2048  # of a program's block, unless a row is longer
WARPS = 4  # for so many
STAGES = 2  # of loops over blocks: while one is in hand, the next is under way
PROGRAMS_PER_PROCESSOR = 8  # of kernels that sum over rows


def block_shape(width: int, share: int = 1) -> tuple[int, int, int]:
    """Rows and columns of a block that holds whole rows of this width; warps for it.

    share: blocks that take the place of one, in kernels that need more registers.
    """
    columns, elements = next_power_of_2(width), ELEMENTS // share
    return max(1, elements // columns), columns, max(1, columns // elements) * WARPS


@cache
def summing_programs(device: torch.device) -> int:
    """How many programs share the rows in kernels that sum over them."""
    if device.type == "cpu":
        return 2
    return PROGRAMS_PER_PROCESSOR * multiprocessors(device)


@triton.jit
def block_at(
    row_block,
    column_block,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows (int64) and columns of a block of a matrix [num_rows, WIDTH]; what of it is inside."""
    rows = tl.cast(row_block, tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
    return rows, columns, (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def load_block(ptr, stride, rows, columns, inside):
    """Of a matrix with so many elements from row to row; zeros outside."""
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0)


@triton.jit
def store_block(ptr, stride, x, rows, columns, inside):
    """x, to the matrix's dtype."""
    at = ptr + rows[:, None] * stride + columns[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def normalize(x, inside, eps, WIDTH: tl.constexpr):
    """(x - mean) / sqrt(var + eps) of each row of x, float32; mean; 1 / sqrt(var + eps)."""
    mean = tl.sum(x, 1) / WIDTH
    centered = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centered * centered, 1) / WIDTH + eps)
    return centered * rstd[:, None], mean, rstd


@triton.jit
def normalize_backward(dnormed, normed, rstd, WIDTH: tl.constexpr):
    """The gradient for x, from those of its normed rows; both 0 outside the row."""
    along_one = tl.sum(dnormed, 1) / WIDTH
    along_normed = tl.sum(dnormed * normed, 1) / WIDTH
    return (dnormed - along_one[:, None] - normed * along_normed[:, None]) * rstd[:, None]


@triton.jit
def store_sums(sums_ptr, index, total, columns, WIDTH: tl.constexpr):
    """The sum over a block's rows into row (index, program) of sums [:, programs, WIDTH]."""
    row = (index * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    tl.store(sums_ptr + row * WIDTH + columns, tl.sum(total, 0), mask=columns < WIDTH)
