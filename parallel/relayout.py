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
import torch.distributed as dist
from torch import Tensor

from kernels.jagged import Jagged, lengths_to_offsets


@dataclass(frozen=True)
class Relayout:
    """One rank's part of a move, made on the host once per batch: which rows go where.

    sends[r]: rows of the source that rank r wants; receives[r]: rows of the target that rank r
    holds. Entry `rank` of each is what stays. int64, on the device. A row may go to several ranks;
    on the way back, what comes from them is summed, in the order of ranks.
    """

    sends: tuple[Tensor, ...]
    receives: tuple[Tensor, ...]
    num_rows: int  # of this rank in the target
    group: dist.ProcessGroup
    rank: int

    @staticmethod
    def between(
        lengths: Tensor,
        source: Sequence[Jagged],
        target: Sequence[Jagged],
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> Relayout:
        """From the rows of `source` to those of `target`, one Jagged a rank, all on the host.

        lengths: int [B] of the whole sequences, which both count positions in.
        Raises ValueError if the target wants a position that no rank holds.
        """
        starts = lengths_to_offsets(lengths)[:-1].long()
        old, new = (
            [starts[part.sequence_ids()] + part.positions for part in parts]
            for parts in (source, target)
        )
        rank = group.rank()
        sends = [_shared_rows(old[rank], wanted) for wanted in new]
        receives = [_shared_rows(new[rank], held) for held in old]
        num_rows = new[rank].numel()
        if sum(rows.numel() for rows in receives) != num_rows:
            raise ValueError("target: wants positions that no rank of the source holds")
        return Relayout(
            tuple(rows.to(device, non_blocking=True) for rows in sends),
            tuple(rows.to(device, non_blocking=True) for rows in receives),
            num_rows,
            group,
            rank,
        )

    def reversed(self, num_rows: int) -> Relayout:
        """The move back, to the `num_rows` rows this rank held in the source."""
        return Relayout(self.receives, self.sends, num_rows, self.group, self.rank)

    def move(self, x: Tensor) -> Tensor:
        """Rows [source rows, ...] -> [target rows, ...]; what arrives at a row is summed."""
        out = x.new_zeros(self.num_rows, *x.shape[1:])
        out[self.receives[self.rank]] = x[self.sends[self.rank]]
        others = [r for r in range(self.group.size()) if r != self.rank]
        send_splits = [0 if r == self.rank else rows.numel() for r, rows in enumerate(self.sends)]
        splits = [0 if r == self.rank else rows.numel() for r, rows in enumerate(self.receives)]
        send = torch.cat([x[:0], *(x[self.sends[r]] for r in others)])
        received = x.new_empty(sum(splits), *x.shape[1:])
        dist.all_to_all_single(received, send, splits, send_splits, group=self.group)
        for r, rows in zip(others, received.split([splits[r] for r in others]), strict=True):
            out[self.receives[r]] += rows
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


def _shared_rows(mine: Tensor, others: Tensor) -> Tensor:
    """Indices into `mine` of the entries that `others` has too; both rising."""
    if not others.numel():
        return torch.zeros(0, dtype=torch.int64)
    at = torch.searchsorted(others, mine).clamp(max=others.numel() - 1)
    return (others[at] == mine).nonzero()[:, 0]
