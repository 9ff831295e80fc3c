"""Block shapes, shipped instead of tuned at run time: a job compiles its kernels and goes.

Hopper's were measured. The others fit into 99 KiB of shared memory, as Ada's and consumer
Blackwell's multiprocessors have; there, wide heads spill registers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Blocks:
    """Query rows and key rows per block, and Triton's launch options."""

    m: int
    n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Kept:
    """Blocks of a backward that keeps slopes, see `slopes.py`: SIDE by SIDE, but that the one that
    keeps them may take fewer queries at a time."""

    value: Blocks
    key: Blocks | None  # None: dv's launch finds dk as well
    query: Blocks


@dataclass(frozen=True)
class Resident:
    """Of a kernel whose programs stay, see `hopper`: rows of a tile and of a block; how many
    buffers there are for tiles and for blocks; whether a forward has one more, to copy its results
    from asynchronously (`gradients` copies from its tiles'); and whether a tile is claimed as early
    as can be."""

    m: int
    n: int
    tiles: int
    stages: int
    copies: bool = False
    early: bool = False


@dataclass(frozen=True)
class Residents:
    """Those that pay, for launches of one source. They share a plan, whose parts are as many rows
    as their blocks: so `halves.py` counts them."""

    forward: Resident
    gradients: Resident | None = None
    at_once: bool = False  # dq, dk and dv by one launch
    unordered: Resident | None = None  # where sums may come in any order, of equal head dims

    @property
    def plan(self) -> tuple[int, int, int]:
        """Its tile, part and key tile."""
        return self.forward.m, self.forward.n, (self.gradients or self.forward).m


@dataclass(frozen=True)
class Config:
    """One shape of problem. The plan's `tile` is a multiple of `part` and of forward.m, and `part`
    of forward.n and of the backward's blocks; `kept` and `resident` have plans of their own."""

    tile: int
    part: int
    forward: Blocks
    query: Blocks
    key: Blocks
    value: Blocks | None = None  # dv's own launch, if it does not share dk's
    kept: Kept | None = None  # if it pays to keep slopes
    resident: Residents | None = None


RESIDENT = Residents(Resident(128, 64, 2, 3, copies=True), gradients=Resident(128, 64, 2, 3))
# By the larger of the two head dims, padded to a power of two. On Hopper two blocks of 4 warps
# share a multiprocessor where they fit: one computes SiLU while the other's products run.
HOPPER = {
    64: Config(128, 64, Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
    128: Config(
        128,
        64,
        Blocks(128, 64, 4, 2),
        Blocks(64, 64, 4, 2),
        Blocks(64, 64, 4, 2),
        resident=RESIDENT,
    ),
    256: Config(
        128,
        128,
        Blocks(128, 64, 8, 2),
        Blocks(64, 64, 4, 2),
        Blocks(64, 64, 4, 2),
        Blocks(64, 128, 8, 2),
        Kept(Blocks(32, 64, 4, 4), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
        resident=Residents(Resident(128, 64, 1, 2)),
    ),
}
# Sequences of a few hundred tokens are a few blocks each: latency and memory rule, not products.
# And of few rows there are hardly more tiles of 128 than the 264 that run at a time: the GPU would
# wait for the heaviest (counted, not measured: it would take 1.4 to 1.9 times as long). Programs
# that stay are 132, and claim tiles late: two sequences of 4,096 take them 0.063 ms instead of
# 0.112, eight of 1,024 0.078 instead of 0.086 (H100, one run).
_FEW = Config(64, 64, Blocks(64, 32, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2))
_SHORT = replace(
    _FEW,
    query=Blocks(64, 32, 4, 2),
    kept=Kept(Blocks(32, 64, 4, 3), None, Blocks(64, 64, 4, 2)),
)
HOPPER_FEW = {64: _FEW, 128: replace(_FEW, resident=replace(RESIDENT, at_once=True))}
_EARLY = replace(
    RESIDENT,
    forward=replace(RESIDENT.forward, early=True),
    gradients=Resident(128, 64, 2, 3, early=True),
)
HOPPER_SHORT = {64: _SHORT, 128: replace(_FEW, resident=_EARLY)}
# Of float32 dq, zeros are written before and a copy after: much, unless there are many products.
_LONG = replace(RESIDENT, unordered=Resident(128, 64, 2, 2))
HOPPER_LONG = HOPPER | {128: replace(HOPPER[128], resident=_LONG)}
# `gr_train.warm_up` finds them all: lengths are powers of two; FEW, and MANY, the most rows.
SHORT = 512  # tokens of the mean sequence
FEW = 48 * 1024  # rows of all heads: one launch of the backward leaves one tail instead of two
LONG = 16384
# Where a source has so many rows of all heads, and of each sequence, kernels whose programs stay
# visit it, and then another that is on its way: sums come and go between them, but a ring of two
# takes 3.07 ms instead of 3.55 (35,000 rows in 13 sequences, forward and backward), its forward
# 0.66 instead of 0.91 (two H200, one run). Of fewer rows it is the host that takes longer. Pieces
# of one head's rows, which a ring sends if all are too large a message, are never less than MANY.
MANY, MANY_EACH = 72 * 1024, 1024
CONSERVATIVE = {
    64: Config(128, 64, Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    128: Config(128, 64, Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2)),
    256: Config(128, 64, Blocks(64, 32, 8, 1), Blocks(64, 16, 8, 1), Blocks(16, 64, 8, 1)),
}
# Float32, as three tf32 products each: correct before fast, and small enough for every GPU.
SINGLE = {
    64: Config(64, 64, Blocks(64, 32, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 64, 4, 1)),
    128: Config(64, 64, Blocks(32, 32, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1)),
    256: Config(64, 64, Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
}


def config_for(
    dim: int, rows: int, mean_length: int, dtype: torch.dtype, device: torch.device
) -> Config:
    """The configuration for head dims up to `dim` and so many query rows, those of all heads."""
    if dtype == torch.float32 or device.type == "cpu":
        return SINGLE[max(64, dim)]
    if not _is_hopper(device):
        return CONSERVATIVE[max(64, dim)]
    if dim <= 128 and mean_length < SHORT:
        return HOPPER_SHORT[max(64, dim)]
    if dim <= 128 and rows < FEW:
        return HOPPER_FEW[max(64, dim)]
    return (HOPPER if mean_length < LONG else HOPPER_LONG)[max(64, dim)]


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9
