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
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from kernels.attention import attention_forward, key_value_gradients, query_gradient
from kernels.columns import empty_gradients
from kernels.source import Source
from parallel.exchange.ring_pass import Block, RingPass
from parallel.visibility import Visibility

MESSAGE_BYTES = 144 << 20  # more launches are more tails; and little beside a GPU's memory


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
        rounds: list[_Round] = []
        for q_, k_, v_, out_ in _by_heads(heads, q, k, v, out):
            sums = _Sums((out_,), pieces * sum(seen.meets[seen.shard.rank]))
            for piece in range(pieces):
                part = len(rounds) if heads > 1 else 0, piece, pieces
                rounds.append(_forward(seen, ctx.factors, part, sums, q_, k_, v_))
        _go(rounds, ahead=heads > 1)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        seen, rank = ctx.seen, ctx.seen.shard.rank
        dq, dk, dv = empty_gradients(q, k, v)
        heads, pieces = _chunks(k, v, seen)
        rounds: list[_Round] = []
        for q_, k_, v_, dout_, *grads in _by_heads(heads, q, k, v, dout, dq, dk, dv):
            of_q = _Sums((grads[0],), pieces * sum(seen.meets[rank]))
            of_k = _Sums((grads[1], grads[2]), pieces * sum(seen.met_by[rank]))
            for piece in range(pieces):
                part = len(rounds) if heads > 1 else 0, piece, pieces
                rounds.append(_backward(seen, ctx.factors, part, of_q, of_k, q_, k_, v_, dout_))
        _go(rounds, ahead=heads > 1)
        return dq, dk, dv, None, None, None


def _chunks(k: Tensor, v: Tensor, seen: Visibility) -> tuple[int, int]:
    """How many heads go round together, and in how many pieces each rank's rows of them do.

    All and one, unless long sequences would make the messages too large. Buffers then stay small
    beside what the layers keep, and the longest sequence grows with cp.
    """
    if seen.ring_pieces is not None:
        return 1, seen.ring_pieces
    heads = k.shape[1]
    head = max(1, seen.most_shared * (k.shape[2] + v.shape[2]) * k.itemsize)
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


@dataclass(frozen=True)
class _Round:
    """Rows of every rank that go round once, and what is done with those that each ring brings."""

    rings: list[RingPass]
    work: Callable[..., None]


def _forward(
    seen: Visibility,
    factors: tuple[float, float],
    part: tuple[int, int, int],
    sums: _Sums,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> _Round:
    """Adds what a piece of every rank's keys gives to out. part: round, piece, pieces."""

    def attend(keys: list[Block]) -> None:
        found = [x.source(seen.of_my_queries(x.owner, *part[1:], factors)) for x in keys]
        sums.add(partial(attention_forward, q), found)

    return _Round([RingPass("keys and values", (k, v), seen.meets, seen, *part)], attend)


def _backward(
    seen: Visibility,
    factors: tuple[float, float],
    part: tuple[int, int, int],
    of_q: _Sums,
    of_k: _Sums,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
) -> _Round:
    """Adds to dq what a piece of every rank's keys gives, to dk and dv what one of its queries."""

    def differentiate(keys: list[Block], queries: list[Block]) -> None:
        found = [x.source(seen.of_my_queries(x.owner, *part[1:], factors)) for x in keys]
        of_q.add(partial(query_gradient, dout, q), found)
        found = [x.source(seen.of_my_keys(x.owner, *part[1:], factors)) for x in queries]
        of_k.add(partial(key_value_gradients, k, v), found)

    rings = [
        RingPass("keys and values", (k, v), seen.meets, seen, *part),
        RingPass("queries and gradients", (q, dout), seen.met_by, seen, *part),
    ]
    return _Round(rings, differentiate)


def _go(rounds: list[_Round], ahead: bool) -> None:
    """The work of each round, step by step, while the next rows come.

    Where kernels can see that rows have come, the first two steps are one: what comes early needs
    no sums in between, unless it is so much that these cost less than other kernels gain. ahead:
    the first rows of a round come during the last work of the round before, inside a node, in
    buffers of their own. Not where a message is a single head's: the work on it takes so long that
    little is gained, and long sequences want the memory.
    """
    one = rounds[0].rings[0]
    link, last = one.within, one.places - 1
    ahead = ahead and one.nodes == 1
    link.begin()
    for index, round in enumerate(rounds):
        begun = ahead and index > 0
        following = rounds[index + 1].rings if ahead and index + 1 < len(rounds) else []
        for turn in range(one.nodes):
            for ring in round.rings:
                ring.arrive(turn)
            brought: list[list[Block]] = [[] for _ in round.rings]
            for step in range(one.places):
                for ring, blocks in zip(round.rings, brought, strict=True):
                    blocks += ring.blocks(turn, step)
                messages = work = None
                if step == last > 0:  # this turn has no more
                    messages = partial(_move, following, 0, 0) if following else None
                elif step > 0 or not begun:
                    messages = partial(_move, round.rings, turn, step)
                if step > 0 or last == 0 or not link.signals:
                    work, brought = partial(round.work, *brought), [[] for _ in round.rings]
                link.beside(messages, work)
    link.join()


def _move(rings: list[RingPass], turn: int, step: int) -> None:
    """Have the rows brought that come after those of a step."""
    for ring in rings:
        if (turn, step) == (0, 0):
            ring.hold_own()
        if step == 0:
            ring.carry_on(turn)
        ring.fetch(turn, step + 1)


class _Sums:
    """Adds up what so many blocks give: in float32, but for the last, which goes to `out`."""

    def __init__(self, out: tuple[Tensor, ...], blocks: int) -> None:
        self.out, self.left = out, blocks
        self.total: Any = None
        if not blocks:
            for x in out:
                x.zero_()

    def add(self, kernel: Callable[..., Any], found: list[Source]) -> None:
        """What the kernel finds in the sources, onto what there is."""
        if not found:
            return
        self.left -= len(found)
        out = self.out if len(self.out) > 1 else self.out[0]
        self.total = kernel(*found, add=self.total, out=self.total if self.left else out)
