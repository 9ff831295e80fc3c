"""Layer norm and a copy of rows; its backward together with the gradient of the copy."""

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
    normalize,
    normalize_backward,
    store_block,
    store_sums,
    summing_programs,
)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """norm(x) in `dtype`; x; mean and 1 / standard deviation of each row, float32 [rows]."""
    rows, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(rows, width, dtype=dtype, device=x.device)
    past = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    mean, rstd = torch.empty(2, rows, dtype=torch.float32, device=x.device).unbind()
    if rows:
        block_rows, block, warps = block_shape(width)
        layer_norm_forward_kernel[(cdiv(rows, block_rows),)](
            x,
            weight,
            bias,
            out,
            past,
            mean,
            rstd,
            rows,
            x.stride(0),
            eps,
            WIDTH=width,
            ROWS=block_rows,
            COLUMNS=block,
            num_warps=warps,
        )
    return out, past, mean, rstd


def backward(
    dout: Tensor, dx_past: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dx_past added, in x's dtype; dweight and dbias in weight's."""
    rows, width = x.shape
    dout, dx_past, x = (t if t.stride(1) == 1 else t.contiguous() for t in (dout, dx_past, x))
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    block_rows, block, warps = block_shape(width)
    programs = min(cdiv(rows, block_rows), summing_programs(x.device))
    sums = torch.empty(2, programs, width, dtype=torch.float32, device=x.device)
    if rows:
        layer_norm_backward_kernel[(programs,)](
            dout,
            dx_past,
            x,
            weight,
            mean,
            rstd,
            dx,
            sums,
            rows,
            dout.stride(0),
            dx_past.stride(0),
            x.stride(0),
            WIDTH=width,
            ROWS=block_rows,
            COLUMNS=block,
            STAGES=STAGES,
            num_warps=warps,
        )
    dweight, dbias = sums.sum(1).to(weight.dtype).unbind()
    return dx, dweight, dbias


@remembered
@triton.jit(do_not_specialize=["num_rows", "eps"], do_not_specialize_on_alignment=["rstd_ptr"])
def layer_norm_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    past_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    x_stride,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, inside = block_at(tl.program_id(0), 0, num_rows, WIDTH, ROWS, COLUMNS)
    x = load_block(x_ptr, x_stride, rows, columns, inside)
    normed, mean, rstd = normalize(x.to(tl.float32), inside, eps, WIDTH)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    out = normed * weight[None, :] + bias[None, :]
    store_block(out_ptr, WIDTH, out, rows, columns, inside)
    store_block(past_ptr, WIDTH, x, rows, columns, inside)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@remembered
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["rstd_ptr"])
def layer_norm_backward_kernel(
    dout_ptr,
    dx_past_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    sums_ptr,
    num_rows,
    dout_stride,
    dx_past_stride,
    x_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: programs, each with every so-manieth block of rows."""
    columns = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    dweight = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for block in tl.range(
        tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES
    ):
        rows, _, inside = block_at(block, 0, num_rows, WIDTH, ROWS, COLUMNS)
        x = load_block(x_ptr, x_stride, rows, columns, inside)
        dout = load_block(dout_ptr, dout_stride, rows, columns, inside).to(tl.float32)
        past = load_block(dx_past_ptr, dx_past_stride, rows, columns, inside).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0)
        normed = tl.where(inside, (x.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        dx = past + normalize_backward(dout * weight[None, :], normed, rstd, WIDTH)
        store_block(dx_ptr, WIDTH, dx, rows, columns, inside)
        dweight += dout * normed
        dbias += dout
    store_sums(sums_ptr, 0, dweight, columns, WIDTH)
    store_sums(sums_ptr, 1, dbias, columns, WIDTH)
