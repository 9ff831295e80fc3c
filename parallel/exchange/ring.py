"""Ring exchange: keys and values come rank by rank while attention runs on those in hand.

At step s, rank r works on the keys of rank r - s. HSTU attention has no softmax, so a step's result
is simply added to the sum. In the backward pass the gradients of a rank's keys travel the ring: at
step s every rank adds its own to what rank r - 1 found for the same keys one step before, so that
the sums come home in ring order, the same in every run.

What hides what, in the backward pass: dq of the rank's own keys hides the first keys on their way;
then each step's dq hides its dk and dv on theirs; dk and dv of the own keys come last, and add what
came home. The last step writes q's dtype: results need no further pass over memory.

A group that spans nodes is a ring of rings. At turn t, node n works on the keys of node n - t: each
of its ranks holds those of the rank in its own place there, and passes them on to the next node
while the ring inside the node goes round. Keys and gradients cross the network once a node.
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
from parallel.exchange.ring_pass import Block, RingPass, copy_block
from parallel.visibility import Visibility

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
            sums = _Sums(out_, seen, pieces)
            for piece in range(pieces):
                _forward(RingPass(k_, v_, seen, ctx.factors, piece, pieces), sums, q_)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        dq, dk, dv = empty_gradients(q, k, v)
        heads, pieces = _chunks(k, v, ctx.seen)
        for q_, k_, v_, dq_, dk_, dv_, dout_ in _by_heads(heads, q, k, v, dq, dk, dv, dout):
            sums = _Sums(dq_, ctx.seen, pieces)
            for piece in range(pieces):
                ring = RingPass(k_, v_, ctx.seen, ctx.factors, piece, pieces)
                _backward(ring, sums, (ring.cut(dk_), ring.cut(dv_)), dout_, q_)
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


def _forward(ring: RingPass, sums: _Sums, q: Tensor) -> None:
    """Adds to the rows of out."""

    def attend(turn: int, step: int, block: Block | None) -> None:
        if block:
            sums.add(attention_forward, q, *block, ring.weighting(turn, step))

    def move(turn: int, step: int) -> None:
        if (turn, step) == (0, 0):
            ring.hold_own(0)
        if step == 0:
            ring.carry_on(turn)
        ring.fetch(turn, step + 1)

    for turn in range(ring.nodes):
        ring.arrive(turn)
        for step in range(ring.places):
            block = ring.block(turn, step)
            ring.within.beside(partial(move, turn, step), partial(attend, turn, step, block))
    ring.within.join()


def _backward(ring: RingPass, sums: _Sums, own: Block, dout: Tensor, q: Tensor) -> None:
    """Adds to dq; writes dk and dv of this rank's keys into `own`.

    The own node's keys have the last turn: there, gradients come home.
    """
    last, tensors = ring.nodes, (dout, q)

    def add_dq(turn: int, step: int, block: Block | None) -> None:
        if block:
            sums.add(query_gradient, *tensors, *block, ring.weighting(turn, step))

    def begin(turn: int) -> None:
        if turn in (0, last):
            ring.hold_own(turn)
        ring.carry_on(turn)
        if turn:
            ring.fetch(turn, 1)

    def find(turn: int, step: int, block: Block | None, found: Block | None, into: Block) -> None:
        """into = found + dk and dv of a block."""
        if block:
            weighting = ring.weighting(turn, step)
            key_value_gradients(*tensors, *block, weighting, add=found, out=into)
        elif found or into is own:  # dk and dv themselves want a value, if nothing was found
            copy_block(found, into)

    before = 0 if last > 1 else last  # keys start for other nodes while this one's wait
    ring.within.beside(partial(begin, before), partial(add_dq, last, 0, ring.block(last, 0)))
    for turn in range(1, last + 1):
        if turn != last:
            ring.arrive(turn)
        held = ring.block(turn, 0)
        if last > 1:
            dq_of_held = partial(add_dq, turn, 0, held if turn != last else None)
            ring.within.beside(partial(begin, turn), dq_of_held)
        for step in range(1, ring.places):
            block = ring.block(turn, step)
            ring.fetch(turn, step + 1)
            find(turn, step, block, ring.gradients_so_far(turn, step), ring.outgoing(turn, step))
            ring.pass_on(turn, step)
            add_dq(turn, step, block)
        found = ring.gradients_of_held(turn)
        find(turn, 0, held, found, own if turn == last else ring.outgoing(turn, 0))
        if turn != last:
            ring.carry_gradients_on(turn)
    ring.within.join()


class _Sums:
    """Adds what this rank finds in each block of keys that it sees: in float32, but for the last,
    which goes to `out`."""

    def __init__(self, out: Tensor, seen: Visibility, pieces: int) -> None:
        self.out, self.left = out, pieces * sum(seen.meets[seen.shard.rank])
        self.total: Tensor | None = None
        if not self.left:
            out.zero_()

    def add(self, kernel: Callable[..., Tensor], *args: Any) -> None:
        """kernel(*args), onto what there is."""
        self.left -= 1
        into = self.total if self.left else self.out
        self.total = kernel(*args, add=self.total, out=into)
