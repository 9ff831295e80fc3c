"""Who holds which positions: pure functions of lengths, on the host.

A layout cuts every sequence into blocks of so many positions, each block into chunks of consecutive
ones, and gives each cp rank some of them. Ranks get equal token counts: a sequence's rows differ by
at most one between ranks, and the leftover rows are dealt round-robin through the batch, so a whole
batch differs by at most one too, even if every sequence is shorter than the cp group. To add a
layout, subclass `Layout`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kernels.jagged import Jagged, lengths_to_offsets
from parallel.spans import count_out

# A multiple of the rows that attention takes at a time: of its tiles none is wasted on a border.
STRIPE = 128


class Layout(ABC):
    """Maps (lengths, cp rank) to positions."""

    def __init__(self, cp_size: int) -> None:
        if cp_size < 1:
            raise ValueError(f"cp_size={cp_size}: want at least 1")
        self.cp_size = cp_size

    @property
    @abstractmethod
    def block(self) -> int:
        """Positions in a block, a multiple of cp_size; the last of a sequence may be shorter."""

    @abstractmethod
    def chunks(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Starts and sizes, int64 [cp, chunks a rank, blocks], of each rank's chunks in blocks of
        the given lengths, in rising order."""

    def positions(self, lengths: Tensor, rank: int, only: Tensor | None = None) -> Jagged:
        """The rows `rank` holds of sequences of the given lengths [B], as a Jagged on the host.

        only: int64 [b], rising: of which of the sequences, if not of all.
        """
        lengths = lengths.long()
        blocks = Jagged.whole((lengths // self.block + 1).int())  # a row is a block
        sequence = blocks.sequence_ids()
        block_lengths = torch.full_like(sequence, self.block)
        block_lengths[blocks.offsets[1:] - 1] = lengths % self.block

        starts, sizes = (x[rank].T for x in self.chunks(block_lengths))  # [blocks, chunks]
        starts = starts + blocks.positions[:, None].long() * self.block
        rows = torch.zeros_like(lengths).index_add_(0, sequence, sizes.sum(1))  # of each sequence
        if only is not None:
            wanted = torch.zeros(len(lengths), dtype=torch.bool).index_fill_(0, only, True)
            starts, sizes, rows = starts[wanted[sequence]], sizes[wanted[sequence]], rows[only]
        positions = count_out(starts.flatten(), sizes.flatten(), torch.device("cpu"))
        return Jagged(lengths_to_offsets(rows), positions.int())

    def shares(self, lengths: Tensor) -> Tensor:
        """Rows per rank and block, int64 [cp, blocks]."""
        cp = self.cp_size
        leftover = lengths % cp
        first = leftover.cumsum(0) - leftover  # where the dealing of leftovers stopped before
        turn = (torch.arange(cp)[:, None] - first) % cp
        return lengths // cp + (turn < leftover)


class ZigzagLayout(Layout):
    """Rank r holds stripes r and 2 cp - 1 - r of every 2 cp. The rest of a sequence, too short for
    2 cp stripes, is cut into 2 cp equal chunks and dealt alike.

    Under a causal mask every rank has equal work, and so it has against the keys of any one other
    rank, with light rows among the heavy ones: none of a ring's steps ends in a tail of heavy ones.
    """

    @property
    def block(self) -> int:
        return 2 * self.cp_size * STRIPE

    def chunks(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        shares = self.shares(lengths)
        front, back = (shares + 1) // 2, shares // 2
        sizes = torch.stack([front, back], 1)
        in_order = torch.cat([front, back.flip(0)])  # [2 cp, blocks], in order of position
        starts = in_order.cumsum(0) - in_order
        cp = self.cp_size
        return torch.stack([starts[:cp], starts[cp:].flip(0)], 1), sizes


class ContiguousLayout(Layout):
    """Rank r holds the r-th of cp equal chunks: fewest neighbours under a windowed mask."""

    @property
    def block(self) -> int:
        return self.cp_size << 40  # longer than any sequence

    def chunks(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        sizes = self.shares(lengths)
        return (sizes.cumsum(0) - sizes)[:, None], sizes[:, None]


LAYOUTS: dict[str, type[Layout]] = {"zigzag": ZigzagLayout, "contiguous": ContiguousLayout}
