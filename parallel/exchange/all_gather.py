"""All-gather exchange: every rank gets all keys and values, a few heads at a time.

While attention runs on some heads, the keys and values of the next ones are on their way; in the
backward pass, gradients of keys and values go home while attention goes on. Only this rank's own
keys and values are kept for the backward pass, which gathers the others' again.

Collectives want equal sizes, so every rank's rows are padded to the most that any rank has: by one
row at most where all sequences are cut. Also those of whole sequences travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.attention import attention_forward, key_value_gradients, query_gradient
from kernels.columns import empty_gradients
from kernels.source import Source
from kernels.weighting import Weighting
from parallel.visibility import Visibility

# The first gather and the last reduce-scatter hide behind the least work: chunks make them smaller.
MAX_CHUNKS = 2  # one head of a few long sequences does not fill a GPU
CHUNK_BYTES = 16 << 20  # an all-gather of less does not get NVLink's speed


def all_gather_attention(
    q: Tensor, k: Tensor, v: Tensor, *, seen: Visibility, alpha: float, scale: float
) -> Tensor:
    """See `parallel.attention.context_parallel_attention`."""
    return _AllGatherAttention.apply(q, k, v, seen, alpha, scale)


class _AllGatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Visibility, alpha: float, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.seen = seen
        ctx.weighting = Weighting(
            seen.shard.device_rows, seen.shard.whole, seen.intervals, alpha, scale
        )
        out = q.new_empty(*q.shape[:2], v.shape[2])
        for heads, whole_k, whole_v in _arriving(k, v, seen):
            keys = Source((whole_k, whole_v), ctx.weighting)
            attention_forward(q[:, heads], keys, out=out[:, heads])
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        dq, dk, dv = empty_gradients(q, k, v)
        before: _ReduceScatter | None = None
        for heads, whole_k, whole_v in _arriving(k, v, ctx.seen):
            queries = Source((q[:, heads], dout[:, heads]), ctx.weighting)
            sums = key_value_gradients(whole_k, whole_v, queries)
            reduction = _ReduceScatter(*sums, heads, ctx.seen)
            keys = Source((whole_k, whole_v), ctx.weighting)
            query_gradient(dout[:, heads], q[:, heads], keys, out=dq[:, heads])
            if before:
                before.write(dk, dv)
            before = reduction
        assert before is not None
        before.write(dk, dv)
        return dq, dk, dv, None, None, None


def _arriving(k: Tensor, v: Tensor, seen: Visibility) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each chunk's heads, and their keys and values of all ranks; the next chunk is under way."""
    gathers = (_Gather(k, v, heads, seen) for heads in _chunks(k, v, seen))
    for gather, _ in pairwise(chain(gathers, [None])):  # starts one ahead of what it yields
        assert gather is not None
        yield gather.heads, *gather.wait()


def _chunks(k: Tensor, v: Tensor, seen: Visibility) -> list[slice]:
    """Of the heads; the same on every rank."""
    heads, row = k.shape[1], k.shape[2] + v.shape[2]
    total = seen.padded_rows.numel() * heads * row * k.element_size()
    count = max(1, min(MAX_CHUNKS, heads, total // CHUNK_BYTES))
    ends = accumulate(len(part) for part in torch.arange(heads).tensor_split(count))
    return [slice(start, end) for start, end in pairwise([0, *ends])]


class _Gather:
    """Keys and values of some heads, on their way from every rank to every rank."""

    def __init__(self, k: Tensor, v: Tensor, heads: slice, seen: Visibility) -> None:
        self.heads, self.k, self.v, self.seen = heads, k[:, heads], v[:, heads], seen
        own = torch.cat([self.k.flatten(1), self.v.flatten(1)], 1)
        send = own.new_zeros(seen.most_rows, own.shape[1])
        send[: len(own)] = own
        self.padded = own.new_empty(seen.shard.cp_size * len(send), own.shape[1])
        self.work = dist.all_gather_into_tensor(
            self.padded, send, group=seen.shard.group, async_op=True
        )

    def wait(self) -> tuple[Tensor, Tensor]:
        """In the order of shard.whole."""
        _wait(self.work, "all-gather of keys and values", self.seen)
        whole = self.padded.index_select(0, self.seen.padded_rows)
        del self.padded  # not to be held while attention runs
        return _split(whole, self.k, self.v)


class _ReduceScatter:
    """Gradients of all keys and values of some heads, on their way home to be summed there."""

    def __init__(self, dk: Tensor, dv: Tensor, heads: slice, seen: Visibility) -> None:
        self.heads, self.seen = heads, seen
        dk, dv = dk.flatten(1), dv.flatten(1)
        width = dk.shape[1] + dv.shape[1]
        send = dk.new_zeros(seen.shard.cp_size * seen.most_rows, width)
        send[:, : dk.shape[1]].index_copy_(0, seen.padded_rows, dk)
        send[:, dk.shape[1] :].index_copy_(0, seen.padded_rows, dv)
        self.own = send.new_empty(seen.most_rows, width)
        self.work = dist.reduce_scatter_tensor(
            self.own, send, group=seen.shard.group, async_op=True
        )

    def write(self, dk: Tensor, dv: Tensor) -> None:
        """Into this rank's own gradients, of all heads."""
        _wait(self.work, "reduce-scatter of their gradients", self.seen)
        dk, dv = dk[:, self.heads], dv[:, self.heads]
        own_k, own_v = _split(self.own[: len(dk)], dk, dv)
        dk.copy_(own_k)
        dv.copy_(own_v)


def _wait(work: dist.Work, operation: str, seen: Visibility) -> None:
    assert seen.shard.links is not None
    with seen.shard.links.watchdog.operation(operation):
        work.wait()


def _split(rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's keys and its values, as views; heads and dims as in k and v."""
    flat_k, flat_v = rows.split([k.shape[1:].numel(), v.shape[1:].numel()], 1)
    return flat_k.unflatten(1, k.shape[1:]), flat_v.unflatten(1, v.shape[1:])
