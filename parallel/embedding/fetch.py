"""Rows of sharded tables on their way: from the processes that hold them to those that asked for
them, and their gradients back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.trade import begin_trade, regroup, trade_rows


@dataclass(frozen=True)
class Way:
    """How many rows go where: of each feature held here to each rank, and from each rank here; and
    which of their gradients are on their way back.

    dtype: that they travel in, None for their own.
    """

    asked: list[list[int]]  # [features][ranks]
    coming: list[int]  # [ranks]
    group: dist.ProcessGroup
    dtype: torch.dtype | None = None
    _returning: list[tuple[Tensor, Callable[[], Tensor]]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @property
    def leaving(self) -> list[int]:
        """To each rank."""
        return [sum(x[rank] for x in self.asked) for rank in range(self.group.size())]

    def go(self, held: Tensor) -> Tensor:
        send = held.to(self.dtype or held.dtype)
        return trade_rows(send, self.leaving, self.coming, self.group).to(held.dtype)

    def begin_return(self, dfound: Tensor) -> None:
        """Send gradients back that `fetch`'s backward will be given: others are computed meanwhile.
        Collective."""
        send = dfound.to(self.dtype or dfound.dtype)
        arrive = begin_trade(send, self.coming, self.leaving, self.group)
        self._returning.append((dfound, arrive))  # held, or autograd could add to it meanwhile

    def go_back(self, dfound: Tensor) -> Tensor:
        if not self._returning:
            self.begin_return(dfound)
        sent, arrive = self._returning.pop()
        assert sent.data_ptr() == dfound.data_ptr(), "a gradient that is not what was sent"
        return arrive().to(dfound.dtype)


def fetch(held: Tensor, way: Way) -> Tensor:
    """held: [., dim], feature after feature, each for rank after rank. Returns what this rank asked
    for, from rank after rank, each with feature after feature. Collective.

    Gradients are averaged over processes, as DDP's are.
    """
    return held if way.group.size() == 1 else _Fetch.apply(held, way)


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return way.go(regroup(held, way.asked))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dfound: Tensor) -> tuple[Tensor, None]:
        way: Way = ctx.way
        dheld = way.go_back(dfound.contiguous())
        by_rank = list(zip(*way.asked, strict=True))
        return regroup(dheld, by_rank).div_(way.group.size()), None
