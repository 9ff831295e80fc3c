"""What a rank sends and receives when, in one pass of a ring: the order of `ring.py`'s work is
there, the messages are here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.source import Arrival, Source
from kernels.weighting import Weighting
from parallel.transport import Message, Transport
from parallel.visibility import Visibility, piece_of

Rows = tuple[Tensor, Tensor]  # two tensors of the same rows, such as keys and values


@dataclass(frozen=True)
class Block:
    """Rows of one rank, here or on their way."""

    owner: int
    rows: Rows
    arrival: Arrival | None = None

    def source(self, weighting: Weighting) -> Source:
        return Source(self.rows, weighting, self.arrival)


class RingPass:
    """One pass of a piece of every rank's rows: what this rank wants, sends and receives when.

    Rank = node * places + place. At step s of turn t it works with the rows of the rank s places
    and t nodes before it, which the rank s places before it in its own node holds.
    """

    def __init__(
        self,
        name: str,
        rows: Rows,
        wanted: list[list[bool]],
        seen: Visibility,
        round: int,
        piece: int,
        pieces: int,
    ) -> None:
        """name: of the messages. rows: this rank's own. wanted: [rank][owner], of whose rows.
        round: how many come before, perhaps not done yet."""
        links = seen.shard.links
        assert links is not None
        self.names = (name, f"next {name}")  # in turn: one fills while the other is read
        self.wanted = wanted
        spans = [piece_of(shared, piece, pieces) for shared in seen.shard.num_shared]
        self.num_rows = [end - start for start, end in spans]  # that each rank sends
        self.rank = seen.shard.rank
        self.own = _between(rows, *seen.piece(self.rank, piece, pieces))
        self.shared = _between(rows, *spans[self.rank])
        self.within, self.across = links.within, links.across
        self.places = links.within.group.size()
        self.nodes = seen.shard.cp_size // self.places
        self.node, self.place = divmod(self.rank, self.places)
        (_, self.heads, first), last = rows[0].shape, rows[1].shape[2]
        self.dims = first, last
        self.most = max(map(self._numel, range(len(spans))))  # of a message
        self.held: dict[int, Message] = {}  # turn -> rows, as the node is sent them
        self.fetched = round * (self.places - 1) + 1  # the first of all has the plain name

    def owner(self, turn: int, step: int) -> int:
        """Whose rows this rank works with."""
        return self._at(self.node - turn, self.place - step)

    def hold_own(self) -> None:
        """Hold those of this rank's own rows that others see for the first turn."""
        self.held[0] = self.within.pack(self.names[0], self.shared)

    def carry_on(self, turn: int) -> None:
        """Send what this rank holds on to the next node, and have the next turn's brought.

        `arrive` waits for both ways, so that the place is free when its turn comes again.
        """
        if turn + 1 >= self.nodes:
            return
        assert self.across is not None
        mine, coming = self.owner(turn, 0), self.owner(turn + 1, 0)
        place = self._inbox(self.across, turn + 1, 0, (turn + 1) % 2)
        self.held[turn + 1] = (place,)
        self.within.settle(place)
        self.turn_coming = self.across.swap(
            self.names[(turn + 1) % 2],
            self.across.pack(self.names[0], self.held[turn]),
            self._at(self.node + 1, self.place) if self._goes_to(self.node + 1, mine) else None,
            place,
            self._at(self.node - 1, self.place) if self._goes_to(self.node, coming) else None,
        )

    def arrive(self, turn: int) -> None:
        """Wait for what the last `carry_on` brings."""
        if turn:
            self.turn_coming.wait()

    def fetch(self, turn: int, step: int) -> None:
        """Have the rows of a step brought here, if they are wanted; send what I hold."""
        if step >= self.places:
            return
        reader, held = self._at(self.node, self.place + step), self.owner(turn, 0)
        self.fetched += 1
        self.rows = self._inbox(self.within, turn, step, self.fetched % 2)
        self.coming = self.within.swap(
            self.names[self.fetched % 2],
            self.held[turn],
            reader % self.places if self.wanted[reader][held] else None,
            self.rows,
            (self.place - step) % self.places if self._wants(turn, step) else None,
        )

    def blocks(self, turn: int, step: int) -> list[Block]:
        """The rows of a step, if they are wanted."""
        owner = self.owner(turn, step)
        if not self._wants(turn, step):
            return []
        if step:
            return [Block(owner, self._split(self.rows), self.coming)]
        return [Block(owner, self._split(self.held[turn][0]) if turn else self.own)]

    def _wants(self, turn: int, step: int) -> bool:
        return self.wanted[self.rank][self.owner(turn, step)]

    def _goes_to(self, node: int, owner: int) -> bool:
        """Whether the rows of `owner` are wanted in a node, or in one after it."""
        first = (node - owner // self.places) % self.nodes
        nodes = (owner // self.places + turn for turn in range(first, self.nodes))
        ranks = (self._at(node, place) for node in nodes for place in range(self.places))
        return any(self.wanted[rank][owner] for rank in ranks)

    def _at(self, node: int, place: int) -> int:
        return node % self.nodes * self.places + place % self.places

    def _inbox(self, link: Transport, turn: int, step: int, which: int) -> Tensor:
        numel = self._numel(self.owner(turn, step))
        return link.inbox(self.names[which], numel, self.most, self.own[0].dtype)

    def _numel(self, owner: int) -> int:
        return self.num_rows[owner] * self.heads * sum(self.dims)

    def _split(self, flat: Tensor) -> Rows:
        """A message as its two tensors [rows, H, D], each contiguous."""
        heads, (first, last) = self.heads, self.dims
        rows, start = flat.numel() // (heads * (first + last)), int(flat.storage_offset())
        a = flat.as_strided((rows, heads, first), (heads * first, first, 1), start)
        start += a.numel()
        return a, flat.as_strided((rows, heads, last), (heads * last, last, 1), start)


def _between(rows: Rows, start: int, end: int) -> Rows:
    a, b = rows
    return rows if (start, end) == (0, a.shape[0]) else (a[start:end], b[start:end])
