"""The sources of a launch, as its kernel takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from kernels.jagged import Jagged
from kernels.source import Source
from kernels.triton.configs import Blocks, Config, Resident, config_for
from kernels.triton.launcher import Rows
from kernels.triton.plan import Plan, plan_for, stream_of
from kernels.triton.slopes import SIDE
from kernels.triton.target import Target, is_ready, padded_dim, ready

MOST_SOURCES = 2  # of a launch
# What is left are the first tiles, and heavy ones: tried again too late, they would make a tail;
# too early, and nothing has come yet.
AGAIN_FROM, AGAINS = 0.7, 0.5  # shares of all tiles: after which, and how many of the first


class Walk:
    """The sources of a launch, as its kernel takes them. Those without rows are left out."""

    def __init__(
        self,
        tiled: Tensor,
        sources: Sequence[Source],
        aligned: bool = False,
        resident: str | None = None,
    ) -> None:
        """tiled: what stays while the rows of the sources pass; of the same heads and dtype.

        aligned: for slopes, of one source. resident: a field of `Residents`, for its kernel if that
        pays and can do it, which then is what `resident` says."""
        self.sources = [x for x in sources if x.rows[0].shape[0]]
        self.is_empty = tiled.shape[0] == 0 or not self.sources
        if self.is_empty:
            return
        assert len(self.sources) <= MOST_SOURCES
        self.dtype, self.is_cuda, self.heads = tiled.dtype, tiled.is_cuda, tiled.shape[1]
        self.qk_dim, self.v_dim = (padded_dim(x.shape[2]) for x in self.sources[0].rows)
        first, *others = (source.weighting for source in self.sources)
        self.factors = first.alpha / 2, first.scale
        heads = None if aligned else self.heads  # chunks of heads share an aligned plan
        stream = stream_of(tiled)
        key = (stream, heads, self.qk_dim, self.v_dim, tiled.dtype, resident, *others)
        if key not in first.plans:
            first.plans[key] = self._plans(tiled.device, aligned, resident)
        self.config, self.resident, self.plan, self.more = first.plans[key]

    def _plans(
        self, device: torch.device, aligned: bool, resident: str | None
    ) -> tuple[Config, Resident | None, Plan, tuple[Plan, ...]]:
        """The configuration, one for all sources, and their plans."""
        weightings = [source.weighting for source in self.sources]
        dims = self.qk_dim, self.v_dim
        config = config_of(weightings[0].queries, self.heads, dims, self.dtype, device)
        blocks, shape = None, (config.tile, config.part, config.part)
        if aligned:
            shape = (SIDE.value,) * 3
        elif resident and config.resident and len(weightings) == 1:
            blocks = getattr(config.resident, resident)
            shape = config.resident.plan if blocks else shape
        plan, *more = (
            plan_for(x.queries, x.keys, x.intervals, *shape, aligned) for x in weightings
        )
        return config, blocks, plan, tuple(more)

    @property
    def blocks(self) -> Resident:
        """Of the kernel whose programs stay."""
        assert self.resident is not None
        return self.resident

    def wait(self) -> None:
        """For all rows."""
        for source in self.sources:
            if source.arrival:
                source.arrival.wait()

    def arguments(self, block: int) -> list[object]:
        """The last ones of the kernel, which takes so many rows of a source at a time."""
        found: list[object] = []
        for rows, plan in zip(self.rows, (self.plan, *self.more), strict=True):
            found += [*(Rows(x, block) for x in rows), plan.bounds]
        return found if self.more else [*found, None, None, None]

    @cached_property
    def rows(self) -> list[list[Tensor]]:
        """Read, if they must be padded: only once they are there."""
        return [[ready(x, self.dtype) for x in source.rows] for source in self.sources]

    def launches(self, tiles: int, target: Target) -> Iterator[tuple[int, tuple[object, ...]]]:
        """Programs of each launch, and its arguments about tiles that are left for later ones.

        There are two if the second source is one that a kernel can look for. Who asks for the first
        must ask for the second, which leaves the plan's counters as they were.
        """
        places = tiles * self.heads
        coming = self.sources[1] if self.more else None
        signal = coming and coming.arrival and coming.arrival.signal()
        if coming and signal and all(is_ready(x, self.dtype) for x in coming.rows):
            before = self.sources[0].arrival
            if before:
                before.wait()
            left, sums = self.plan.counters(places), target.sums_of_left()
            again_from, agains = int(AGAIN_FROM * places), int(AGAINS * places)
            yield places + agains, (*signal, left, again_from, agains, sums)
            self.wait()
            yield places, (*signal, left, 0, places, sums)
        else:
            self.wait()
            yield places, (None, 0, None, 0, 0, None)

    @property
    def precision(self) -> str:
        """Of float32 products; others are exact."""
        return "tf32x3" if self.is_cuda else "ieee"

    @property
    def is_fast(self) -> bool:
        """Whether to take the GPU's own tanh."""
        return self.dtype != torch.float32 and self.is_cuda

    def constants(self, tile: int, blocks: Blocks) -> dict[str, object]:
        return dict(
            QK_DIM=self.qk_dim,
            V_DIM=self.v_dim,
            TILE=tile,
            BLOCK_M=blocks.m,
            BLOCK_N=blocks.n,
            FAST=self.is_fast,
            PRECISION=self.precision,
            SOURCES=len(self.sources),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )


def config_of(
    queries: Jagged,
    heads: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Config:
    """dims: padded."""
    mean = queries.num_rows // queries.num_sequences
    return config_for(max(dims), queries.num_rows * heads, mean, dtype, device)
