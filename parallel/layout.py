"""Who holds which positions: pure functions of lengths, on the host.

A layout cuts every sequence into chunks of consecutive positions and gives each cp rank some of
them. Ranks get equal token counts: a sequence's rows differ by at most one between ranks, and the
leftover rows are dealt round-robin through the batch, so a whole batch differs by at most one too,
even if every sequence is shorter than the cp group. To add a layout, subclass `Layout`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kernels.jagged import Jagged, lengths_to_offsets


class Layout(ABC):
    """Maps (lengths, cp rank) to positions."""

    def __init__(self, cp_size: int) -> None:
        if cp_size < 1:
            raise ValueError(f"cp_size={cp_size}: want at least 1")
        self.cp_size = cp_size

    @abstractmethod
    def chunks(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Starts and sizes, int64 [cp, chunks a rank, B], of each rank's chunks in rising order."""

    def positions(self, lengths: Tensor, rank: int, only: Tensor | None = None) -> Jagged:
        """The rows `rank` holds of sequences of the given lengths [B], as a Jagged on the host.

        only: int64 [b], of which of the sequences, if not of all.
        """
        starts, sizes = (x[rank].T for x in self.chunks(lengths))  # [B, chunks]
        if only is not None:
            starts, sizes = starts[only], sizes[only]
        per_sequence, total = sizes.sum(1), int(sizes.sum())
        starts, sizes = starts.flatten(), sizes.flatten()
        first_row = lengths_to_offsets(sizes)[:-1]
        shift = torch.repeat_interleave(starts - first_row, sizes, output_size=total)
        positions = (torch.arange(total) + shift).to(torch.int32)
        return Jagged(lengths_to_offsets(per_sequence), positions)

    def shares(self, lengths: Tensor) -> Tensor:
        """Rows per rank and sequence, int64 [cp, B]."""
        cp, lengths = self.cp_size, lengths.long()
        leftover = lengths % cp
        first = leftover.cumsum(0) - leftover  # where the dealing of leftovers stopped before
        turn = (torch.arange(cp)[:, None] - first) % cp
        return lengths // cp + (turn < leftover)


class ZigzagLayout(Layout):
    """Rank r holds chunks r and 2 cp - 1 - r of 2 cp: equal work under a causal mask."""

    def chunks(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        shares = self.shares(lengths)
        front, back = (shares + 1) // 2, shares // 2
        sizes = torch.stack([front, back], 1)
        in_order = torch.cat([front, back.flip(0)])  # [2 cp, B], in order of position
        starts = in_order.cumsum(0) - in_order
        cp = self.cp_size
        return torch.stack([starts[:cp], starts[cp:].flip(0)], 1), sizes


class ContiguousLayout(Layout):
    """Rank r holds the r-th of cp equal chunks: fewest neighbours under a windowed mask."""

    def chunks(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        sizes = self.shares(lengths)
        return (sizes.cumsum(0) - sizes)[:, None], sizes[:, None]


LAYOUTS: dict[str, type[Layout]] = {"zigzag": ZigzagLayout, "contiguous": ContiguousLayout}
