"""Move rows from one layout of the same sequences to another, or to parts of them.

A jagged all-to-all, differentiable, that moves only the rows that change owner. For models that
want another layout in some layers or go on with the most recent tokens alone, and for attention
that needs some of the other ranks' rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.backend import accumulator
from parallel.links import Links
from parallel.spans import Line, count_out, overlap
from parallel.swaps import Route, Swaps


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
    route: Route
    summing: bool = False  # on the way back, where several ranks' rows may become one

    @staticmethod
    def between(
        line: Line,
        source: Tensor,
        target: Tensor,
        links: Links,
        device: torch.device,
        name: str = "rows",
    ) -> Relayout:
        """From the rows of `source` to those of `target`: spans on the line, of all ranks.

        name: of the messages. Raises ValueError if the target wants a position that no rank holds.
        """
        counts = line.shared_rows(target, source)
        route = Route.of(counts, links, name)
        rank = route.link.group.rank()
        old, new = line.own(source, rank), line.own(target, rank)
        sends, receives = _Rows.shared(line, old, target), _Rows.shared(line, new, source)
        num_rows = int((new[:, 1] - new[:, 0]).sum())
        if int(counts[rank].sum()) != num_rows:
            raise ValueError("target: wants positions that no rank of the source holds")
        lists = [rows.where(rows.rank == rank) for rows in (sends, receives)]
        lists += [rows.where(rows.rank != rank) for rows in (sends, receives)]
        # All lists in one: one copy to the device and a few launches there.
        starts = torch.cat([rows.starts for rows in lists])
        sizes = torch.cat([rows.sizes for rows in lists])
        rows = count_out(starts, sizes, device)
        stay_old, stay_new, send, receive = rows.split([int(x.sizes.sum()) for x in lists])
        counts[rank, rank] = 0
        splits = counts[:, rank].tolist(), counts[rank].tolist()
        return Relayout((stay_old, stay_new), send, splits[0], receive, splits[1], num_rows, route)

    def reversed(self, num_rows: int) -> Relayout:
        """The move back, to the `num_rows` rows this rank held in the source."""
        return Relayout(
            self.stays[::-1],
            self.receives,
            self.receive_splits,
            self.sends,
            self.send_splits,
            num_rows,
            self.route.reversed(),
            summing=True,
        )

    def move(self, x: Tensor) -> Tensor:
        """Rows [source rows, ...] -> [target rows, ...]; what arrives at a row is summed, in at
        least float32 where several ranks may send one."""
        moving = self.begin(x)
        (out,) = moving.finish()
        moving.settle()
        return out

    def begin(self, *parts: Tensor) -> Moving:
        """`move` of several tensors in one message, beside what comes next."""
        send = _columns(parts, self.sends)
        swaps = Swaps(send, self.send_splits, self.receive_splits, self.route)
        staying = _columns(parts, self.stays[0])
        return Moving(self, [x.shape[1:] for x in parts], staying, swaps)


@dataclass(frozen=True)
class Moving:
    """Rows of several tensors on their way: `finish` or `read`, then `settle`."""

    plan: Relayout
    shapes: list[torch.Size]  # of a row of each
    staying: Tensor  # rows of plan.stays, packed
    swaps: Swaps

    def finish(self) -> list[Tensor]:
        """The rows in the target, of each tensor: columns of one buffer."""
        plan, dtype = self.plan, self.swaps.dtype
        shape = plan.num_rows, self.staying.shape[1]
        if plan.summing:
            out = self.staying.new_zeros(shape, dtype=accumulator(dtype))
        else:
            out = self.staying.new_empty(shape)  # every row arrives or stays
        if len(self.staying):
            out[plan.stays[1]] = self.staying.to(out.dtype)
        put = out.index_add_ if plan.summing else out.index_copy_
        to = plan.receives.split_with_sizes(plan.receive_splits)
        for values, rows in zip(self.swaps.arrive(), to, strict=True):
            if rows.numel():  # all different: no sum depends on an order
                put(0, rows, values.to(out.dtype))
        return self._parts_of(out.to(dtype))

    def read(self) -> list[Tensor]:
        """What `finish` returns, until the next move by this route: where one rank sends all rows
        they stay in the link's inbox."""
        plan = self.plan
        if not 0 < plan.num_rows == max(plan.receive_splits) == sum(plan.receive_splits):
            return self.finish()
        (rows,) = (x for x in self.swaps.arrive() if x.numel())
        return self._parts_of(rows)

    def _parts_of(self, rows: Tensor) -> list[Tensor]:
        columns = rows.split_with_sizes([shape.numel() for shape in self.shapes], 1)
        return [c.view(-1, *shape) for c, shape in zip(columns, self.shapes, strict=True)]

    def settle(self) -> None:
        """See `Swaps.settle`."""
        self.swaps.settle()


def _columns(parts: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Those rows of tensors [n, ...], side by side."""
    widths = [x.shape[1:].numel() for x in parts]
    out = parts[0].new_empty(len(rows), sum(widths))
    if len(rows):
        for x, columns in zip(parts, out.split_with_sizes(widths, 1), strict=True):
            torch.index_select(x.reshape(len(x), columns.shape[1]), 0, rows, out=columns)
    return out


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
