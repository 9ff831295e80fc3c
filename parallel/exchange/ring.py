"""Ring exchange: keys and values travel from rank to rank while attention runs on those in hand.

HSTU attention has no softmax, so a step's result is simply added to the sum. In the backward pass
the keys and values travel once more, and their gradients follow one hop behind, so that after cp
hops each rank holds the gradients of its own rows, summed over all ranks in ring order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.attention import attention_forward, key_value_gradients, query_gradient
from parallel.shard import Shard
from parallel.visibility import Visibility


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, seen: Visibility, alpha: float, scale: float
) -> Tensor:
    """See `parallel.attention.context_parallel_attention`."""
    return _RingAttention.apply(q, k, v, seen.shard, seen.intervals, alpha, scale)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shard: Shard,
        intervals: Tensor,
        alpha: float,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.shard, ctx.intervals, ctx.alpha, ctx.scale = shard, intervals, alpha, scale
        parts, rank, size = shard.device_parts, shard.rank, shard.cp_size
        out = None
        block = _pack(k, v)
        for step in range(size):
            owner = (rank - step) % size
            if step + 1 < size:
                hop = _Hop(shard, block, _block_like(k, v, shard, (owner - 1) % size))
            block_k, block_v = _unpack(block, k, v)
            out = attention_forward(
                q,
                block_k,
                block_v,
                queries=parts[rank],
                keys=parts[owner],
                intervals=intervals,
                alpha=alpha,
                scale=scale,
                add=out,
                out=out,
            )
            if step + 1 < size:
                block = hop.wait()
        assert out is not None
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        shard: Shard = ctx.shard
        parts, rank, size = shard.device_parts, shard.rank, shard.cp_size
        dq = None
        block = _pack(k, v)
        gradient_hop = None
        for step in range(size):
            owner = (rank - step) % size
            if step + 1 < size:
                hop = _Hop(shard, block, _block_like(k, v, shard, (owner - 1) % size))
            block_k, block_v = _unpack(block, k, v)
            tensors = (dout, q, block_k, block_v)
            mask: dict[str, Any] = dict(
                queries=parts[rank],
                keys=parts[owner],
                intervals=ctx.intervals,
                alpha=ctx.alpha,
                scale=ctx.scale,
            )
            dk, dv = key_value_gradients(*tensors, **mask)
            dq = query_gradient(*tensors, **mask, add=dq, out=dq)
            gradient = _pack(dk, dv)
            if gradient_hop is not None:  # what the ranks before this one found for this owner
                gradient += gradient_hop.wait()
            receive = _block_like(k, v, shard, (owner - 1) % size, gradient.dtype)
            gradient_hop = _Hop(shard, gradient, receive)
            if step + 1 < size:
                block = hop.wait()
        assert dq is not None
        assert gradient_hop is not None
        dk, dv = _unpack(gradient_hop.wait(), k, v)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


class _Hop:
    """One message to the next rank and one from the rank before, under way until `wait`."""

    def __init__(self, shard: Shard, send: Tensor, receive: Tensor) -> None:
        assert shard.group is not None
        size = shard.cp_size
        following = dist.get_global_rank(shard.group, (shard.rank + 1) % size)
        preceding = dist.get_global_rank(shard.group, (shard.rank - 1) % size)
        # Both ends know all sizes, so an empty message is not sent at all.
        ops = []
        if send.numel():
            ops.append(dist.P2POp(dist.isend, send, following, shard.group))
        if receive.numel():
            ops.append(dist.P2POp(dist.irecv, receive, preceding, shard.group))
        self.work = dist.batch_isend_irecv(ops) if ops else []
        self.send, self.receive = send, receive  # kept alive while the message is under way

    def wait(self) -> Tensor:
        for work in self.work:
            work.wait()
        return self.receive


def _pack(k: Tensor, v: Tensor) -> Tensor:
    """One flat message; k and v stay contiguous inside it."""
    return torch.cat([k.reshape(-1), v.reshape(-1)])


def _unpack(block: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a block as keys and values, heads and dims as in k and v."""
    row_k, row_v = k.shape[1] * k.shape[2], v.shape[1] * v.shape[2]
    rows = block.numel() // (row_k + row_v)
    flat_k, flat_v = block.split([rows * row_k, rows * row_v])
    return flat_k.view(rows, *k.shape[1:]), flat_v.view(rows, *v.shape[1:])


def _block_like(
    k: Tensor, v: Tensor, shard: Shard, owner: int, dtype: torch.dtype | None = None
) -> Tensor:
    """An unwritten block for the rows of `owner`."""
    row = k.shape[1] * k.shape[2] + v.shape[1] * v.shape[2]
    return k.new_empty(shard.parts[owner].num_rows * row, dtype=dtype or k.dtype)
