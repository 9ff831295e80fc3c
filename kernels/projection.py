"""The two linear layers of an HSTU layer, each with the elementwise work next to it fused.

For layers of a model. `silu_linear` is eq. 1 of arXiv 2402.17152 (U's SiLU is left to
`kernels.gated_norm`), `residual_linear` the end of the layer. Matrix products are PyTorch's; what
is fused are the SiLUs and, backward, their derivative, casts and the sums that bias gradients are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import compute_dtype, takes_triton
from kernels.differentiate import vector_jacobian


def naive_silu_linear(
    x: Tensor, weight: Tensor, bias: Tensor, splits: Sequence[int]
) -> tuple[Tensor, ...]:
    """Columns of x W^T + b: the first of `splits` as they are, the others through silu."""
    first, *others = F.linear(x, weight, bias).split(list(splits), dim=-1)
    return first, *map(F.silu, others)


def silu_linear(
    x: Tensor, weight: Tensor, bias: Tensor, splits: Sequence[int], *, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """[rows, splits[i]] each: columns of x W^T + b, all but the first part through silu.

    x: [rows, in]; weight: [sum(splits), in] and bias [sum(splits)] in any dtype, cast to x's.
    The parts are columns of wider buffers: their rows are strided. Kept for the backward: x and
    the sums before the silu. backend: of the elementwise part, see `kernels.backend`.
    Raises ValueError for shapes that do not fit.
    """
    if weight.shape != (sum(splits), x.shape[-1]) or x.dim() != 2:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)} for x of shape {tuple(x.shape)} and {splits=}"
        )
    return _SiluLinear.apply(x, weight, bias, tuple(splits), takes_triton(backend, x))


def residual_linear(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto"
) -> Tensor:
    """x + y W^T + b in x's dtype: [rows, out].

    x: [rows, out]; y: [rows, in]; weight: [out, in] and bias [out] in any dtype, cast to y's.
    Kept for the backward: y. backend: as in `silu_linear`. Raises ValueError for shapes that do not
    fit.
    """
    if weight.shape != (x.shape[-1], y.shape[-1]) or x.dim() != 2:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)} for x of shape {tuple(x.shape)} and "
            f"y of shape {tuple(y.shape)}"
        )
    return _ResidualLinear.apply(x, y, weight, bias, takes_triton(backend, x))


class _SiluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, splits: tuple[int, ...], triton: bool
    ) -> tuple[Tensor, ...]:
        ctx.splits, ctx.triton = splits, triton
        x = x.to(compute_dtype(x))
        hidden = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
        ctx.save_for_backward(x, weight, hidden)
        first, others = hidden[:, : splits[0]], hidden[:, splits[0] :]
        if triton:
            from kernels.triton import pointwise

            others = pointwise.silu(others)
        else:
            others = F.silu(others)
        return first, *others.split(list(splits[1:]), dim=-1)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, hidden = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        parts = zip(douts, hidden.split(ctx.splits, -1), dhidden.split(ctx.splits, -1), strict=True)
        dbias = []
        for i, (dout, before, dbefore) in enumerate(parts):
            dbias.append(_gradient(dout, before if i else None, dbefore, ctx.triton))
        dx = dhidden @ weight.to(x.dtype)
        dweight = (dhidden.t() @ x).to(weight.dtype)
        return dx, dweight, torch.cat(dbias).to(weight.dtype), None, None


class _ResidualLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, triton: bool
    ) -> Tensor:
        ctx.triton = triton
        ctx.save_for_backward(y, weight)
        return (x + F.linear(y, weight.to(y.dtype), bias.to(y.dtype))).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, weight = ctx.saved_tensors
        dlinear = torch.empty_like(dout, dtype=y.dtype)
        dbias = _gradient(dout, None, dlinear, ctx.triton)
        dy = dlinear @ weight.to(y.dtype)
        dweight = (dlinear.t() @ y).to(weight.dtype)
        return dout, dy, dweight, dbias.to(weight.dtype), None


def _gradient(dout: Tensor, before: Tensor | None, dbefore: Tensor, triton: bool) -> Tensor:
    """dout times silu'(before), or dout alone, into dbefore; returns the sum over its rows."""
    if triton:
        from kernels.triton import pointwise

        return pointwise.gradient(dout, before, dbefore)
    if before is not None:
        (dout,) = vector_jacobian(F.silu, [before], dout)
    dbefore.copy_(dout)
    return dout.sum(0)
