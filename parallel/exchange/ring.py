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
from typing import Any

import torch
from torch import Tensor

from kernels.attention import accumulator, attention_forward, key_value_gradients, query_gradient
from kernels.columns import empty_gradients
from kernels.weighting import Weighting
from parallel.transport import Transport
from parallel.visibility import Visibility, piece_of

Block = tuple[Tensor, Tensor]  # keys and values of one rank, or their gradients
KEYS, GRADIENTS = "keys and values", "gradients of keys and values"
MESSAGE_BYTES = 96 << 20  # at the speed of the link, and little beside a GPU's memory


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
        each, pieces = _chunks(k, v, seen)
        for h in _heads(each, k):
            sums = _Sums(out[:, h], seen, pieces)
            for piece in range(pieces):
                ring = _Ring(k[:, h], v[:, h], seen, ctx.factors, piece, pieces)
                _forward(ring, sums, q[:, h])
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        dq, dk, dv = empty_gradients(q, k, v)
        each, pieces = _chunks(k, v, ctx.seen)
        for h in _heads(each, k):
            sums = _Sums(dq[:, h], ctx.seen, pieces)
            for piece in range(pieces):
                ring = _Ring(k[:, h], v[:, h], ctx.seen, ctx.factors, piece, pieces)
                own = dk[ring.rows, h], dv[ring.rows, h]
                _backward(ring, sums, own, dout[:, h], q[:, h])
        return dq, dk, dv, None, None, None


def _chunks(k: Tensor, v: Tensor, seen: Visibility) -> tuple[int, int]:
    """How many heads go round together, and in how many pieces each rank's rows of them do.

    All and one, unless long sequences would make the messages too large. Buffers then stay small
    beside what the layers keep, and the longest sequence grows with cp.
    """
    heads = k.shape[1]
    head = seen.most_rows * (k.shape[2] + v.shape[2]) * k.itemsize
    groups = min(heads, max(1, -(-heads * head // MESSAGE_BYTES)))
    each = -(-heads // groups)
    return each, max(1, -(-each * head // MESSAGE_BYTES))


def _heads(each: int, k: Tensor) -> Iterator[slice]:
    for start in range(0, k.shape[1], each):
        yield slice(start, start + each)


def _forward(ring: _Ring, sums: _Sums, q: Tensor) -> None:
    """Adds to the rows of out."""
    ring.hold_own(0)
    for turn in range(ring.nodes):
        ring.arrive(turn)
        ring.carry_on(turn)
        for step in range(ring.places):
            block = ring.block(turn, step)
            ring.fetch(turn, step + 1)
            if block:
                sums.add(attention_forward, q, *block, ring.weighting(turn, step))


def _backward(ring: _Ring, sums: _Sums, own: Block, dout: Tensor, q: Tensor) -> None:
    """Adds to dq; writes dk and dv of this rank's keys into `own`.

    The own node's keys have the last turn: there, gradients come home.
    """
    last, tensors = ring.nodes, (dout, q)

    def add_dq(turn: int, step: int, block: Block) -> None:
        sums.add(query_gradient, *tensors, *block, ring.weighting(turn, step))

    def find(turn: int, step: int, block: Block | None, found: Block | None, into: Block) -> None:
        """into = found + dk and dv of a block."""
        if block:
            weighting = ring.weighting(turn, step)
            key_value_gradients(*tensors, *block, weighting, add=found, out=into)
        elif found or into is own:  # dk and dv themselves want a value, if nothing was found
            _copy(found, into)

    if last > 1:
        ring.hold_own(0)
        ring.carry_on(0)
    else:
        ring.hold_own(last)
        ring.fetch(last, 1)
    if block := ring.block(last, 0):
        add_dq(last, 0, block)
    for turn in range(1, last + 1):
        if last > 1:
            if turn == last:
                ring.hold_own(turn)
            else:
                ring.arrive(turn)
            ring.carry_on(turn)
            ring.fetch(turn, 1)
        held = ring.block(turn, 0)
        if held and turn != last:
            add_dq(turn, 0, held)
        for step in range(1, ring.places):
            block = ring.block(turn, step)
            ring.fetch(turn, step + 1)
            find(turn, step, block, ring.gradients_so_far(turn, step), ring.outgoing(turn, step))
            ring.pass_on(turn, step)
            if block:
                add_dq(turn, step, block)
        found = ring.gradients_of_held(turn)
        find(turn, 0, held, found, own if turn == last else ring.outgoing(turn, 0))
        if turn != last:
            ring.carry_gradients_on(turn)


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


class _Ring:
    """One pass of a piece of every rank's keys: what this rank sees, sends and receives when.

    Rank = node * places + place. At step s of turn t it works on the keys of the rank s places and
    t nodes before it, which the rank s places before it in its own node holds.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        seen: Visibility,
        factors: tuple[float, float],
        piece: int,
        pieces: int,
    ) -> None:
        links = seen.shard.links
        assert links is not None
        self.rows = slice(*piece_of(k.shape[0], piece, pieces))
        self.k, self.v, self.seen, self.factors = k[self.rows], v[self.rows], seen, factors
        self.parts, self.rank = seen.pieces(pieces)[piece], seen.shard.rank
        self.within, self.across = links.within, links.across
        self.places = links.within.group.size()
        self.nodes = seen.shard.cp_size // self.places
        self.node, self.place = divmod(self.rank, self.places)
        self.held: dict[int, Tensor] = {}  # turn -> keys and values, where the node can get them

    def weighting(self, turn: int, step: int) -> Weighting:
        queries, keys = self.seen.shard.device_rows, self.parts[self._owner(turn, step)]
        return Weighting(queries, keys, self.seen.intervals, *self.factors)

    def sees_block(self, turn: int, step: int) -> bool:
        return self.seen.meets[self.rank][self._owner(turn, step)]

    def hold_own(self, turn: int) -> None:
        """Hold this rank's own keys and values for a turn."""
        self.held[turn] = self._outbox_of(turn)
        _copy((self.k, self.v), self._split(self.held[turn]))

    def carry_on(self, turn: int) -> None:
        """Send what this rank holds on to the next node, and have the next turn's brought.

        It leaves from, and comes to, where the node's ranks read; `arrive` waits for both ways, so
        that the place is free when its turn comes again.
        """
        if turn + 1 >= self.nodes:
            return
        assert self.across is not None
        mine, coming = self._owner(turn, 0), self._owner(turn + 1, 0)
        self.held[turn + 1] = self._outbox_of(turn + 1)
        self.turn_coming = self.across.swap(
            KEYS,
            self.held[turn],
            self._at(self.node + 1, self.place) if self._goes_to(self.node + 1, mine) else None,
            self.held[turn + 1],
            self._at(self.node - 1, self.place) if self._goes_to(self.node, coming) else None,
        )

    def arrive(self, turn: int) -> None:
        """Wait for what the last `carry_on` brings."""
        if turn:
            self.turn_coming.wait()

    def fetch(self, turn: int, step: int) -> None:
        """Have the keys and values of a step brought here, if they are seen; send what I hold."""
        if step >= self.places:
            return
        reader, held = self._at(self.node, self.place + step), self._owner(turn, 0)
        self.keys_coming = self.within.swap(
            self._name(turn),
            self.held[turn],
            reader % self.places if self.seen.meets[reader][held] else None,
            self._inbox(turn, step),
            (self.place - step) % self.places if self.sees_block(turn, step) else None,
        )

    def block(self, turn: int, step: int) -> Block | None:
        """The keys and values of a step, when they are here; None if nothing of them is seen."""
        if not self.sees_block(turn, step):
            return None
        if step:
            self.keys_coming.wait()
            return self._split(self._inbox(turn, step))
        own = self._owner(turn, 0) == self.rank
        return (self.k, self.v) if own else self._split(self.held[turn])

    def outgoing(self, turn: int, step: int) -> Block:
        """Where to write dk and dv of a step's keys, with what the ranks before found for them.

        Of step 0's keys they leave the node.
        """
        link = self.within if step else self.across
        assert link is not None
        self.gradients = self._outbox(link, GRADIENTS, self._owner(turn, step), self.sum_dtype)
        return self._split(self.gradients)

    def pass_on(self, turn: int, step: int) -> None:
        """The gradients to the next rank, which works on the same keys at its next step."""
        before = self._at(self.node, self.place - 1)
        self.gradients_coming = self.within.swap(
            GRADIENTS,
            self.gradients,
            (self.place + 1) % self.places if self._found(self.rank, turn, step) else None,
            self._gradient_inbox(self.within, turn, step + 1),
            before % self.places if self._found(before, turn, step) else None,
        )

    def gradients_so_far(self, turn: int, step: int) -> Block | None:
        """What the ranks before this one in the node found for a step's keys, if they see any."""
        if not self._found(self._at(self.node, self.place - 1), turn, step - 1):
            return None
        self.gradients_coming.wait()
        return self._split(self._gradient_inbox(self.within, turn, step))

    def gradients_of_held(self, turn: int) -> Block | None:
        """What this node's other ranks, and the nodes before, found for the keys held here."""
        found = self.gradients_so_far(turn, self.places)
        if not self._found_by_turn(turn - 1, self._owner(turn, 0)):
            return found
        assert self.across is not None
        self.turn_gradients_coming.wait()
        others = self._split(self._gradient_inbox(self.across, turn, 0))
        if found:
            for mine, theirs in zip(others, found, strict=True):
                mine.add_(theirs)
        return others

    def carry_gradients_on(self, turn: int) -> None:
        """Those of the keys held here to the next node, which works on them in its next turn."""
        assert self.across is not None
        mine, coming = self._owner(turn, 0), self._owner(turn + 1, 0)
        self.turn_gradients_coming = self.across.swap(
            GRADIENTS,
            self.gradients,
            self._at(self.node + 1, self.place) if self._found_by_turn(turn, mine) else None,
            self._gradient_inbox(self.across, turn + 1, 0),
            self._at(self.node - 1, self.place) if self._found_by_turn(turn, coming) else None,
        )

    def _found(self, rank: int, turn: int, step: int) -> bool:
        """Whether `rank` has gradients to pass on after a step, of its own or of ranks before."""
        node, place = divmod(rank, self.places)
        owner = self._at(node - turn, place - step)
        return any(self.seen.meets[self._at(node, place - s)][owner] for s in range(step))

    def _found_by_turn(self, turn: int, owner: int) -> bool:
        """Whether any node has found gradients for the keys of `owner` up to that turn."""
        return self._any_sees(owner, range(1, turn + 1))

    def _goes_to(self, node: int, owner: int) -> bool:
        """Whether the keys of `owner` are needed in a node, or in one after it."""
        first = (node - owner // self.places) % self.nodes
        return self._any_sees(owner, range(first, self.nodes))

    def _any_sees(self, owner: int, turns: range) -> bool:
        """Whether any rank sees the keys of `owner` in these turns."""
        nodes = (owner // self.places + turn for turn in turns)
        ranks = (self._at(node, place) for node in nodes for place in range(self.places))
        return any(self.seen.meets[rank][owner] for rank in ranks)

    def _at(self, node: int, place: int) -> int:
        return node % self.nodes * self.places + place % self.places

    def _owner(self, turn: int, step: int) -> int:
        """Whose keys this rank works on."""
        return self._at(self.node - turn, self.place - step)

    def _name(self, turn: int) -> str:
        """Of the outbox: two take turns, one is sent on while the other fills."""
        return KEYS if self.nodes == 1 else f"{KEYS} {turn % 2}"

    def _outbox_of(self, turn: int) -> Tensor:
        return self._outbox(self.within, self._name(turn), self._owner(turn, 0), self.k.dtype)

    def _inbox(self, turn: int, step: int) -> Tensor:
        """Two take turns: one fills while the other is worked on."""
        numel = self._numel(self._owner(turn, step))
        return self.within.inbox(f"{KEYS} {step % 2}", numel, self.k.dtype)

    def _gradient_inbox(self, link: Transport, turn: int, step: int) -> Tensor:
        """One will do: it fills again once the kernel that reads it has ended."""
        return link.inbox(GRADIENTS, self._numel(self._owner(turn, step)), self.sum_dtype)

    def _outbox(self, link: Transport, name: str, owner: int, dtype: torch.dtype) -> Tensor:
        capacity = max(self._numel(rank) for rank in range(len(self.parts)))
        return link.outbox(name, self._numel(owner), capacity, dtype)

    @property
    def sum_dtype(self) -> torch.dtype:
        return accumulator(self.k.dtype)

    def _numel(self, owner: int) -> int:
        row = self.k.shape[1] * (self.k.shape[2] + self.v.shape[2])
        return self.parts[owner].num_rows * row

    def _split(self, flat: Tensor) -> Block:
        """A message as keys [rows, H, Dqk] and values [rows, H, Dv], each contiguous."""
        heads, qk_dim, v_dim = *self.k.shape[1:], self.v.shape[2]
        rows = flat.numel() // (heads * (qk_dim + v_dim))
        k, v = flat.split([rows * heads * qk_dim, rows * heads * v_dim])
        return k.view(rows, heads, qk_dim), v.view(rows, heads, v_dim)


def _copy(source: Block | None, target: Block) -> None:
    """Zeros for None. The source's rows may lie apart."""
    for i, x in enumerate(target):
        if source is None:
            x.zero_()
            continue
        pair = [y.flatten(1) for y in (source[i], x)]
        if source[i].dtype == x.dtype and all(map(_in_words, pair)):
            pair = [y.view(torch.int64) for y in pair]  # else numbers are copied one by one
        pair[1].copy_(pair[0])


def _in_words(x: Tensor) -> bool:
    """Whether rows of x are whole words of eight bytes."""
    sizes = (x.shape[1], x.stride(0), x.storage_offset())
    return x.stride(1) == 1 and not any(size * x.itemsize % 8 for size in sizes)
