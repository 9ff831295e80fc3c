"""Move rows from one layout of the same sequences to another, or to parts of them.

A jagged all-to-all, differentiable, that moves only the rows that change owner. For models that
want another layout in some layers or go on with the most recent tokens alone, and for attention
that needs some of the other ranks' rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.backend import accumulator
from parallel.spans import Line, count_out, overlap
from parallel.trade import begin_trade


@dataclass(frozen=True)
class Relayout:
    """One rank's part of a move, made on the host once per batch: which rows go where.

    Rows are int64 indices on the device. A row may go to several ranks; on the way back, what
    comes from them is summed, in the order of ranks.
    """

    stays: tuple[Tensor, Tensor]  # rows of the source, and where they are in the target
    sends: Tensor  # rows of the source that other ranks want, rank after rank
    send_splits: list[int]  # how many each wants; none for this rank
    receives: Tensor  # rows of the target that other ranks hold, rank after rank
    receive_splits: list[int]
    num_rows: int  # of this rank in the target
    trade: Callable[[Tensor, Sequence[int], Sequence[int]], Trade]  # begins one
    summing: bool = False  # on the way back, where several ranks' rows may become one

    @staticmethod
    def between(
        line: Line, source: Tensor, target: Tensor, group: dist.ProcessGroup, device: torch.device
    ) -> Relayout:
        """From the rows of `source` to those of `target`: spans on the line, of all ranks.

        Raises ValueError if the target wants a position that no rank holds.
        """
        rank = group.rank()
        old, new = line.own(source, rank), line.own(target, rank)
        sends, receives = _Rows.shared(line, old, target), _Rows.shared(line, new, source)
        num_rows = int((new[:, 1] - new[:, 0]).sum())
        if int(receives.sizes.sum()) != num_rows:
            raise ValueError("target: wants positions that no rank of the source holds")
        lists = [rows.where(rows.rank == rank) for rows in (sends, receives)]
        lists += [rows.where(rows.rank != rank) for rows in (sends, receives)]
        # All lists in one: one copy to the device and a few launches there.
        starts = torch.cat([rows.starts for rows in lists])
        sizes = torch.cat([rows.sizes for rows in lists])
        counts = [int(rows.sizes.sum()) for rows in lists]
        stay_old, stay_new, send, receive = count_out(starts, sizes, device).split(counts)
        send_splits, receive_splits = (rows.counts(group.size()) for rows in lists[2:])
        stays, trade = (stay_old, stay_new), partial(_AllToAll, group=group)
        return Relayout(stays, send, send_splits, receive, receive_splits, num_rows, trade)

    def reversed(self, num_rows: int) -> Relayout:
        """The move back, to the `num_rows` rows this rank held in the source."""
        return Relayout(
            self.stays[::-1],
            self.receives,
            self.receive_splits,
            self.sends,
            self.send_splits,
            num_rows,
            self.trade,
            summing=True,
        )

    def move(self, x: Tensor) -> Tensor:
        """Rows [source rows, ...] -> [target rows, ...]; what arrives at a row is summed, in at
        least float32 where several ranks may send one."""
        return self.begin(x).finish()[0]

    def begin(self, *parts: Tensor) -> Moving:
        """`move` of several tensors in one message, beside what comes next."""
        send = _columns(parts, self.sends)
        return Moving(self, parts, self.trade(send, self.send_splits, self.receive_splits))


class Trade(Protocol):
    """Rows for every rank, and from each, on their way. Made of rows [n, width] that go, rank after
    rank, how many each gets, and how many each sends."""

    def arrive(self) -> Sequence[Tensor]:
        """What has come from each rank."""

    def settle(self) -> None:
        """Once `arrive` is done: what is enqueued from now on may overwrite what was sent."""


@dataclass(frozen=True)
class Moving:
    """Rows of several tensors on their way: `finish`, then `settle`."""

    plan: Relayout
    parts: Sequence[Tensor]
    trade: Trade

    def finish(self) -> list[Tensor]:
        """The rows in the target, of each tensor: columns of one buffer."""
        plan, first, widths = self.plan, self.parts[0], [_width(x) for x in self.parts]
        shape = plan.num_rows, sum(widths)
        if plan.summing:
            out = first.new_zeros(shape, dtype=accumulator(first.dtype))
        else:
            out = first.new_empty(shape)  # every row arrives or stays
        old, new = plan.stays
        if len(old):
            out[new] = _columns(self.parts, old).to(out.dtype)
        put = out.index_add_ if plan.summing else out.index_copy_
        to = plan.receives.split(plan.receive_splits)
        for values, rows in zip(self.trade.arrive(), to, strict=True):
            if len(rows):  # all different: no sum depends on an order
                put(0, rows, values.to(out.dtype))
        columns = out.to(first.dtype).split(widths, 1)
        return [y.view(len(y), *x.shape[1:]) for x, y in zip(self.parts, columns, strict=True)]

    def settle(self) -> None:
        """See `Trade.settle`."""
        self.trade.settle()


class _AllToAll:
    """A `Trade` by the process group."""

    def __init__(
        self,
        send: Tensor,
        send_splits: Sequence[int],
        receive_splits: Sequence[int],
        group: dist.ProcessGroup,
    ) -> None:
        self.splits = list(receive_splits)
        self.received = begin_trade(send, send_splits, receive_splits, group)

    def arrive(self) -> Sequence[Tensor]:
        return self.received().split(self.splits)

    def settle(self) -> None:
        """It is one operation."""


def _columns(parts: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Those rows of tensors [n, ...], side by side."""
    widths = [_width(x) for x in parts]
    out = parts[0].new_empty(len(rows), sum(widths))
    for x, columns in zip(parts, out.split(widths, 1), strict=True):
        torch.index_select(x.reshape(len(x), columns.shape[1]), 0, rows, out=columns)
    return out


def _width(x: Tensor) -> int:
    return x.shape[1:].numel()


def relayout(x: Tensor, plan: Relayout) -> Tensor:
    """`plan.move` with its gradient, which moves back; dropped rows get zeros. Collective."""
    return _Relayout.apply(x, plan)


class _Relayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Relayout) -> Tensor:
        ctx.back = plan.reversed(x.shape[0])
        return plan.move(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.back.move(dout), None


def rows_within(line: Line, mine: Tensor, part: Tensor, device: torch.device) -> Tensor:
    """Which rows of `mine` those of `part` are: spans of one rank, see Line.own. int64."""
    rows = _Rows.shared(line, mine, part)
    return count_out(rows.starts, rows.sizes, device)


@dataclass(frozen=True)
class _Rows:
    """Rows of this rank, as spans, that another rank has too."""

    starts: Tensor  # int64 [n]: the first row of each span
    sizes: Tensor
    rank: Tensor  # the other one; rising

    @staticmethod
    def shared(line: Line, mine: Tensor, others: Tensor) -> _Rows:
        """mine: this rank's spans, see Line.own; others: those of all ranks."""
        ranks = torch.arange(len(line.starts))
        for_each = (mine + line.stride * ranks[:, None, None]).view(-1, 2)
        shared = overlap(torch.cat([for_each, others]), 2)
        rank = shared[:, 0] // line.stride
        at = shared[:, 0] - rank * line.stride
        sizes = mine[:, 1] - mine[:, 0]
        rows_before = sizes.cumsum(0) - sizes
        span = torch.searchsorted(mine[:, 0].contiguous(), at, right=True) - 1
        return _Rows(rows_before[span] + at - mine[span, 0], shared[:, 1] - shared[:, 0], rank)

    def where(self, chosen: Tensor) -> _Rows:
        return _Rows(self.starts[chosen], self.sizes[chosen], self.rank[chosen])

    def counts(self, ranks: int) -> list[int]:
        return self.sizes.new_zeros(ranks).index_add_(0, self.rank, self.sizes).tolist()
