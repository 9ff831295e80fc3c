"""Rows as few spans of consecutive ones: what ranks hold, see and send, from the spans' ends alone.

A batch has a million rows but only a few spans a sequence and rank, so what the host has to know
for its messages costs it microseconds. The rows themselves are counted out on the device.

The sequences of all ranks lie on one line, with a gap of one after each, so that spans of two of
them never touch. Spans are int64 [n, 2], (start, end), rising and apart from each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jagged import Jagged, lengths_to_offsets
from kernels.transfer import copy_to


@dataclass(frozen=True)
class Line:
    """Position p of sequence b lies, for rank r, at starts[r, b] + p."""

    starts: Tensor  # int64 [ranks, B], host
    stride: int  # from one rank to the next

    @staticmethod
    def of(lengths: Tensor, ranks: int) -> Line:
        room = lengths.long() + 1
        stride = int(room.sum())
        return Line(torch.arange(ranks)[:, None] * stride + room.cumsum(0) - room, stride)

    def spans(self, parts: Sequence[Jagged]) -> Tensor:
        """Of rows on the host, one Jagged a rank."""
        positions = torch.cat([part.positions for part in parts])
        ends = torch.cat([part.lengths() for part in parts]).cumsum(0)  # of sequences
        begins = torch.ones(positions.numel() + 1, dtype=torch.bool)  # one more: the end of all
        torch.ne(positions[1:], positions[:-1] + 1, out=begins[1:-1])
        begins[ends] = True
        edges = begins.nonzero()[:, 0]
        rows, sizes = edges[:-1], edges.diff()
        sequence = torch.searchsorted(ends, rows, right=True)
        start = self.starts.flatten()[sequence] + positions[rows]
        return torch.stack([start, start + sizes], 1)

    def own(self, spans: Tensor, rank: int) -> Tensor:
        """One rank's, as if it were the first rank."""
        return spans[spans[:, 0] // self.stride == rank] - rank * self.stride

    def sequences(self, spans: Tensor) -> tuple[Tensor, Tensor]:
        """Of each span: rank * B + its sequence, and where that starts."""
        starts = self.starts.flatten()
        index = torch.searchsorted(starts, spans[:, 0].contiguous(), right=True) - 1
        return index, starts[index]

    def shared_rows(self, spans: Tensor, others: Tensor) -> Tensor:
        """int64 [r, o]: how many rows of rank r's `spans` are also in rank o's `others`."""
        ranks = len(self.starts)
        found = torch.zeros(ranks, ranks, dtype=torch.int64)
        rank = spans[:, 0] // self.stride
        return found.index_add_(1, rank, self.rows_of_each(spans, others)).T

    def rows_of_each(self, spans: Tensor, others: Tensor) -> Tensor:
        """int64 [o, n]: how many rows of each of n spans are also in rank o's `others`."""
        ranks = len(self.starts)
        rank = spans[:, 0] // self.stride
        # The ends of every span, laid among each rank's others: how many rows of those lie before?
        laid = spans - self.stride * (rank - torch.arange(ranks)[:, None])[..., None]
        starts, ends = others.T.contiguous()
        begun = torch.searchsorted(starts, laid)
        before = F.pad((ends - starts).cumsum(0), (1, 0))[begun]
        before -= (F.pad(ends, (1, 0))[begun] - laid).clamp_(min=0)  # the last may end behind
        return before[..., 1] - before[..., 0]

    def jagged(self, spans: Tensor, rank: int, device: torch.device) -> Jagged:
        """The rows of one rank, on the device."""
        own = self.own(spans, rank)
        sequence, starts = self.sequences(own)
        sizes = own[:, 1] - own[:, 0]
        lengths = torch.zeros_like(self.starts[0]).index_add_(0, sequence, sizes)
        positions = count_out(own[:, 0] - starts, sizes, device).int()
        return Jagged(copy_to(lengths_to_offsets(lengths), device), positions)


def overlap(spans: Tensor, times: int) -> Tensor:
    """Where at least `times` of [m, 2] spans, in any order, lie over each other; 1: the union."""
    points, depth = _depth(spans)
    return _where(points, depth >= times)


def alone(spans: Tensor) -> Tensor:
    """Where exactly one of [m, 2] spans, in any order, lies; what is left may touch."""
    points, depth = _depth(spans)
    return _where(points, depth == 1)


def _depth(spans: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of all spans, rising, and how many lie behind each."""
    points, order = spans.T.flatten().sort(stable=True)  # starts come before ends at the same place
    return points, torch.where(order < len(spans), 1, -1).cumsum(0)


def _where(points: Tensor, inside: Tensor) -> Tensor:
    """Spans that begin at points from which on it is inside, and end where it is no longer."""
    turns = F.pad(inside.to(torch.int8), (1, 0)).diff()
    found = torch.stack([points[turns == 1], points[turns == -1]], 1)
    return found[found[:, 0] < found[:, 1]]


def count_out(starts: Tensor, sizes: Tensor, device: torch.device) -> Tensor:
    """For each span in turn start, start + 1, ...: int64, made on the device from one copy."""
    ends = sizes.cumsum(0)
    total = int(sizes.sum())
    shift, sizes = copy_to(torch.stack([starts - ends + sizes, sizes]), device)
    shift = torch.repeat_interleave(shift, sizes, output_size=total)
    return shift.add_(torch.arange(total, device=device))
