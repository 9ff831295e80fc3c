"""Halo exchange: each rank sends only the key rows that the other ranks' queries see.

For windowed and semi-local masks, whose traffic is then the window and not the sequence. The rows
that come are a second block of keys beside a rank's own, which nothing moves: HSTU attention adds
up over blocks. Backward, their gradients go back to where they came from, beside the work on a
rank's own.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        coming = seen.halo.come.begin(k, v)
        beyond = coming.finish()
        ctx.save_for_backward(q, k, v, *beyond)
        ctx.seen, ctx.weightings = seen, seen.of_halo(factors)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        attention_forward(q, *_sources(ctx.weightings, (k, v), beyond), out=out)
        coming.settle()
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, *beyond = ctx.saved_tensors
        dq, dk, dv = empty_gradients(q, k, v)
        (own, of_beyond), halo = ctx.weightings, ctx.seen.halo
        of_k, of_v = empty_gradients(*beyond)
        key_value_gradients(*beyond, Source((q, dout), of_beyond), out=(of_k, of_v))
        returning = halo.back.begin(of_k, of_v)
        del of_k, of_v  # packed
        query_gradient(dout, q, *_sources(ctx.weightings, (k, v), beyond), out=dq)
        key_value_gradients(k, v, Source((q, dout), own), out=(dk, dv))
        for grad, more in zip((dk, dv), returning.finish(), strict=True):
            grad.index_add_(0, halo.edge, more)  # rows all different: no order of sums
        returning.settle()
        return dq, dk, dv, None, None


def _sources(weightings: tuple[Weighting, Weighting], *rows: Sequence[Tensor]) -> list[Source]:
    """Keys and values of a rank's own, and those beyond."""
    return [Source((k, v), of) for (k, v), of in zip(rows, weightings, strict=True)]
