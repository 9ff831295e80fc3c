"""Ulysses exchange (arXiv 2309.14509): every rank gets whole sequences of a part of the heads.

Two all-to-alls a layer, whatever the number of ranks, and no imbalance at all; but at most as many
ranks as heads, and each holds whole sequences, if only of its heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.attention import hstu_attention
from parallel.shard import Shard
from parallel.trade import trade_rows
from parallel.visibility import Visibility


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, *, seen: Visibility, alpha: float, scale: float
) -> Tensor:
    """See `parallel.attention.context_parallel_attention`. The heads must divide by the ranks."""
    shard = seen.shard
    if q.shape[1] % shard.cp_size:
        raise ValueError(
            f"exchange: ulysses cannot share {q.shape[1]} heads among {shard.cp_size} ranks"
        )
    whole = _SequencesForHeads.apply(torch.cat([q, k, v], -1), shard)
    whole_q, whole_k, whole_v = whole.split([q.shape[2], k.shape[2], v.shape[2]], dim=-1)
    out = hstu_attention(
        whole_q,
        whole_k,
        whole_v,
        queries=shard.whole,
        keys=shard.whole,
        intervals=seen.whole_intervals,
        alpha=alpha,
        scale=scale,
    )
    return _HeadsForSequences.apply(out, shard)


class _SequencesForHeads(torch.autograd.Function):
    """[my rows, H, D] -> [all rows, H / cp, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return _gather_sequences(x, shard)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gather_heads(dout, ctx.shard), None


class _HeadsForSequences(torch.autograd.Function):
    """[all rows, H / cp, D] -> [my rows, H, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return _gather_heads(x, shard)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gather_sequences(dout, ctx.shard), None


def _gather_sequences(x: Tensor, shard: Shard) -> Tensor:
    rows, heads, dim = x.shape
    each = heads // shard.cp_size
    send = x.reshape(rows, shard.cp_size, each, dim).transpose(0, 1).reshape(-1, each, dim)
    splits = [part.num_rows for part in shard.parts]
    received = _trade(send, [rows] * shard.cp_size, splits, shard)
    return torch.empty_like(received).index_copy_(0, shard.gathered_rows, received)


def _gather_heads(x: Tensor, shard: Shard) -> Tensor:
    _, each, dim = x.shape
    rows, splits = shard.rows.num_rows, [part.num_rows for part in shard.parts]
    send = x[shard.gathered_rows]
    received = _trade(send, splits, [rows] * shard.cp_size, shard)
    by_rank = received.view(shard.cp_size, rows, each, dim)
    return by_rank.transpose(0, 1).reshape(rows, shard.cp_size * each, dim)


def _trade(send: Tensor, send_splits: list[int], splits: list[int], shard: Shard) -> Tensor:
    assert shard.links is not None
    with shard.links.watchdog.operation("heads for sequences"):
        # An expanded gradient's heads may be one.
        return trade_rows(send.contiguous(), send_splits, splits, shard.group)
