"""Who holds which positions: pure functions of lengths, on the host.

A layout cuts every sequence into blocks of so many positions, each block into chunks of consecutive
ones, and gives each cp rank some of them. Ranks get equal token counts: a sequence's rows differ by
at most one between ranks, and the leftover rows are dealt round-robin through the batch, so a whole
batch differs by at most one too, even if every sequence is shorter than the cp group. But sequences
that one rank owns are not cut: how equal ranks are then, `whole.py` says. To add a layout, subclass
`Layout`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kernels.jagged import Jagged
from parallel.spans import count_out
from parallel.whole import CUT

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
    def chunks(self, lengths: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Starts and sizes, int64 [cp, blocks, chunks a rank], of each rank's chunks in blocks of
        the given lengths, in rising order. before: see `shares`."""

    def spans(
        self, lengths: Tensor, before: Tensor, owners: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What every rank holds of any sequences of a batch, in spans of positions.

        lengths, before: int64 [B], of each sequence and of all those before it in its batch.
        owners: int64 [B], see `parallel.whole`.
        Returns the sequence of each block, and the starts and sizes of its chunks, see `chunks`.
        """
        blocks = torch.where(owners == CUT, lengths // self.block + 1, 1)
        sequence = torch.repeat_interleave(blocks)
        first = torch.arange(len(sequence)) - (blocks.cumsum(0) - blocks)[sequence]
        first *= self.block
        starts, sizes = self.chunks(
            (lengths[sequence] - first).clamp_(max=self.block), before[sequence]
        )
        starts += first[:, None]
        whole = (owners[sequence] != CUT).nonzero()[:, 0]
        of_whole = sequence[whole]
        starts[:, whole] = 0
        sizes[:, whole] = 0
        sizes[owners[of_whole], whole, 0] = lengths[of_whole]
        return sequence, starts, sizes

    def parts(self, lengths: Tensor, owners: Tensor | None = None) -> tuple[Jagged, ...]:
        """The rows that each rank holds of a batch of the given lengths [B], on the host.

        owners: int64 [B], see `parallel.whole`; None: all sequences are cut.
        """
        lengths = lengths.long()
        if owners is None:
            owners = torch.full_like(lengths, CUT)
        sequence, starts, sizes = self.spans(lengths, lengths.cumsum(0) - lengths, owners)
        positions = count_out(starts.flatten(), sizes.flatten(), torch.device("cpu")).int()
        rows = torch.zeros(self.cp_size, len(lengths), dtype=torch.int64)
        rows.index_add_(1, sequence, sizes.sum(2))
        offsets = torch.nn.functional.pad(rows.cumsum(1, dtype=torch.int32), (1, 0))
        by_rank = positions.split(rows.sum(1).tolist())
        longest = rows.amax(1).tolist() if len(lengths) else [0] * self.cp_size
        return tuple(Jagged(*part) for part in zip(offsets, by_rank, longest, strict=True))

    def shares(self, lengths: Tensor, before: Tensor) -> Tensor:
        """Rows per rank and block, int64 [cp, blocks].

        before: int64 [blocks], tokens of the batch before a block's sequence. Only the last block
        of a sequence has leftovers, so this tells where the dealing of those before it stopped.
        """
        turn = (torch.arange(self.cp_size)[:, None] - before) % self.cp_size
        return lengths // self.cp_size + (turn < lengths % self.cp_size)


class ZigzagLayout(Layout):
    """Rank r holds stripes r and 2 cp - 1 - r of every 2 cp. The rest of a sequence, too short for
    2 cp stripes, is cut into 2 cp equal chunks and dealt alike.

    Under a causal mask every rank has equal work, and so it has against the keys of any one other
    rank, with light rows among the heavy ones: none of a ring's steps ends in a tail of heavy ones.
    """

    @property
    def block(self) -> int:
        return 2 * self.cp_size * STRIPE

    def chunks(self, lengths: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        shares = self.shares(lengths, before)
        back = shares // 2
        front = shares - back
        in_order = torch.cat([front, back.flip(0)])  # [2 cp, blocks], in order of position
        starts = in_order.cumsum(0) - in_order
        cp = self.cp_size
        return torch.stack([starts[:cp], starts[cp:].flip(0)], 2), torch.stack([front, back], 2)


class ContiguousLayout(Layout):
    """Rank r holds the r-th of cp equal chunks: fewest neighbours under a windowed mask."""

    @property
    def block(self) -> int:
        return self.cp_size << 40  # longer than any sequence

    def chunks(self, lengths: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        sizes = self.shares(lengths, before)
        return (sizes.cumsum(0) - sizes)[..., None], sizes[..., None]


LAYOUTS: dict[str, type[Layout]] = {"zigzag": ZigzagLayout, "contiguous": ContiguousLayout}
