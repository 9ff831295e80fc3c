"""Attention whose backward goes on through the SiLU of the projection that its inputs come from.

A function of what q, k and v are SiLU of, not of them: its gradients are those of `before` and
`bias`. Where slopes are kept, dq, dk and dv are multiplied by SiLU's derivative where they are
found, and summed for the bias's gradient, which spares a pass of its own that would read all of
them and `before`, and write as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.columns import are_columns
from kernels.projection import GradientBuffer, Projected
from kernels.source import Source
from kernels.triton import launch, pointwise
from kernels.triton.target import Through, padded_dim
from kernels.weighting import Weighting


def goes_through(
    q: Tensor, k: Tensor, v: Tensor, weighting: Weighting, projected: Projected
) -> bool:
    """Whether that can be done, and pays: if they are all columns of one buffer, unpadded."""
    if torch.compiler.is_compiling() or not q.shape[0]:
        return False
    width, rows = projected.bias.numel(), projected.before.shape[0]
    whole = are_columns((q, k, v)) and width == sum(x[0].numel() for x in (q, k, v))
    there = all(x.shape[0] == rows and x.stride(0) == width for x in (q, k, v))
    padded = any(padded_dim(x.shape[2]) != x.shape[2] for x in (q, v))
    return whole and there and not padded and launch.keeps_slopes(q, v, weighting)


def projected_attention(
    q: Tensor, k: Tensor, v: Tensor, weighting: Weighting, projected: Projected
) -> Tensor:
    """`kernels.attention.hstu_attention`, without its checks."""
    qkv = (x.detach() for x in (q, k, v))
    return _ProjectedAttention.apply(*qkv, weighting, *vars(projected).values())


class _ProjectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weighting: Weighting,
        before: Tensor,
        bias: Tensor,
        gradient: GradientBuffer,
    ) -> Tensor:
        ctx.weighting, ctx.gradient = weighting, gradient
        ctx.save_for_backward(q, k, v, before, bias)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        return launch.forward(q, Source((k, v), weighting), out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, before, bias = ctx.saved_tensors  # once: they may be computed again
        dbefore = ctx.gradient.others(before)
        dbias = bias.new_empty(bias.shape, dtype=torch.float32)
        out = _parts(dbefore, q, k, v)
        of = (_parts(x, q, k, v) for x in (before, bias[None], dbias[None]))
        through = tuple(Through(x, y[0], z[0]) for x, y, z in zip(*of, strict=True))
        done = launch.gradients(dout, q, k, v, ctx.weighting, out=out, through=through)  # type: ignore[arg-type]
        if not done:  # there was room for slopes in the forward, but there is none now
            dbias = pointwise.backward(dbefore, before, bias, dbefore)
        return None, None, None, None, dbefore, dbias.to(bias.dtype), None


def _parts(x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """The columns of x [rows, widths of all] that are those of parts [T, H, D], as [rows, H, D]."""
    columns = (part.storage_offset() % part.stride(0) for part in parts)
    return tuple(
        x[:, column : column + part[0].numel()].unflatten(1, part.shape[1:])
        for column, part in zip(columns, parts, strict=True)
    )
