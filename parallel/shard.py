"""Cut a batch along its sequences while it is still integers.

All ranks read different samples; `shard_batch` trades slices (a jagged all-to-all) so that each
ends up with its layout's positions of the sequences of its cp group. Nobody reads data twice, and
everything computed from the tokens afterwards is 1/cp in size. Sequences may be dealt anew to the
dp groups on the way, for equal work, and those that need not be cut for it stay whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.jagged import Jagged, lengths_to_offsets
from kernels.transfer import copy_together
from parallel.balance import deal
from parallel.batch import JaggedBatch
from parallel.layout import Layout
from parallel.links import Links
from parallel.mesh import Mesh
from parallel.spans import count_out
from parallel.trade import regroup, trade_rows
from parallel.whole import CUT, owners

ROOM = 128  # for the sizes of so many sequences of each process: one message, if none reads more


@dataclass(frozen=True)
class Shard:
    """What one cp rank holds of its group's batch of B sequences.

    Host-side lengths decide the size of every message and index list, so a step never waits for
    the device to tell the host a number. Tokens are on the host as well: what is looked up where is
    decided there.
    """

    lengths: Tensor  # int32 [B], host: whole sequences
    num_targets: Tensor  # int32 [B], host
    parts: tuple[Jagged, ...]  # host: the rows of every cp rank
    tokens: dict[str, Tensor]  # host: int64 [rows of this rank]
    group: dist.ProcessGroup | None  # the cp group; None if cp is 1
    rank: int  # in the cp group
    device: torch.device
    links: Links | None = None  # of the cp group
    of_all: tuple[Tensor, Tensor] | None = None  # of all processes' sequences, if not these alone:
    # lengths and num_targets

    @property
    def cp_size(self) -> int:
        return len(self.parts)

    @property
    def rows(self) -> Jagged:
        """This rank's rows, on the host."""
        return self.parts[self.rank]

    @cached_property
    def num_shared(self) -> list[int]:
        """How many of each rank's rows, its first ones, are up to the last sequence that several
        ranks hold: no other rank's queries see any of the rest."""
        holders = torch.stack([part.lengths() > 0 for part in self.parts]).sum(0)
        cut = (holders > 1).nonzero()[:, 0].tolist()
        end = cut[-1] + 1 if cut else 0
        return [int(part.offsets[end]) for part in self.parts]

    @cached_property
    def _on_device(self) -> list[Tensor]:
        of_parts = [x for part in self.parts for x in (part.offsets, part.positions)]
        return copy_together([self.lengths, self.num_targets, *of_parts], self.device)

    @property
    def device_lengths(self) -> Tensor:
        return self._on_device[0]

    @property
    def device_num_targets(self) -> Tensor:
        return self._on_device[1]

    @cached_property
    def device_parts(self) -> tuple[Jagged, ...]:
        of_parts = self._on_device[2:]
        longest = (part.max_length for part in self.parts)
        return tuple(Jagged(*x) for x in zip(of_parts[::2], of_parts[1::2], longest, strict=True))

    @property
    def device_rows(self) -> Jagged:
        return self.device_parts[self.rank]

    @cached_property
    def whole(self) -> Jagged:
        """All rows of the group's sequences in order, on the device."""
        total = sum(part.num_rows for part in self.parts)
        longest = max(self.lengths.tolist(), default=0)
        return Jagged.whole(self.device_lengths, total, longest)

    @cached_property
    def whole_rows(self) -> tuple[Tensor, ...]:
        """Where each rank's rows lie in `whole`: int64 indices on the device."""
        starts = lengths_to_offsets(self.device_lengths)[:-1].long()
        return tuple(starts[part.sequence_ids()] + part.positions for part in self.device_parts)

    @cached_property
    def gathered_rows(self) -> Tensor:
        """The same for the rows of all ranks, rank after rank, as a collective delivers them."""
        return torch.cat(self.whole_rows)


def shard_batch(
    batch: JaggedBatch, layout: Layout, mesh: Mesh | None, *, keep_whole: bool = False
) -> Shard:
    """This rank's own samples in, this rank's slices of its cp group's samples out. Collective.

    All of it is the host's work, messages included: on a GPU job it may run beside a step.

    batch: whole sequences that no other rank reads; ranks may hold different numbers of sequences,
    also none. All must hold the same token features, and all or none costs: else ValueError, on
    all of them.
    mesh: None for a single process without process groups.
    keep_whole: cut only those sequences that must be for ranks to have equal work. They then come
        first in the batch.
    """
    size = 1 if mesh is None else mesh.cp
    if size != layout.cp_size:
        raise ValueError(f"layout: over cp_size={layout.cp_size} for a mesh with cp={size}")
    facts = None if mesh is None or mesh.size == 1 else _Facts.gather(batch, mesh.world)
    if mesh is None or facts is None or (size == 1 and batch.costs is None):
        lengths, num_targets, tokens = batch.lengths, batch.num_targets, batch.tokens
        parts = layout.parts(lengths)
    else:
        trade = _Trade.plan(facts, batch.costs is not None, keep_whole, layout, mesh)
        lengths, num_targets, parts = trade.lengths, trade.num_targets, trade.parts
        names = sorted(batch.tokens)
        payload = trade.run(torch.stack([batch.tokens[name] for name in names], 1), mesh.world)
        tokens = dict(zip(names, payload.unbind(1), strict=True))
    of_all = None if facts is None else (facts.lengths, facts.num_targets)
    if mesh is None:
        group, rank, device, links = None, 0, torch.device("cpu"), None
    else:
        group, device, links = mesh.cp_group, mesh.device, mesh.links
        rank = group.rank()
    return Shard(lengths, num_targets, parts, tokens, group, rank, device, links, of_all)


@dataclass(frozen=True)
class _Facts:
    """Of the sequences of all processes, in order of (rank that read them, place there): [N]."""

    lengths: Tensor  # int64
    num_targets: Tensor
    costs: Tensor  # float64; zeros if the batch has none
    reader: Tensor  # int64: the rank

    @staticmethod
    def gather(batch: JaggedBatch, world: dist.ProcessGroup) -> _Facts:
        """Collective. Raises ValueError, on all ranks, if batches are not alike."""
        count = batch.lengths.numel()
        kind = sorted(batch.tokens), "no costs" if batch.costs is None else "costs"
        costs = torch.zeros(count, dtype=torch.float64) if batch.costs is None else batch.costs
        mine = torch.stack([batch.lengths, batch.num_targets, costs])
        room, most = 0, ROOM
        while most > room:  # else once more, with room for all
            room = most
            message = torch.zeros(2 + 3 * room, dtype=torch.float64)
            message[0], message[1] = count, crc32(repr(kind).encode())
            message[2:].view(3, room)[:, :count] = mine[:, :room]
            gathered = message.new_empty(world.size() * len(message))
            dist.all_gather_into_tensor(gathered, message, group=world)
            by_rank = gathered.view(world.size(), -1)
            counts, kinds = by_rank[:, 0], by_rank[:, 1]
            most = int(counts.max())
        others = (kinds != kinds[0]).nonzero()[:, 0].tolist()
        if others:
            raise ValueError(
                f"batch: all ranks must hold the same token features, and all or none costs, but "
                f"those of {others} hold others than rank 0; here they are {kind[0]}, and {kind[1]}"
            )
        there = torch.arange(room) < counts[:, None]
        lengths, num_targets, costs = by_rank[:, 2:].reshape(-1, 3, room).movedim(1, 0)[:, there]
        return _Facts(lengths.long(), num_targets.long(), costs, there.nonzero()[:, 0])


@dataclass(frozen=True)
class _Trade:
    """Which of my rows go to which rank, and which rows I get; all known on the host."""

    lengths: Tensor  # of my cp group's sequences, in order of (cut first, rank that read them,
    num_targets: Tensor  # place there)
    parts: tuple[Jagged, ...]  # of my cp group
    sends: Tensor  # indices of my rows, rank after rank
    send_splits: list[int]
    receives: list[list[int]]  # by rank: rows of cut sequences, and of whole ones

    @staticmethod
    def plan(facts: _Facts, balanced: bool, keep_whole: bool, layout: Layout, mesh: Mesh) -> _Trade:
        """balanced: sequences are dealt anew to the dp groups. keep_whole: see `shard_batch`."""
        group = deal(facts.costs, mesh.dp) if balanced else facts.reader // mesh.cp
        owner = torch.full_like(group, CUT)
        if keep_whole and mesh.cp > 1:
            some = _that_concern_me(facts, group, mesh)
            owner[some] = _owners_in_groups(facts.lengths[some], group[some], mesh.cp)
        order = (2 * group + (owner != CUT)).argsort(stable=True)
        first_row = facts.lengths.cumsum(0) - facts.lengths  # of each sequence, as they were read
        group, owner, reader, lengths, num_targets, first_row = torch.stack(
            [group, owner, facts.reader, facts.lengths, facts.num_targets, first_row]
        )[:, order]
        before = lengths.cumsum(0) - lengths  # tokens, of the same group's sequences
        before -= before[torch.searchsorted(group, group)]

        mine = (reader == mesh.rank).nonzero()[:, 0]
        sequence, starts, sizes = layout.spans(lengths[mine], before[mine], owner[mine])
        first_of_mine = int(facts.lengths[facts.reader < mesh.rank].sum())
        starts += (first_row[mine] - first_of_mine)[sequence, None]
        to = group[mine][sequence] * mesh.cp + torch.arange(mesh.cp)[:, None]  # [cp, blocks]
        to, by_rank = to.flatten().sort(stable=True)
        starts, sizes = starts.flatten(0, 1)[by_rank], sizes.flatten(0, 1)[by_rank]
        sends = count_out(starts.flatten(), sizes.flatten(), torch.device("cpu"))
        send_splits = torch.zeros(mesh.size, dtype=torch.int64).index_add_(0, to, sizes.sum(1))

        own = (group == mesh.dp_rank).nonzero()[:, 0]
        lengths, num_targets, owner = lengths[own].int(), num_targets[own].int(), owner[own]
        parts = layout.parts(lengths, owner)
        rows_each = parts[mesh.cp_group.rank()].lengths().long()
        receives = torch.zeros(2 * mesh.size, dtype=torch.int64)
        receives.index_add_(0, 2 * reader[own] + (owner != CUT), rows_each)
        return _Trade(
            lengths, num_targets, parts, sends, send_splits.tolist(), receives.view(-1, 2).tolist()
        )

    def run(self, payload: Tensor, world: dist.ProcessGroup) -> Tensor:
        """[my tokens, F] -> [my rows of the group's sequences, F], in the order of the batch."""
        splits = [sum(rows) for rows in self.receives]
        received = trade_rows(payload[self.sends], self.send_splits, splits, world)
        return regroup(received, self.receives)


def _that_concern_me(facts: _Facts, group: Tensor, mesh: Mesh) -> Tensor:
    """The sequences of my own group, and of those that sequences I read go to: indices."""
    groups = torch.zeros(mesh.dp, dtype=torch.bool)
    groups[group[facts.reader == mesh.rank]] = True
    groups[mesh.dp_rank] = True
    return groups[group].nonzero()[:, 0]


def _owners_in_groups(lengths: Tensor, group: Tensor, cp: int) -> Tensor:
    """`parallel.whole.owners` of sequences of some groups in any order: int64 [N] each."""
    _, row, sizes = group.unique(return_inverse=True, return_counts=True)
    order = row.argsort(stable=True)
    place = torch.empty_like(row)
    place[order] = torch.arange(len(row)) - (sizes.cumsum(0) - sizes)[row[order]]
    padded = lengths.new_zeros(len(sizes), int(sizes.max()) if len(sizes) else 0)
    padded[row, place] = lengths
    return owners(padded, cp)[row, place]
