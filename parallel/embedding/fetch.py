"""Rows of sharded tables on their way: from the processes that hold them to those that asked for
them, and their gradients back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.trade import regroup, trade_rows


@dataclass(frozen=True)
class Way:
    """How many rows go where: of each feature held here to each rank, and from each rank here.

    dtype: that they travel in, None for their own.
    """

    asked: list[list[int]]  # [features][ranks]
    coming: list[int]  # [ranks]
    group: dist.ProcessGroup
    dtype: torch.dtype | None = None

    @property
    def leaving(self) -> list[int]:
        """To each rank."""
        return [sum(x[rank] for x in self.asked) for rank in range(self.group.size())]

    def go(self, x: Tensor, leaving: list[int], coming: list[int]) -> Tensor:
        return trade_rows(x.to(self.dtype or x.dtype), leaving, coming, self.group).to(x.dtype)


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
        return way.go(regroup(held, way.asked), way.leaving, way.coming)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dfound: Tensor) -> tuple[Tensor, None]:
        way: Way = ctx.way
        dheld = way.go(dfound.contiguous(), way.coming, way.leaving)
        by_rank = list(zip(*way.asked, strict=True))
        return regroup(dheld, by_rank).div_(way.group.size()), None
