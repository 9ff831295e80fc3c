"""All-gather exchange: every rank gets all keys and values at once. Simplest, most memory.

Only this rank's own keys and values are kept for the backward pass, which gathers them again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.attention import attention_forward, key_value_gradients, query_gradient
from parallel.shard import Shard
from parallel.visibility import Visibility


def all_gather_attention(
    q: Tensor, k: Tensor, v: Tensor, *, seen: Visibility, alpha: float, scale: float
) -> Tensor:
    """See `parallel.attention.context_parallel_attention`."""
    return _AllGatherAttention.apply(q, k, v, seen.shard, seen.intervals, alpha, scale)


class _AllGatherAttention(torch.autograd.Function):
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
        ctx.shard = shard
        ctx.mask = dict(
            queries=shard.device_rows,
            keys=shard.whole,
            intervals=intervals,
            alpha=alpha,
            scale=scale,
        )
        whole_k, whole_v = _gather(k, v, shard)
        out = attention_forward(q, whole_k, whole_v, **ctx.mask)
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        whole_k, whole_v = _gather(k, v, ctx.shard)
        dk, dv = key_value_gradients(dout, q, whole_k, whole_v, **ctx.mask)
        dq = query_gradient(dout, q, whole_k, whole_v, **ctx.mask)
        dk, dv = _reduce_scatter(dk, dv, ctx.shard)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _gather(k: Tensor, v: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Rows of all ranks, in sequence order. Padded to the largest shard for the collective."""
    rows = max(part.num_rows for part in shard.parts)
    mine = k.new_zeros(rows, k.shape[1], k.shape[2] + v.shape[2])
    mine[: k.shape[0], :, : k.shape[2]] = k
    mine[: k.shape[0], :, k.shape[2] :] = v
    gathered = mine.new_empty(shard.cp_size * rows, *mine.shape[1:])
    dist.all_gather_into_tensor(gathered, mine, group=shard.group)
    whole = mine.new_empty(shard.whole.num_rows, *mine.shape[1:])
    for block, part, index in zip(
        gathered.split(rows) if rows else (), shard.parts, shard.whole_rows, strict=False
    ):
        whole[index] = block[: part.num_rows]
    whole_k, whole_v = whole.split([k.shape[2], v.shape[2]], dim=-1)
    return whole_k.contiguous(), whole_v.contiguous()


def _reduce_scatter(dk: Tensor, dv: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Sum every rank's gradients of all rows; keep this rank's own rows."""
    rows = max(part.num_rows for part in shard.parts)
    whole = torch.cat([dk, dv], -1)
    send = whole.new_zeros(shard.cp_size, rows, *whole.shape[1:])
    for r, index in enumerate(shard.whole_rows):
        send[r, : index.numel()] = whole[index]
    mine = torch.empty_like(send[0])
    dist.reduce_scatter_tensor(mine, send.view(-1, *whole.shape[1:]), group=shard.group)
    dk_mine, dv_mine = mine[: shard.rows.num_rows].split([dk.shape[2], dv.shape[2]], dim=-1)
    return dk_mine, dv_mine
