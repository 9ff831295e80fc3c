"""y = dropout(norm(a) * silu(u + c)): what HSTU puts between attention and its output projection.

For layers of a model (arXiv 2402.17152, eq. 3, with the bias and the SiLU of eq. 1 for U). One pass
over a and u each way. The mask of the dropout is a function of a seed: it is never stored.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import accumulator, check_devices, takes_triton
from kernels.differentiate import vector_jacobian
from kernels.norm import naive_layer_norm
from kernels.projection import GradientBuffer


def naive_gated_norm(
    a: Tensor,
    u: Tensor,
    u_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mask: Tensor | None = None,
) -> Tensor:
    """norm(a) * silu(u + u_bias) * mask in float32 at least, to a's dtype. mask: as a, or None."""
    compute = accumulator(a.dtype)
    gate = F.silu(u.to(compute) + u_bias.to(compute))
    out = naive_layer_norm(a, weight, bias, eps, compute) * gate
    return (out if mask is None else out * mask).to(a.dtype)


def naive_dropout_mask(seed: Tensor, shape: torch.Size, dropout: float) -> Tensor:
    """0 with probability `dropout`, else 1 / (1 - dropout). Other draws than Triton's."""
    generator = torch.Generator(seed.device).manual_seed(int(seed))
    kept = torch.rand(shape, generator=generator, device=seed.device) >= dropout
    return kept / (1 - dropout)


def draw_seed(device: torch.device) -> Tensor:
    """A seed for one call: int64 [1] on the device, by PyTorch's generator there; no waiting."""
    return torch.randint(2**62, (1,), device=device)


def gated_norm(
    a: Tensor,
    u: Tensor,
    u_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    u_gradient: GradientBuffer | None = None,
    backend: str = "auto",
) -> Tensor:
    """dropout(norm(a) * silu(u + u_bias)), [rows, width] in a's dtype; weight and bias are norm's.

    a, u: [rows, width] of one dtype; u may be columns of a wider buffer. u_bias, weight, bias:
        [width].
    u_gradient: of the `silu_linear` that made u, whose backward then finds u's gradient in place.
    dropout: probability of a zero, in [0, 1); wants seed, int64 [1] (`draw_seed`). The same seed
    drops the same elements, in the forward, the backward and when computed again.
    Kept for the backward: a, u and two float32 numbers a row. backend: see `kernels.backend`.
    Raises ValueError, naming the argument, for what does not fit.
    """
    if a.dim() != 2 or not a.is_floating_point():
        raise ValueError(f"a: want floats [rows, width], got {a.dtype} {tuple(a.shape)}")
    if u.shape != a.shape or u.dtype != a.dtype:
        raise ValueError(
            f"u: {u.dtype} {tuple(u.shape)} does not match a's {a.dtype} {tuple(a.shape)}"
        )
    for name, vector in (("u_bias", u_bias), ("weight", weight), ("bias", bias)):
        if vector.shape != a.shape[1:]:
            raise ValueError(f"{name}: shape {tuple(vector.shape)} for rows of width {a.shape[1]}")
    check_devices(a=a, u=u, u_bias=u_bias, weight=weight, bias=bias)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: want a probability in [0, 1), got {dropout}")
    if dropout and (seed is None or seed.dtype != torch.int64 or seed.shape != (1,)):
        raise ValueError("seed: dropout needs one, int64 [1]; see draw_seed")
    triton = takes_triton(backend, a)
    seed = seed if dropout else None
    vectors = (x.contiguous() for x in (u_bias, weight, bias))
    return _GatedNorm.apply(a, u, *vectors, seed, eps, dropout, u_gradient, triton)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        u: Tensor,
        u_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        seed: Tensor | None,
        eps: float,
        dropout: float,
        u_gradient: GradientBuffer | None,
        triton: bool,
    ) -> Tensor:
        ctx.eps, ctx.dropout, ctx.u_gradient, ctx.triton = eps, dropout, u_gradient, triton
        if triton:
            from kernels.triton import gated_norm

            out, mean, rstd = gated_norm.forward(a, u, u_bias, weight, bias, seed, eps, dropout)
            ctx.save_for_backward(a, u, u_bias, weight, bias, seed, mean, rstd)
            return out
        ctx.save_for_backward(a, u, u_bias, weight, bias, seed)
        mask = None if seed is None else naive_dropout_mask(seed, a.shape, dropout)
        return naive_gated_norm(a, u, u_bias, weight, bias, eps, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.triton:
            from kernels.triton import gated_norm

            saved = ctx.saved_tensors  # once: each access would have them computed again
            u = saved[1]
            du = u.new_empty(u.shape) if ctx.u_gradient is None else ctx.u_gradient.columns(u)
            grads = gated_norm.backward(dout, saved, ctx.dropout, du)
            return *grads, None, None, None, None, None
        *inputs, seed = ctx.saved_tensors
        mask = None if seed is None else naive_dropout_mask(seed, dout.shape, ctx.dropout)
        function = partial(naive_gated_norm, eps=ctx.eps, mask=mask)
        return *vector_jacobian(function, inputs, dout), None, None, None, None, None
