"""What every rank's queries see of the group's sequences: made once per batch, for all layers.

All of it follows from spans: rows of a rank that are neighbours, as intervals of one `Line` on
which every rank has a stretch of its own. Say two ranks hold the halves of a sequence of 8 tokens,
of which the first is contextual and sees all, the others two before them and themselves. Rank 0
holds rows 0 to 3, rank 1 rows 4 to 7. Then

- rank 1's queries see rows 2 and 3, `beyond` its own: these keys go there, as `Halo.keys`;
- rank 0's row 0 sees rows 4 to 7, too. It is `wide`: instead of four keys coming, the query goes,
  as a guest of rank 1 (`Halo.wide`), and what it finds there comes back and is added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kernels.jagged import Jagged, lengths_to_offsets
from kernels.transfer import copy_to
from kernels.weighting import Weighting
from parallel.relayout import Relayout, rows_within
from parallel.shard import Shard
from parallel.spans import Line, alone, count_out, overlap

# (query rows, lengths [B], num_targets [B]) -> int32 [rows, 4], as in `kernels.masks`.
Mask = Callable[[Jagged, Tensor, Tensor], Tensor]
Factors = tuple[float, float]  # alpha and scale of a `Weighting`


@dataclass(frozen=True)
class Visit:
    """Rows of every rank that others need, and the sums for them that come back."""

    rows: Tensor  # int64, on the device: this rank's own that go
    guests: Jagged  # the others' that come, on the device
    go: Relayout  # from every rank's own to where they are guests
    back: Relayout  # from there to every rank's `rows`


@dataclass(frozen=True)
class Wide:
    """Queries that see so much that they go to the keys: contextual tokens and targets."""

    visit: Visit
    intervals: Tensor  # of the guests, on the device


@dataclass(frozen=True)
class Halo:
    """What ranks need of each other, each query meeting each key once."""

    keys: Visit  # that other queries see
    intervals: Tensor  # of this rank's queries on such keys: empty for those that go
    wide: Wide | None  # None if no rank has any that see another's keys


@dataclass(frozen=True)
class Visibility:
    """A shard and the mask over it. What an exchange does not ask for is never computed.

    num_contextual: tokens at the front of each sequence that may see all of it, as targets may. The
    mask knows that by itself; told as well, a halo need not bring them whole sequences. A wrong
    number would only cost messages. ring_pieces: in how many a ring sends each head's rows; as
    many as it takes if None.
    """

    shard: Shard
    mask: Mask
    num_contextual: int = 0
    ring_pieces: int | None = None

    @cached_property
    def intervals(self) -> Tensor:
        """Of this rank's queries, on the device."""
        return self._on_device(self.shard.device_rows)

    @cached_property
    def all_intervals(self) -> tuple[Tensor, ...]:
        """Of this rank's queries and those that others share with it, on the device."""
        shard, cp_size = self.shard, self.shard.cp_size
        counts = [self.piece(rank, 0, 1)[1] for rank in range(cp_size)]
        parts = [part.piece(0, n) for part, n in zip(shard.parts, counts, strict=True)]
        offsets = copy_to(lengths_to_offsets(torch.cat([x.lengths() for x in parts])), shard.device)
        positions = [x.positions[:n] for x, n in zip(shard.device_parts, counts, strict=True)]
        of_sequences = shard.device_lengths, shard.device_num_targets
        rows = Jagged(offsets, torch.cat(positions))
        return self.mask(rows, *(x.repeat(cp_size) for x in of_sequences)).split(counts)

    @cached_property
    def whole_intervals(self) -> Tensor:
        """Of all queries of the group, in the order of shard.whole, on the device."""
        return self._on_device(self.shard.whole)

    @cached_property
    def line(self) -> Line:
        return Line.of(self.shard.lengths, self.shard.cp_size)

    @cached_property
    def held(self) -> Tensor:
        """The rows of every rank, as spans of the line."""
        return self.line.spans(self.shard.parts)

    @cached_property
    def seen(self) -> Tensor:
        """The rows that any of a rank's queries sees, for every rank, as spans of the line."""
        return overlap(torch.cat([self.held, self._keys_of(self.held)]), 1)

    def _keys_of(self, queries: Tensor) -> Tensor:
        """What spans of queries see, int64 [2 n, 2]: of each in turn two spans, perhaps empty.

        The two ends of a span of queries tell what all of it sees: see `kernels.masks`.
        """
        shard, cp_size = self.shard, self.shard.cp_size
        sequence, starts = self.line.sequences(queries)
        spans = torch.bincount(sequence, minlength=self.line.starts.numel())
        ends = queries - starts[:, None]
        ends[:, 1] -= 1
        first, last = (
            self.mask(
                Jagged(lengths_to_offsets(2 * spans), ends.flatten().int()),
                shard.lengths.repeat(cp_size),
                shard.num_targets.repeat(cp_size),
            )
            .view(-1, 2, 2, 2)  # span, end of it, interval, bound
            .long()
            .unbind(-1)
        )
        nowhere = self.line.stride  # an empty interval starts there
        end = shard.lengths.long().repeat(cp_size)[sequence, None]  # a mask's may lie behind it
        lowest = torch.where(first < last, first, nowhere).amin(1)
        highest = torch.minimum(last.amax(1), end)
        keys = torch.stack([torch.minimum(lowest, highest), highest], -1)
        return (keys + starts[:, None, None]).view(-1, 2)

    @cached_property
    def meets(self) -> list[list[bool]]:
        """[rank][owner]: whether any query of `rank` sees any of the rows of `owner`."""
        return (self.line.shared_rows(self.seen, self.held) > 0).tolist()

    @cached_property
    def met_by(self) -> list[list[bool]]:
        """[rank][owner]: whether any query of `owner` sees any of the rows of `rank`."""
        return [list(owners) for owners in zip(*self.meets, strict=True)]

    @cached_property
    def halo(self) -> Halo:
        line, held = self.line, self.held
        wide = self._wide_queries()
        rank = wide[:, 0] // line.stride
        meets = line.rows_of_each(self._keys_of(wide), held).unflatten(1, (len(wide), 2)).sum(2) > 0
        meets[rank, torch.arange(len(wide))] = False
        host, query = meets.nonzero().T
        guests = overlap(wide[query] + line.stride * (host - rank[query])[:, None], 1)
        stay = alone(torch.cat([held, wide[meets.any(0)]]))
        beyond = alone(torch.cat([overlap(torch.cat([held, self._keys_of(stay)]), 1), held]))
        keys = self._visit(beyond, "keys")
        if not len(guests):
            return Halo(keys, self.intervals, None)
        visit, rest = self._visit(guests, "queries"), self.intervals.clone()
        # Empty, but with the ends they have: tiles are cut by these, and those of two sources of
        # one launch must be the same.
        rest[visit.rows, ::2] = rest[visit.rows, 1::2]
        return Halo(keys, rest, Wide(visit, self._on_device(visit.guests)))

    def _wide_queries(self) -> Tensor:
        """Contextual tokens and targets, of every rank, as spans of the line."""
        lengths = self.shard.lengths
        history = lengths - self.shard.num_targets
        contextual = history.clamp(max=self.num_contextual)
        ends = torch.stack([torch.zeros_like(lengths), contextual, history, lengths], 1)
        spans = (ends + self.line.starts[..., None]).view(-1, 2)
        return overlap(torch.cat([spans, self.held]), 2)

    def _visit(self, guests: Tensor, name: str) -> Visit:
        """guests: the rows of others that each rank gets, as spans of the line."""
        shard, line = self.shard, self.line
        assert shard.links is not None
        ranks = torch.arange(shard.cp_size)
        asked = overlap(guests - (guests[:, :1] // line.stride) * line.stride, 1)
        asked = (asked + line.stride * ranks[:, None, None]).view(-1, 2)
        going = overlap(torch.cat([asked, self.held]), 2)
        own = line.own(self.held, shard.rank), line.own(going, shard.rank)
        rows = rows_within(line, *own, shard.device)
        move = Relayout.between(line, going, guests, shard.links, shard.device, name=name)
        go, back = replace(move, sends=rows[move.sends]), move.reversed(len(rows))
        return Visit(rows, line.jagged(guests, shard.rank, shard.device), go, back)

    def of_halo(self, factors: Factors) -> tuple[Weighting, Weighting, Weighting | None]:
        """Of this rank's queries and its own keys, and those beyond; of guests and its own keys.
        Always the same objects."""
        rows, halo, wide = self.shard.device_rows, self.halo, self.halo.wide
        own = self._weighting(rows, rows, factors, lambda: self.intervals)
        beyond = self._weighting(rows, halo.keys.guests, factors, lambda: halo.intervals)
        if wide is None:
            return own, beyond, None
        guests = self._weighting(wide.visit.guests, rows, factors, lambda: wide.intervals)
        return own, beyond, guests

    @cached_property
    def most_rows(self) -> int:
        """That any rank holds."""
        return max(part.num_rows for part in self.shard.parts)

    @cached_property
    def most_shared(self) -> int:
        """Rows that any rank shares with others."""
        return max(self.shard.num_shared)

    def of_my_queries(self, owner: int, piece: int, pieces: int, factors: Factors) -> Weighting:
        """Of this rank's queries and a piece of the keys of `owner`."""
        keys = self._rows(owner, piece, pieces)
        return self._of_piece(self.shard.rank, 0, 1, keys, factors)

    def of_my_keys(self, owner: int, piece: int, pieces: int, factors: Factors) -> Weighting:
        """Of a piece of the queries of `owner` and this rank's keys."""
        return self._of_piece(owner, piece, pieces, self.shard.device_rows, factors)

    def piece(self, owner: int, piece: int, pieces: int) -> tuple[int, int]:
        """First and last row + 1 of a piece of what this rank works on of `owner`: all rows of its
        own, those that others share with it. Pieces differ by one row at most."""
        mine = owner == self.shard.rank
        rows = self.shard.rows.num_rows if mine else self.shard.num_shared[owner]
        return piece_of(rows, piece, pieces)

    def _of_piece(
        self, rank: int, piece: int, pieces: int, keys: Jagged, factors: Factors
    ) -> Weighting:
        """Of a piece of a rank's queries and of some rank's `keys`."""

        def intervals() -> Tensor:
            start, end = self.piece(rank, piece, pieces)
            return self.all_intervals[rank][start:end]

        return self._weighting(self._rows(rank, piece, pieces), keys, factors, intervals)

    def _weighting(
        self, queries: Jagged, keys: Jagged, factors: Factors, intervals: Callable[[], Tensor]
    ) -> Weighting:
        """Always the same object for the same rows. intervals: of the queries, if it is new."""
        key = id(queries), id(keys), factors
        if key not in self._weightings:
            self._weightings[key] = Weighting(queries, keys, intervals(), *factors)
        return self._weightings[key]

    @cached_property
    def _weightings(self) -> dict[tuple[int, int, Factors], Weighting]:
        return {}

    def _rows(self, owner: int, piece: int, pieces: int) -> Jagged:
        """The rows of a `piece`, on the device; always the same object."""
        key = owner, piece, pieces
        if key not in self._pieces:
            part, span = self.shard.device_parts[owner], self.piece(*key)
            self._pieces[key] = part if span == (0, part.num_rows) else part.piece(*span)
        return self._pieces[key]

    @cached_property
    def _pieces(self) -> dict[tuple[int, int, int], Jagged]:
        return {}

    @cached_property
    def padded_rows(self) -> Tensor:
        """Where the rows of shard.whole lie when each rank's rows are padded to `most_rows`: int64,
        on the device."""
        counts = torch.tensor([part.num_rows for part in self.shard.parts])
        starts = torch.arange(len(counts)) * self.most_rows
        by_rank = count_out(starts, counts, self.shard.device)
        return torch.empty_like(by_rank).index_copy_(0, self.shard.gathered_rows, by_rank)

    def _on_device(self, queries: Jagged) -> Tensor:
        return self.mask(queries, self.shard.device_lengths, self.shard.device_num_targets)


def piece_of(num_rows: int, piece: int, count: int) -> tuple[int, int]:
    """The first row of a piece, and the one after its last."""
    return num_rows * piece // count, num_rows * (piece + 1) // count
