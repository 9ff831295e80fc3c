"""What every rank's queries see of the group's sequences: made once per batch, for all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kernels.jagged import Jagged, lengths_to_offsets
from parallel.relayout import Relayout
from parallel.shard import Shard

# (query rows, lengths [B], num_targets [B]) -> int32 [rows, 4], as in `kernels.masks`.
Mask = Callable[[Jagged, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Visibility:
    """A shard and the mask over it. What an exchange does not ask for is never computed."""

    shard: Shard
    mask: Mask

    @cached_property
    def intervals(self) -> Tensor:
        """Of this rank's queries, on the device."""
        return self._on_device(self.shard.device_rows)

    @cached_property
    def whole_intervals(self) -> Tensor:
        """Of all queries of the group, in the order of shard.whole, on the device."""
        return self._on_device(self.shard.whole)

    @cached_property
    def seen_parts(self) -> tuple[Jagged, ...]:
        """For each rank the positions that any of its queries sees, on the host."""
        shard = self.shard
        offsets = lengths_to_offsets(shard.lengths)
        total = int(offsets[-1])
        position = Jagged.whole(shard.lengths).positions
        sequence = torch.repeat_interleave(torch.arange(shard.lengths.numel()), shard.lengths)
        parts = []
        for rows in shard.parts:
            intervals = self.mask(rows, shard.lengths, shard.num_targets)
            bounds = (intervals + offsets[rows.sequence_ids(), None]).long()
            # +1 where an interval starts, -1 where it ends: the running sum counts who sees a row.
            edges = torch.zeros(total + 1, dtype=torch.int32)
            one = torch.ones(rows.num_rows, dtype=torch.int32)
            for start, end in ((bounds[:, 0], bounds[:, 1]), (bounds[:, 2], bounds[:, 3])):
                edges.index_add_(0, start, one).index_add_(0, end, -one)
            seen = (edges.cumsum(0)[:-1] > 0).nonzero()[:, 0]
            counts = torch.bincount(sequence[seen], minlength=shard.lengths.numel())
            parts.append(Jagged(lengths_to_offsets(counts), position[seen]))
        return tuple(parts)

    @cached_property
    def halo(self) -> tuple[Relayout, Jagged]:
        """The move that brings this rank the rows it sees, and where they are, on the device."""
        shard = self.shard
        assert shard.group is not None
        move = Relayout.between(
            shard.lengths, shard.parts, self.seen_parts, shard.group, shard.device
        )
        return move, self.seen_parts[shard.rank].to(shard.device)

    def _on_device(self, queries: Jagged) -> Tensor:
        return self.mask(queries, self.shard.device_lengths, self.shard.device_num_targets)
