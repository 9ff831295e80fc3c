"""Ring exchange: what a rank needs of the others comes rank by rank, while attention runs on what
is in hand.

At step s, rank r works with the rows of rank r - s. Forward, their keys and values come, and what
r's queries find in them is added to its output: HSTU attention has no softmax. Backward, their
queries and the gradients of their outputs come as well, so that r finds all of dk and dv of its own
keys itself, as it does dq: no gradient travels, nothing is waited for at the end, and a message of
rows in 16 bits replaces one of sums in float32. The last step writes q's dtype: results need no
further pass over memory.

A group that spans nodes is a ring of rings. At turn t, node n works with the rows of node n - t:
each of its ranks holds those of the rank in its own place there, and passes them on to the next
node while the ring inside the node goes round. Rows cross the network once a node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from kernels.attention import attention_forward, key_value_gradients, query_gradient
from kernels.columns import empty_gradients
from parallel.exchange.ring_pass import Block, RingPass
from parallel.visibility import Visibility

Rows = Callable[[], Block] | None  # what a ring brings: waited for when it is called; None: nothing

MESSAGE_BYTES = 192 << 20  # more launches are more tails; and little beside a GPU's memory


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, seen: Visibility, alpha: float, scale: float
) -> Tensor:
    """See `parallel.attention.context_parallel_attention`."""
    return _RingAttention.apply(q, k, v, seen, alpha, scale)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Visibility, alpha: float, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.seen, ctx.factors = seen, (alpha, scale)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        heads, pieces = _chunks(k, v, seen)
        for q_, k_, v_, out_ in _by_heads(heads, q, k, v, out):
            sums = _Sums((out_,), pieces * sum(seen.meets[seen.shard.rank]))
            for piece in range(pieces):
                _forward(seen, ctx.factors, (piece, pieces), sums, q_, k_, v_)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        seen, rank = ctx.seen, ctx.seen.shard.rank
        dq, dk, dv = empty_gradients(q, k, v)
        heads, pieces = _chunks(k, v, seen)
        for q_, k_, v_, dout_, *grads in _by_heads(heads, q, k, v, dout, dq, dk, dv):
            of_q = _Sums((grads[0],), pieces * sum(seen.meets[rank]))
            of_k = _Sums((grads[1], grads[2]), pieces * sum(seen.met_by[rank]))
            for piece in range(pieces):
                _backward(seen, ctx.factors, (piece, pieces), of_q, of_k, q_, k_, v_, dout_)
        return dq, dk, dv, None, None, None


def _chunks(k: Tensor, v: Tensor, seen: Visibility) -> tuple[int, int]:
    """How many heads go round together, and in how many pieces each rank's rows of them do.

    All and one, unless long sequences would make the messages too large. Buffers then stay small
    beside what the layers keep, and the longest sequence grows with cp.
    """
    heads = k.shape[1]
    head = max(1, seen.most_rows * (k.shape[2] + v.shape[2]) * k.itemsize)
    groups = ceil(heads / max(1, MESSAGE_BYTES // head))
    each = ceil(heads / groups)
    return each, ceil(each * head / MESSAGE_BYTES)


def _by_heads(each: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [rows, H, ...], so many heads at a time."""
    heads = tensors[0].shape[1]
    if each == heads:
        yield tensors
        return
    for start in range(0, heads, each):
        yield tuple(x[:, start : start + each] for x in tensors)


def _forward(
    seen: Visibility,
    factors: tuple[float, float],
    piece: tuple[int, int],
    sums: _Sums,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> None:
    """Adds what a piece of every rank's keys gives to out."""

    def attend(owner: int, keys: Rows) -> None:
        if keys:
            sums.add(attention_forward, q, *keys(), seen.of_my_queries(owner, *piece, factors))

    _go_round([RingPass("keys and values", (k, v), seen.meets, seen, *piece)], attend)


def _backward(
    seen: Visibility,
    factors: tuple[float, float],
    piece: tuple[int, int],
    of_q: _Sums,
    of_k: _Sums,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
) -> None:
    """Adds to dq what a piece of every rank's keys gives, to dk and dv what one of its queries."""

    def differentiate(owner: int, keys: Rows, queries: Rows) -> None:
        if keys:
            mine = seen.of_my_queries(owner, *piece, factors)
            of_q.add(query_gradient, dout, q, *keys(), mine)
        if queries:
            theirs, (their_q, their_dout) = seen.of_my_keys(owner, *piece, factors), queries()
            of_k.add(key_value_gradients, their_dout, their_q, k, v, theirs)

    rings = [
        RingPass("keys and values", (k, v), seen.meets, seen, *piece),
        RingPass("queries and gradients", (q, dout), seen.met_by, seen, *piece),
    ]
    _go_round(rings, differentiate)


def _go_round(rings: list[RingPass], work: Callable[..., None]) -> None:
    """work(owner, what each ring brings of that rank's rows), while the next ones come."""

    def move(turn: int, step: int) -> None:
        for ring in rings:
            if (turn, step) == (0, 0):
                ring.hold_own()
            if step == 0:
                ring.carry_on(turn)
            ring.fetch(turn, step + 1)

    one = rings[0]
    one.within.begin()
    for turn in range(one.nodes):
        for ring in rings:
            ring.arrive(turn)
        for step in range(one.places):
            blocks = [ring.block(turn, step) for ring in rings]
            work_here = partial(work, one.owner(turn, step), *blocks)
            if step == 0 or step + 1 < one.places:
                one.within.beside(partial(move, turn, step), work_here)
            else:  # nothing more comes this turn
                work_here()
    one.within.join()


class _Sums:
    """Adds up what comes in so many parts: in float32, but for the last, which goes to `out`."""

    def __init__(self, out: tuple[Tensor, ...], parts: int) -> None:
        self.out, self.left = out, parts
        self.total: Any = None
        if not parts:
            for x in out:
                x.zero_()

    def add(self, kernel: Callable[..., Any], *args: Any) -> None:
        """kernel(*args), onto what there is."""
        self.left -= 1
        out = self.out if len(self.out) > 1 else self.out[0]
        self.total = kernel(*args, add=self.total, out=self.total if self.left else out)
