"""The one entry to HSTU attention: checks, choice of backend, autograd.

`hstu_attention` is what a model calls. Context parallelism calls the two halves,
`attention_forward` and `attention_backward`, once per block of keys and adds up the results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.blockwise import blockwise_backward, blockwise_forward
from kernels.jagged import Jagged
from kernels.naive import naive_attention

BACKENDS = ("auto", "naive", "blockwise")


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    alpha: float,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """out_i = scale * sum_j silu(alpha * q_i . k_j) v_j over the keys j that query i sees.

    q: [Tq, H, Dqk]; k: [Tk, H, Dqk]; v: [Tk, H, Dv]; one floating dtype, one device.
    queries, keys: the rows of q, and of k and v; the same B sequences.
    intervals: int32 [Tq, 4], see `kernels.masks`.
    Returns [Tq, H, Dv] in q's dtype; sums are float32 inside (float64 for float64).
    Raises ValueError, naming the argument, for shapes, dtypes or devices that do not fit.
    """
    _check(q, k, v, queries, keys, intervals, backend)
    if backend == "naive":
        return naive_attention(
            q, k, v, queries=queries, keys=keys, intervals=intervals, alpha=alpha, scale=scale
        )
    return _Attention.apply(q, k, v, queries, keys, intervals, alpha, scale)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    alpha: float,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """The forward half, without autograd. Returns float32 [Tq, H, Dv]; adds into `out` if given."""
    partial = blockwise_forward(
        q, k, v, queries=queries, keys=keys, intervals=intervals, alpha=alpha, scale=scale
    )
    return partial if out is None else out.add_(partial)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    alpha: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward half: float32 dq, dk, dv of this block of keys alone, from dout [Tq, H, Dv]."""
    return blockwise_backward(
        dout, q, k, v, queries=queries, keys=keys, intervals=intervals, alpha=alpha, scale=scale
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: Jagged,
        keys: Jagged,
        intervals: Tensor,
        alpha: float,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, intervals)
        ctx.mask = dict(queries=queries, keys=keys, alpha=alpha, scale=scale)
        return attention_forward(q, k, v, intervals=intervals, **ctx.mask).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, intervals = ctx.saved_tensors
        dq, dk, dv = attention_backward(dout, q, k, v, intervals=intervals, **ctx.mask)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    backend: str,
) -> None:
    def require(ok: bool, message: str) -> None:
        if not ok:
            raise ValueError(message)

    for name, x in (("q", q), ("k", k), ("v", v)):
        require(x.dim() == 3, f"{name}: want [rows, heads, dim], got shape {tuple(x.shape)}")
        require(x.is_floating_point(), f"{name}: want a floating dtype, got {x.dtype}")
        require(x.dtype == q.dtype, f"{name}: dtype {x.dtype} is not q's {q.dtype}")
        require(x.device == q.device, f"{name}: on {x.device}, q is on {q.device}")
        require(x.shape[1] == q.shape[1], f"{name}: {x.shape[1]} heads, q has {q.shape[1]}")
    require(k.shape[2] == q.shape[2], f"k: head dim {k.shape[2]} is not q's {q.shape[2]}")
    require(v.shape[0] == k.shape[0], f"v: {v.shape[0]} rows, k has {k.shape[0]}")
    for name, jagged, rows in (("queries", queries, q.shape[0]), ("keys", keys, k.shape[0])):
        for part in (jagged.offsets, jagged.positions):
            require(part.dtype == torch.int32, f"{name}: want int32, got {part.dtype}")
            require(part.device == q.device, f"{name}: on {part.device}, q is on {q.device}")
        require(
            jagged.num_rows == rows, f"{name}: {jagged.num_rows} positions for {rows} rows"
        )
    require(
        queries.num_sequences == keys.num_sequences,
        f"keys: {keys.num_sequences} sequences, queries have {queries.num_sequences}",
    )
    require(
        intervals.shape == (q.shape[0], 4) and intervals.dtype == torch.int32,
        f"intervals: want int32 [{q.shape[0]}, 4], got {intervals.dtype} {tuple(intervals.shape)}",
    )
    require(intervals.device == q.device, f"intervals: on {intervals.device}, q on {q.device}")
    require(backend in BACKENDS, f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
