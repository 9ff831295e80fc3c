"""Cut a batch along its sequences while it is still integers.

All ranks read different samples; `shard_batch` trades slices (a jagged all-to-all) so that each
ends up with its layout's positions of every sequence of its cp group. Nobody reads data twice, and
everything computed from the tokens afterwards is 1/cp in size. Sequences may be dealt anew to the
dp groups on the way, for equal work.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.jagged import Jagged, lengths_to_offsets
from kernels.transfer import copy_together
from parallel.balance import deal
from parallel.batch import JaggedBatch
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.transport import Links


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

    @property
    def cp_size(self) -> int:
        return len(self.parts)

    @property
    def rows(self) -> Jagged:
        """This rank's rows, on the host."""
        return self.parts[self.rank]

    @cached_property
    def device_parts(self) -> tuple[Jagged, ...]:
        both = [x for part in self.parts for x in (part.offsets, part.positions)]
        copies = copy_together(both, self.device)
        return tuple(Jagged(*pair) for pair in zip(copies[::2], copies[1::2], strict=True))

    @cached_property
    def device_rows(self) -> Jagged:
        return self.device_parts[self.rank]

    @cached_property
    def _device_sizes(self) -> list[Tensor]:
        return copy_together([self.lengths, self.num_targets], self.device)

    @property
    def device_lengths(self) -> Tensor:
        return self._device_sizes[0]

    @property
    def device_num_targets(self) -> Tensor:
        return self._device_sizes[1]

    @cached_property
    def whole(self) -> Jagged:
        """All rows of the group's sequences in order, on the device."""
        return Jagged.whole(self.device_lengths, sum(part.num_rows for part in self.parts))

    @cached_property
    def whole_rows(self) -> tuple[Tensor, ...]:
        """Where each rank's rows lie in `whole`: int64 indices on the device."""
        starts = lengths_to_offsets(self.device_lengths)[:-1].long()
        return tuple(starts[part.sequence_ids()] + part.positions for part in self.device_parts)

    @cached_property
    def gathered_rows(self) -> Tensor:
        """The same for the rows of all ranks, rank after rank, as a collective delivers them."""
        return torch.cat(self.whole_rows)


def shard_batch(batch: JaggedBatch, layout: Layout, mesh: Mesh | None) -> Shard:
    """This rank's own samples in, this rank's slices of its cp group's samples out. Collective.

    All of it is the host's work, messages included: on a GPU job it may run beside a step.

    batch: whole sequences that no other rank reads; ranks may hold different numbers of sequences,
    also none. All must hold the same token features, and all or none costs.
    mesh: None for a single process without process groups.
    """
    size = 1 if mesh is None else mesh.cp
    if size != layout.cp_size:
        raise ValueError(f"layout: over cp_size={layout.cp_size} for a mesh with cp={size}")
    names = sorted(batch.tokens)
    payload = torch.stack([batch.tokens[name] for name in names], 1)  # [T, features]
    if mesh is None or (size == 1 and batch.costs is None):
        parts: tuple[Jagged, ...] = (layout.positions(batch.lengths, 0),)
        lengths, num_targets = batch.lengths, batch.num_targets
    else:
        trade = _Trade.plan(batch, layout, mesh)
        lengths, num_targets, parts = trade.lengths, trade.num_targets, trade.parts
        payload = trade.run(payload)
    tokens = {name: payload[:, i].contiguous() for i, name in enumerate(names)}
    if mesh is None:
        return Shard(lengths, num_targets, parts, tokens, None, 0, torch.device("cpu"))
    group = mesh.cp_group
    return Shard(lengths, num_targets, parts, tokens, group, group.rank(), mesh.device, mesh.links)


@dataclass(frozen=True)
class _Trade:
    """Which of my rows go to which rank, and which rows I get; all known on the host."""

    lengths: Tensor  # of my cp group's sequences, in order of (rank that read them, place there)
    num_targets: Tensor
    parts: tuple[Jagged, ...]  # of my cp group
    sends: list[Tensor]  # per rank: indices of my rows
    receives: list[int]  # per rank: how many rows come
    group: dist.ProcessGroup

    @staticmethod
    def plan(batch: JaggedBatch, layout: Layout, mesh: Mesh) -> _Trade:
        balanced = batch.costs is not None
        group = mesh.world if balanced else mesh.cp_group
        reader, facts = _gather_facts(batch, group)
        lengths, num_targets = facts[0].int(), facts[1].int()
        num_groups, mine = (mesh.dp, mesh.dp_rank) if balanced else (1, 0)
        dealt = deal(facts[2], num_groups) if balanced else torch.zeros_like(reader)

        my_starts = lengths_to_offsets(batch.lengths)[:-1].long()
        first_of_mine = int((reader < group.rank()).sum())
        sends = []
        for g in range(num_groups):
            sequences = (dealt == g).nonzero()[:, 0]
            of_mine = (reader[sequences] == group.rank()).nonzero()[:, 0]
            starts = my_starts[sequences[of_mine] - first_of_mine]
            for r in range(mesh.cp):
                rows = layout.positions(lengths[sequences], r, of_mine)
                sends.append(starts[rows.sequence_ids()] + rows.positions)

        own = (dealt == mine).nonzero()[:, 0]
        parts = tuple(layout.positions(lengths[own], r) for r in range(mesh.cp))
        rows_each = parts[mesh.cp_group.rank()].lengths().long()
        receives = torch.zeros(group.size(), dtype=torch.int64)
        receives.index_add_(0, reader[own], rows_each)
        return _Trade(lengths[own], num_targets[own], parts, sends, receives.tolist(), group)

    def run(self, payload: Tensor) -> Tensor:
        """[my tokens, F] -> [my rows of the group's sequences, F], in the order of the batch."""
        send = payload[torch.cat(self.sends)]
        received = send.new_empty(sum(self.receives), send.shape[1])
        splits = [rows.numel() for rows in self.sends]
        dist.all_to_all_single(received, send, self.receives, splits, group=self.group)
        return received


def _gather_facts(batch: JaggedBatch, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Of all sequences of the group: the rank that read each, int64 [N], and float64 [3, N]:
    lengths, num_targets and costs. On the host."""
    size, count = group.size(), batch.lengths.numel()
    counts = torch.empty(size, dtype=torch.int64)
    dist.all_gather_into_tensor(counts, torch.tensor([count]), group=group)
    padded = torch.zeros(3, int(counts.max()), dtype=torch.float64)
    padded[0, :count], padded[1, :count] = batch.lengths, batch.num_targets
    if batch.costs is not None:
        padded[2, :count] = batch.costs
    gathered = torch.empty(size * padded.numel(), dtype=torch.float64)
    dist.all_gather_into_tensor(gathered, padded.view(-1), group=group)
    by_rank = gathered.view(size, 3, -1)
    facts = torch.cat([by_rank[r, :, :n] for r, n in enumerate(counts.tolist())], 1)
    return torch.repeat_interleave(torch.arange(size), counts), facts
