"""What a rank sees, sends and receives when, in one pass of a ring: the order of `ring.py`'s work
is there, the messages are here."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import accumulator
from kernels.weighting import Weighting
from parallel.transport import Message, Transport
from parallel.visibility import Factors, Visibility, piece_of

Block = tuple[Tensor, Tensor]  # keys and values of one rank, or their gradients
KEYS = ("keys and values", "next keys and values")  # in turn: one fills while the other is read
GRADIENTS = "gradients of keys and values"


class RingPass:
    """One pass of a piece of every rank's keys: what this rank sees, sends and receives when.

    Rank = node * places + place. At step s of turn t it works on the keys of the rank s places and
    t nodes before it, which the rank s places before it in its own node holds.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        seen: Visibility,
        factors: Factors,
        piece: int,
        pieces: int,
    ) -> None:
        links = seen.shard.links
        assert links is not None
        self.rows = slice(*piece_of(k.shape[0], piece, pieces)) if pieces > 1 else None
        self.k, self.v = self.cut(k), self.cut(v)
        self.seen, self.of_piece = seen, (piece, pieces, factors)
        self.parts, self.rank = seen.pieces(pieces)[piece], seen.shard.rank
        self.within, self.across = links.within, links.across
        self.places = links.within.group.size()
        self.nodes = seen.shard.cp_size // self.places
        self.node, self.place = divmod(self.rank, self.places)
        self.most = max(self._numel(rank) for rank in range(len(self.parts)))  # of a message
        self.held: dict[int, Message] = {}  # turn -> keys and values, as the node is sent them
        self.within.begin()

    def cut(self, x: Tensor) -> Tensor:
        """The rows of the piece, of those that this rank holds."""
        return x if self.rows is None else x[self.rows]

    def weighting(self, turn: int, step: int) -> Weighting:
        return self.seen.weighting(self._owner(turn, step), *self.of_piece)

    def sees_block(self, turn: int, step: int) -> bool:
        return self.seen.meets[self.rank][self._owner(turn, step)]

    def hold_own(self, turn: int) -> None:
        """Hold this rank's own keys and values for a turn."""
        self.held[turn] = self.within.pack((self.k, self.v))

    def carry_on(self, turn: int) -> None:
        """Send what this rank holds on to the next node, and have the next turn's brought.

        `arrive` waits for both ways, so that the place is free when its turn comes again.
        """
        if turn + 1 >= self.nodes:
            return
        assert self.across is not None
        mine, coming = self._owner(turn, 0), self._owner(turn + 1, 0)
        place = self._inbox(self.across, turn + 1, 0, (turn + 1) % 2)
        self.held[turn + 1] = (place,)
        self.within.settle(place)
        self.turn_coming = self.across.swap(
            KEYS[(turn + 1) % 2],
            self.across.pack(self.held[turn]),
            self._at(self.node + 1, self.place) if self._goes_to(self.node + 1, mine) else None,
            place,
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
        self.keys = self._inbox(self.within, turn, step, step % 2)
        self.keys_coming = self.within.swap(
            KEYS[step % 2],
            self.held[turn],
            reader % self.places if self.seen.meets[reader][held] else None,
            self.keys,
            (self.place - step) % self.places if self.sees_block(turn, step) else None,
        )

    def block(self, turn: int, step: int) -> Block | None:
        """The keys and values of a step, when they are here; None if nothing of them is seen."""
        if not self.sees_block(turn, step):
            return None
        if step:
            self.keys_coming.wait()
            return self._split(self.keys)
        own = self._owner(turn, 0) == self.rank
        return (self.k, self.v) if own else self._split(self.held[turn][0])

    def outgoing(self, turn: int, step: int) -> Block:
        """Where to write dk and dv of a step's keys, with what the ranks before found for them.

        Of step 0's keys they leave the node.
        """
        link = self.within if step else self.across
        assert link is not None
        numel = self._numel(self._owner(turn, step))
        self.gradients = link.outbox(GRADIENTS, numel, self.sum_dtype)
        return self._split(self.gradients)

    def pass_on(self, turn: int, step: int) -> None:
        """The gradients to the next rank, which works on the same keys at its next step."""
        before = self._at(self.node, self.place - 1)
        self.found = self._gradient_inbox(self.within, turn, step + 1)
        self.gradients_coming = self.within.swap(
            GRADIENTS,
            (self.gradients,),
            (self.place + 1) % self.places if self._found(self.rank, turn, step) else None,
            self.found,
            before % self.places if self._found(before, turn, step) else None,
        )

    def gradients_so_far(self, turn: int, step: int) -> Block | None:
        """What the ranks before this one in the node found for a step's keys, if they see any."""
        if not self._found(self._at(self.node, self.place - 1), turn, step - 1):
            return None
        self.gradients_coming.wait()
        return self._split(self.found)

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
            (self.gradients,),
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

    def _inbox(self, link: Transport, turn: int, step: int, which: int) -> Tensor:
        numel = self._numel(self._owner(turn, step))
        return link.inbox(KEYS[which], numel, self.most, self.k.dtype)

    def _gradient_inbox(self, link: Transport, turn: int, step: int) -> Tensor:
        """One will do: it fills again once the kernel that reads it has ended."""
        numel = self._numel(self._owner(turn, step))
        return link.inbox(GRADIENTS, numel, self.most, self.sum_dtype)

    @property
    def sum_dtype(self) -> torch.dtype:
        return accumulator(self.k.dtype)

    def _numel(self, owner: int) -> int:
        row = self.k.shape[1] * (self.k.shape[2] + self.v.shape[2])
        return self.parts[owner].num_rows * row

    def _split(self, flat: Tensor) -> Block:
        """A message as keys [rows, H, Dqk] and values [rows, H, Dv], each contiguous."""
        (_, heads, qk_dim), v_dim = self.k.shape, self.v.shape[2]
        rows, start = flat.numel() // (heads * (qk_dim + v_dim)), flat.storage_offset()
        k = flat.as_strided((rows, heads, qk_dim), (heads * qk_dim, qk_dim, 1), start)
        start += k.numel()
        return k, flat.as_strided((rows, heads, v_dim), (heads * v_dim, v_dim, 1), start)


def copy_block(source: Block | None, target: Block) -> None:
    """Zeros for None."""
    for i, x in enumerate(target):
        if source is None:
            x.zero_()
        else:
            x.copy_(source[i])
