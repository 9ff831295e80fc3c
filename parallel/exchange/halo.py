"""Halo exchange: each rank sends only the key rows that the other ranks' queries see.

For windowed and semi-local masks, whose traffic is then the window and not the sequence. The rows
that come are a second block of keys beside a rank's own, which nothing moves: HSTU attention adds
up over blocks. Backward, their gradients go back to where they came from, beside the work on a
rank's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.attention import attention_forward, key_value_gradients, query_gradient
from kernels.columns import empty_gradients
from kernels.source import Source
from kernels.weighting import Weighting
from parallel.visibility import Visibility


def halo_attention(
    q: Tensor, k: Tensor, v: Tensor, *, seen: Visibility, alpha: float, scale: float
) -> Tensor:
    """See `parallel.attention.context_parallel_attention`."""
    return _HaloAttention.apply(q, k, v, seen, (alpha, scale))


class _HaloAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Visibility, factors: tuple[float, float]
    ) -> Tensor:
        edge, move = seen.halo.edge, seen.halo.move
        come = move.move(torch.cat([k[edge], v[edge]], -1))
        beyond = come[..., : k.shape[2]].contiguous(), come[..., k.shape[2] :].contiguous()
        ctx.save_for_backward(q, k, v, *beyond)
        ctx.seen, ctx.weightings = seen, seen.of_halo(factors)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        return attention_forward(q, *_sources(ctx.weightings, (k, v), beyond), out=out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, *beyond = ctx.saved_tensors
        dq, dk, dv = empty_gradients(q, k, v)
        own, of_beyond = ctx.weightings
        empty = torch.empty_like(beyond[0]), torch.empty_like(beyond[1])
        go = key_value_gradients(*beyond, Source((q, dout), of_beyond), out=empty)
        edge, move = ctx.seen.halo.edge, ctx.seen.halo.move
        finish = move.reversed(len(edge)).begin(torch.cat(go, -1))
        query_gradient(dout, q, *_sources(ctx.weightings, (k, v), (*beyond,)), out=dq)
        key_value_gradients(k, v, Source((q, dout), own), out=(dk, dv))
        back = finish().split([k.shape[2], v.shape[2]], -1)
        for grad, more in zip((dk, dv), back, strict=True):
            grad[edge] += more
        return dq, dk, dv, None, None


def _sources(weightings: tuple[Weighting, Weighting], *rows: tuple[Tensor, Tensor]) -> list[Source]:
    """Keys and values of a rank's own, and those beyond."""
    return [Source(*x) for x in zip(rows, weightings, strict=True)]
