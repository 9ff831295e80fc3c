"""The layer norm that opens a residual branch, x + branch(norm(x)): forward and backward fused.

For layers of a model. The backward adds the gradient that comes past the branch in the same pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import accumulator, check_devices, compute_dtype, takes_triton
from kernels.differentiate import vector_jacobian


def naive_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias of each row, in float32 at least; to `dtype`."""
    compute = accumulator(x.dtype)
    out = F.layer_norm(x.to(compute), x.shape[1:], weight.to(compute), bias.to(compute), eps)
    return out.to(dtype)


def branch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """norm(x), for the branch, and a copy of x, to which `residual_linear` adds the branch's end.

    x: [rows, width], rows contiguous in themselves. weight, bias: [width].
    Returns [rows, width] in the dtype of matrix products (autocast's), and in x's. The gradient of
    the copy is added inside the norm's backward. Kept for the backward: x and two float32 numbers a
    row. backend: see `kernels.backend`.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x: want floats [rows, width], got {x.dtype} {tuple(x.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != x.shape[1:]:
            raise ValueError(f"{name}: shape {tuple(vector.shape)} for rows of width {x.shape[1]}")
    check_devices(x=x, weight=weight, bias=bias)
    triton = takes_triton(backend, x)
    return _BranchNorm.apply(x, weight.contiguous(), bias.contiguous(), eps, triton)


class _BranchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, triton: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.eps, ctx.triton, dtype = eps, triton, compute_dtype(x)
        if triton:
            from kernels.triton import layer_norm

            out, past, mean, rstd = layer_norm.forward(x, weight, bias, eps, dtype)
            ctx.save_for_backward(x, weight, mean, rstd)
        else:
            out, past = naive_layer_norm(x, weight, bias, eps, dtype), x.clone()
            ctx.save_for_backward(x, weight, bias)
        return out, past

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dx_past: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.triton:
            from kernels.triton import layer_norm

            x, weight, mean, rstd = ctx.saved_tensors
            grads = layer_norm.backward(dout, dx_past, x, weight, mean, rstd)
            return *grads, None, None

        def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return naive_layer_norm(x, weight, bias, ctx.eps, dout.dtype)

        dx, dweight, dbias = vector_jacobian(norm, ctx.saved_tensors, dout)
        return dx + dx_past, dweight, dbias, None, None
