"""Attention whose backward goes on through the SiLU of the projection that its inputs come from.

Where slopes are kept, dq, dk and dv are multiplied by SiLU's derivative where they are found, and
summed for the bias's gradient: one pass over nine times q less. They do not go to autograd but to
the projection's own gradient, which it has ready; so others may use q, k and v as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.projection import Projected
from kernels.source import Source
from kernels.triton import launch, pointwise
from kernels.triton.target import Through, padded_dim
from kernels.weighting import Weighting


def goes_through(
    q: Tensor, k: Tensor, v: Tensor, weighting: Weighting, projected: Projected
) -> bool:
    """Whether that can be done, and pays."""
    lie_there = all(x.dim() == 3 and x.stride(0) == projected.bias.numel() for x in (q, k, v))
    padded = any(padded_dim(x.shape[2]) != x.shape[2] for x in (q, v))
    some = q.shape[0] > 0 and not torch.compiler.is_compiling()
    return some and lie_there and not padded and launch.keeps_slopes(q, v, weighting)


def projected_attention(
    q: Tensor, k: Tensor, v: Tensor, weighting: Weighting, projected: Projected
) -> Tensor:
    """`kernels.attention.hstu_attention`, without its checks."""
    before, bias = projected.before.detach(), projected.bias.detach()
    return _ProjectedAttention.apply(q, k, v, before, bias, projected.gradient, weighting)


class _ProjectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        before: Tensor,
        bias: Tensor,
        gradient: Any,
        weighting: Weighting,
    ) -> Tensor:
        ctx.gradient, ctx.weighting = gradient, weighting
        ctx.save_for_backward(q, k, v, before, bias)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        return launch.forward(q, Source((k, v), weighting), out=out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        q, k, v, before, bias = ctx.saved_tensors  # once: they may be computed again
        dbefore = ctx.gradient.others(before)
        dbias = bias.new_zeros(bias.shape, dtype=torch.float32)
        out = _parts(dbefore, q, k, v)
        of = (_parts(x, q, k, v) for x in (before, bias[None], dbias[None]))
        through = tuple(Through(x, y[0], z[0]) for x, y, z in zip(*of, strict=True))
        done = launch.gradients(dout, q, k, v, ctx.weighting, out=out, through=through)  # type: ignore[arg-type]
        if not done:  # there was room for slopes in the forward, but there is none now
            dbias = pointwise.backward(dbefore, before, bias, dbefore)
        ctx.gradient.dbias = dbias
        return (None,) * 7


def _parts(x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """The columns of x [rows, widths of all] that are those of parts [T, H, D], as [rows, H, D]."""
    columns = (part.storage_offset() % part.stride(0) for part in parts)
    return tuple(
        x[:, column : column + part.shape[1] * part.shape[2]].unflatten(1, part.shape[1:])
        for column, part in zip(columns, parts, strict=True)
    )
