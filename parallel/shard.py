"""Cut a batch along its sequences while it is still integers.

The ranks of one cp group read different samples; `shard_batch` trades slices (a jagged all-to-all)
so that each ends up with its layout's positions of every sequence of the group. Nobody reads data
twice, and everything computed from the tokens afterwards is 1/cp in size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.jagged import Jagged, lengths_to_offsets
from parallel.batch import JaggedBatch
from parallel.layout import Layout


@dataclass(frozen=True)
class Shard:
    """What one cp rank holds of its group's batch of B sequences.

    Host-side lengths decide the size of every message and index list, so a step never waits for
    the device to tell the host a number.
    """

    lengths: Tensor  # int32 [B], host: whole sequences
    num_targets: Tensor  # int32 [B], host
    parts: tuple[Jagged, ...]  # host: the rows of every cp rank
    tokens: dict[str, Tensor]  # device: int64 [rows of this rank]
    group: dist.ProcessGroup | None  # the cp group; None if cp is 1
    rank: int  # in the cp group
    device: torch.device

    @property
    def cp_size(self) -> int:
        return len(self.parts)

    @property
    def rows(self) -> Jagged:
        """This rank's rows, on the host."""
        return self.parts[self.rank]

    @cached_property
    def device_parts(self) -> tuple[Jagged, ...]:
        return tuple(part.to(self.device) for part in self.parts)

    @cached_property
    def device_rows(self) -> Jagged:
        return self.device_parts[self.rank]

    @cached_property
    def device_lengths(self) -> Tensor:
        return self.lengths.to(self.device, non_blocking=True)

    @cached_property
    def device_num_targets(self) -> Tensor:
        return self.num_targets.to(self.device, non_blocking=True)

    @cached_property
    def whole(self) -> Jagged:
        """All rows of the group's sequences in order, on the device."""
        return Jagged.whole(self.lengths).to(self.device)

    @cached_property
    def whole_rows(self) -> tuple[Tensor, ...]:
        """Where each rank's rows lie in `whole`: int64 indices on the device."""
        starts = lengths_to_offsets(self.lengths)[:-1].long()
        return tuple(
            (starts[part.sequence_ids()] + part.positions).to(self.device, non_blocking=True)
            for part in self.parts
        )


def shard_batch(
    batch: JaggedBatch,
    layout: Layout,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Shard:
    """This rank's own samples in, this rank's slices of all the group's samples out.

    batch: whole sequences that no other rank of the group reads; ranks may hold different numbers
    of sequences, also none. All must hold the same token features.
    group: the cp group, of layout.cp_size ranks; None only if that is 1.
    """
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    if size != layout.cp_size:
        raise ValueError(f"group: {size} ranks for a layout over cp_size={layout.cp_size}")
    names = sorted(batch.tokens)
    payload = torch.stack([batch.tokens[name] for name in names], 1)  # [T, features]

    counts, lengths, num_targets = _gather_lengths(batch, group)
    parts = tuple(layout.positions(lengths, r) for r in range(size))
    if group is not None and size > 1:
        firsts = [0, *torch.tensor(counts).cumsum(0).tolist()]  # first sequence of every rank
        payload = _trade(payload, batch.lengths, parts, firsts, group, device)
    else:
        payload = payload.to(device, non_blocking=True)
    tokens = {name: payload[:, i].contiguous() for i, name in enumerate(names)}
    return Shard(lengths, num_targets, parts, tokens, group, rank, device)


def _gather_lengths(
    batch: JaggedBatch, group: dist.ProcessGroup | None
) -> tuple[list[int], Tensor, Tensor]:
    """Sequences per rank, then lengths and num_targets of the whole group, all on the host."""
    if group is None or group.size() == 1:
        return [batch.lengths.numel()], batch.lengths, batch.num_targets
    size = group.size()
    counts = torch.empty(size, dtype=torch.int64)
    dist.all_gather_into_tensor(counts, torch.tensor([batch.lengths.numel()]), group=group)
    padded = torch.zeros(2, int(counts.max()), dtype=torch.int32)
    padded[0, : batch.lengths.numel()] = batch.lengths
    padded[1, : batch.lengths.numel()] = batch.num_targets
    gathered = torch.empty(size, *padded.shape, dtype=torch.int32)
    dist.all_gather_into_tensor(gathered.view(-1), padded.view(-1), group=group)
    per_rank = counts.tolist()
    lengths, num_targets = (
        torch.cat([gathered[r, row, :n] for r, n in enumerate(per_rank)]) for row in (0, 1)
    )
    return per_rank, lengths, num_targets


def _trade(
    payload: Tensor,
    lengths: Tensor,
    parts: tuple[Jagged, ...],
    firsts: list[int],
    group: dist.ProcessGroup,
    device: torch.device,
) -> Tensor:
    """Send each rank its rows of my sequences [T, F]; receive my rows of theirs, in batch order."""
    rank = group.rank()
    my_starts = lengths_to_offsets(lengths)[:-1].long()
    indices = []
    for part in parts:
        first, last = part.offsets[firsts[rank]], part.offsets[firsts[rank + 1]]
        sequence = part.sequence_ids()[first:last] - firsts[rank]
        indices.append(my_starts[sequence] + part.positions[first:last])
    send = payload[torch.cat(indices)].to(device, non_blocking=True)
    receive_splits = parts[rank].offsets[torch.tensor(firsts)].diff().tolist()
    received = torch.empty(sum(receive_splits), send.shape[1], dtype=send.dtype, device=device)
    dist.all_to_all_single(
        received, send, receive_splits, [index.numel() for index in indices], group=group
    )
    return received
