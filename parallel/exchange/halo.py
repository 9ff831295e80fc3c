"""Halo exchange: each rank sends the key rows that the other ranks' queries see, and few queries.

For windowed and semi-local masks, whose traffic is then the window and not the sequence. The rows
that come are a second block of keys beside a rank's own, which nothing moves: HSTU attention adds
up over blocks. Backward, their gradients go back to where they came from, beside the work on a
rank's own.

Contextual tokens and targets see whole sequences, whatever the window. They are few, so they go
where the keys are, and what they find there comes back: their outputs, then their gradients. The
work on such guests runs beside that on a rank's own queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.attention import attention_forward, key_value_gradients, query_gradient
from kernels.columns import empty_gradients
from kernels.source import Source
from kernels.weighting import Weighting
from parallel.relayout import Moving
from parallel.visibility import Visibility, Wide


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
        halo = seen.halo
        ctx.halo, ctx.weightings = halo, seen.of_halo(factors)
        *of_own, of_guests = ctx.weightings
        link = halo.keys.go.route.link
        link.begin()
        guests = halo.wide and _Guests(halo.wide, q)
        coming = halo.keys.go.begin(k, v)
        out, beyond = q.new_empty(q.shape[0], q.shape[1], v.shape[2]), list[Tensor]()

        def attend() -> None:
            beyond.extend(coming.finish())
            attention_forward(q, *_sources(of_own, (k, v), beyond), out=out)

        find = None
        if guests:
            here = Source((k, v), of_guests)
            guests.arrive()
            find = partial(guests.find, lambda rows: attention_forward(rows, here))
        link.beside(find, attend)
        link.join()
        coming.settle()
        if guests:
            guests.add_found_to(out)
        ctx.save_for_backward(q, k, v, *beyond, *([guests.rows] if guests else []))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, beyond_k, beyond_v, *guest_q = ctx.saved_tensors
        beyond, halo = (beyond_k, beyond_v), ctx.halo
        *of_own, of_guests = ctx.weightings
        own, of_beyond = of_own
        dq, dk, dv = empty_gradients(q, k, v)
        link = halo.keys.go.route.link
        link.begin()
        guests = halo.wide and _Guests(halo.wide, dout)
        of_k, of_v = empty_gradients(*beyond)
        key_value_gradients(*beyond, Source((q, dout), of_beyond), out=(of_k, of_v))
        returning = halo.keys.back.begin(of_k, of_v)
        del of_k, of_v  # packed
        queries = [Source((q, dout), own)]

        def differentiate() -> None:
            query_gradient(dout, q, *_sources(of_own, (k, v), beyond), out=dq)
            key_value_gradients(k, v, *queries, out=(dk, dv))

        find = None
        if guests:
            here = Source((k, v), of_guests)
            queries.append(Source((*guest_q, guests.arrive()), of_guests))
            find = partial(guests.find, lambda rows: query_gradient(rows, *guest_q, here))
        link.beside(find, differentiate)
        link.join()
        for grad, more in zip((dk, dv), returning.read(), strict=True):
            grad.index_add_(0, halo.keys.rows, more)  # rows all different: no order of sums
        returning.settle()
        if guests:
            guests.add_found_to(dq)
        return dq, dk, dv, None, None


class _Guests:
    """Wide queries on their visit: what other ranks send here, and what this rank's find there.

    In order: arrive, find, add_found_to.
    """

    rows: Tensor
    returning: Moving

    def __init__(self, wide: Wide, rows: Tensor) -> None:
        """rows: [rows of this rank, H, D], of which the wide queries' go."""
        self.visit = wide.visit
        self.coming = self.visit.go.begin(rows)

    def arrive(self) -> Tensor:
        """[guests, H, D]."""
        (self.rows,) = self.coming.finish()
        return self.rows

    def find(self, kernel: Callable[[Tensor], Tensor]) -> None:
        """Send back what `kernel` finds for the guests: [guests, H, D'], float32."""
        self.returning = self.visit.back.begin(kernel(self.rows))

    def add_found_to(self, x: Tensor) -> None:
        """x: [rows of this rank, H, D']. Sums are rounded once, to its dtype."""
        (found,) = self.returning.read()
        rows = self.visit.rows  # all different
        x.index_copy_(0, rows, (x[rows] + found).to(x.dtype))
        self.coming.settle()
        self.returning.settle()


def _sources(weightings: Sequence[Weighting], *rows: Sequence[Tensor]) -> list[Source]:
    """Keys and values of a rank's own, and those beyond."""
    return [Source((k, v), of) for (k, v), of in zip(rows, weightings, strict=True)]
