"""y = dropout(norm(a) * silu(u + c)) and its backward: one pass over a and u each way.

The mask of the dropout is a function of the seed and the element's index (the counter-based
generator Philox: Salmon et al., SC 2011), so that the backward draws the same one again.
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Sequence

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
    a: Tensor,
    u: Tensor,
    u_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in a's dtype; mean and 1 / standard deviation of a's rows, float32 [rows]."""
    rows, width = a.shape
    a, u = (t if t.stride(1) == 1 else t.contiguous() for t in (a, u))
    out = torch.empty(rows, width, dtype=a.dtype, device=a.device)
    mean, rstd = torch.empty(2, rows, dtype=torch.float32, device=a.device).unbind()
    if rows:
        block_rows, block, warps = block_shape(max(width, 4))
        gated_norm_forward_kernel[(cdiv(rows, block_rows),)](
            a,
            u,
            u_bias,
            weight,
            bias,
            seed,
            out,
            mean,
            rstd,
            rows,
            a.stride(0),
            u.stride(0),
            eps,
            dropout,
            WIDTH=width,
            ROWS=block_rows,
            COLUMNS=block,
            DROPOUT=seed is not None,
            num_warps=warps,
        )
    return out, mean, rstd


def backward(
    dout: Tensor, saved: Sequence[Tensor], dropout: float, du: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """da in a's dtype, du, and the gradients of u_bias, weight and bias in weight's dtype.

    saved: the forward's tensor arguments, then mean and rstd of its results.
    du: written; as u, perhaps columns of a wider buffer.
    """
    a, u, u_bias, weight, bias, seed, mean, rstd = saved
    rows, width = a.shape
    dout, a, u = (t if t.stride(1) == 1 else t.contiguous() for t in (dout, a, u))
    da = torch.empty(rows, width, dtype=a.dtype, device=a.device)
    # Three sums want registers: half a block, and to have as many bytes under way, one more stage.
    block_rows, block, warps = block_shape(max(width, 4), share=2)
    programs = min(cdiv(rows, block_rows), summing_programs(a.device))
    sums = torch.empty(3, programs, width, dtype=torch.float32, device=a.device)
    if rows:
        gated_norm_backward_kernel[(programs,)](
            dout,
            a,
            u,
            u_bias,
            weight,
            bias,
            seed,
            mean,
            rstd,
            da,
            du,
            sums,
            rows,
            dout.stride(0),
            a.stride(0),
            u.stride(0),
            du.stride(0),
            dropout,
            WIDTH=width,
            ROWS=block_rows,
            COLUMNS=block,
            DROPOUT=seed is not None,
            STAGES=STAGES + 1,
            num_warps=warps,
        )
    du_bias, dweight, dbias = sums.sum(1).to(weight.dtype).unbind()
    return da, du, du_bias, dweight, dbias


@triton.jit
def _mask(seed_ptr, rows, dropout, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """0 or 1 / (1 - dropout) for a block: four neighbours share one draw of four numbers.

    Seven rounds, the fewest at which this generator passes its authors' tests.
    """
    QUADS: tl.constexpr = COLUMNS // 4
    draw = rows[:, None] * QUADS + tl.arange(0, QUADS)[None, :]
    w, x, y, z = tl.rand4x(tl.load(seed_ptr), draw, n_rounds=7)
    numbers = tl.join(tl.join(w, x), tl.join(y, z)).reshape(ROWS, COLUMNS)
    return tl.where(numbers >= dropout, 1 / (1 - dropout), 0.0)


@remembered
@triton.jit(
    do_not_specialize=["num_rows", "eps", "dropout"], do_not_specialize_on_alignment=["rstd_ptr"]
)
def gated_norm_forward_kernel(
    a_ptr,
    u_ptr,
    u_bias_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    a_stride,
    u_stride,
    eps,
    dropout,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    rows, columns, inside = block_at(tl.program_id(0), 0, num_rows, WIDTH, ROWS, COLUMNS)
    a = load_block(a_ptr, a_stride, rows, columns, inside)
    u = load_block(u_ptr, u_stride, rows, columns, inside)
    u_bias = tl.load(u_bias_ptr + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    u = u.to(tl.float32) + u_bias[None, :]
    normed, mean, rstd = normalize(a.to(tl.float32), inside, eps, WIDTH)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    out = (normed * weight[None, :] + bias[None, :]) * (u * tl.sigmoid(u))
    if DROPOUT:
        out *= _mask(seed_ptr, rows, dropout, WIDTH, ROWS, COLUMNS)
    store_block(out_ptr, WIDTH, out, rows, columns, inside)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@remembered
@triton.jit(do_not_specialize=["num_rows", "dropout"], do_not_specialize_on_alignment=["rstd_ptr"])
def gated_norm_backward_kernel(
    dout_ptr,
    a_ptr,
    u_ptr,
    u_bias_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    mean_ptr,
    rstd_ptr,
    da_ptr,
    du_ptr,
    sums_ptr,
    num_rows,
    dout_stride,
    a_stride,
    u_stride,
    du_stride,
    dropout,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Grid: programs, each with every so-manieth block of rows."""
    columns = tl.arange(0, COLUMNS)
    u_bias = tl.load(u_bias_ptr + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    du_bias = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    dweight = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for block in tl.range(
        tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES
    ):
        rows, _, inside = block_at(block, 0, num_rows, WIDTH, ROWS, COLUMNS)
        a = load_block(a_ptr, a_stride, rows, columns, inside)
        u = load_block(u_ptr, u_stride, rows, columns, inside)
        dout = load_block(dout_ptr, dout_stride, rows, columns, inside).to(tl.float32)
        if DROPOUT:
            dout *= _mask(seed_ptr, rows, dropout, WIDTH, ROWS, COLUMNS)
        u = u.to(tl.float32) + u_bias[None, :]
        sigmoid = tl.sigmoid(u)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0)
        normed = tl.where(inside, (a.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)

        # silu'(u) = sigmoid(u) (1 + u (1 - sigmoid(u)))
        slope = sigmoid * (1 + u * (1 - sigmoid))
        du = dout * (normed * weight[None, :] + bias[None, :]) * slope
        store_block(du_ptr, du_stride, du, rows, columns, inside)
        daffine = dout * u * sigmoid
        da = normalize_backward(daffine * weight[None, :], normed, rstd, WIDTH)
        store_block(da_ptr, WIDTH, da, rows, columns, inside)
        du_bias += du
        dweight += daffine * normed
        dbias += daffine
    store_sums(sums_ptr, 0, du_bias, columns, WIDTH)
    store_sums(sums_ptr, 1, dweight, columns, WIDTH)
    store_sums(sums_ptr, 2, dbias, columns, WIDTH)
