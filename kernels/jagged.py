"""Where the rows of a jagged buffer are and which tokens they are.

Every kernel takes queries and keys as a dense row buffer [T, ...] plus a `Jagged`. A whole
sequence on one device, one step of a ring, a gathered buffer and a cached prefix differ only in
their `Jagged`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def lengths_to_offsets(lengths: Tensor) -> Tensor:
    """Exclusive prefix sum: lengths [B] -> int32 offsets [B + 1], on the same device."""
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class Jagged:
    """Rows of B sequences, concatenated.

    offsets: int32 [B + 1]; sequence b owns rows offsets[b] to offsets[b + 1] - 1.
    positions: int32 [T]; a row's token index in its whole sequence, increasing within a sequence.
    max_length: no sequence has more rows, if the host knows: attention's backward may then be
        faster. If one has after all, that backward ends a GPU's process.
    """

    offsets: Tensor
    positions: Tensor
    max_length: int | None = None

    @staticmethod
    def whole(lengths: Tensor, total: int | None = None, max_length: int | None = None) -> Jagged:
        """Whole sequences of the given lengths [B]: positions count 0, 1, ... in each.

        total: the sum of lengths, if the caller knows it; spares a GPU the host's wait for it.
        max_length: at least the longest, likewise; found here if `total` is None.
        Raises ValueError for negative lengths, if `total` is None.
        """
        offsets = lengths_to_offsets(lengths)
        if total is None:
            known = lengths.tolist()
            if min(known, default=0) < 0:
                raise ValueError(f"lengths: want 0 or more, got {min(known)}")
            total, max_length = sum(known), max(known, default=0)
        rows = torch.arange(total, dtype=torch.int32, device=lengths.device)
        starts = torch.repeat_interleave(offsets[:-1], lengths, output_size=total)
        return Jagged(offsets, rows - starts, max_length)

    @property
    def num_sequences(self) -> int:
        return self.offsets.numel() - 1

    @property
    def num_rows(self) -> int:
        return self.positions.numel()

    def piece(self, start: int, end: int) -> Jagged:
        """The rows start to end - 1 alone; of the same sequences, some of them empty now."""
        offsets = (self.offsets - start).clamp_(0, end - start)
        return Jagged(offsets, self.positions[start:end], self.max_length)

    def lengths(self) -> Tensor:
        """Rows per sequence, int32 [B]."""
        return self.offsets.diff()

    def sequence_ids(self) -> Tensor:
        """The sequence each row belongs to, int64 [T]."""
        ids = torch.arange(self.num_sequences, device=self.offsets.device)
        return torch.repeat_interleave(ids, self.lengths(), output_size=self.num_rows)
