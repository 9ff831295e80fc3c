"""Attention over a cp group: every rank holds a shard of a batch. The choice of exchange."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from kernels.attention import check_rows, hstu_attention
from kernels.projection import Projected
from parallel.exchange.all_gather import all_gather_attention
from parallel.exchange.halo import halo_attention
from parallel.exchange.ring import ring_attention
from parallel.exchange.ulysses import ulysses_attention
from parallel.links import Links
from parallel.visibility import Visibility


class Exchange(NamedTuple):
    attention: Callable[..., Tensor]
    wanted: tuple[str, ...]  # of a batch's `Visibility`: made once, by the host
    by: Callable[[Links], str] = lambda _: ""  # the link's name; empty if by collectives


EXCHANGES = {
    "ring": Exchange(ring_attention, ("all_intervals", "meets"), lambda links: links.name),
    "all_gather": Exchange(all_gather_attention, ("intervals", "padded_rows")),
    "halo": Exchange(halo_attention, ("intervals", "halo"), lambda links: links.direct.name),
    "ulysses": Exchange(ulysses_attention, ("whole_intervals",)),
}


def make_ready(seen: Visibility, exchange: str) -> None:
    """Do what an exchange wants of the host once per batch: it may run beside the step before."""
    for name in EXCHANGES[exchange].wanted if _exchanges(seen) else ("intervals",):
        getattr(seen, name)


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seen: Visibility,
    alpha: float,
    scale: float,
    exchange: str = "ring",
    deterministic: bool = True,
    projected: Projected | None = None,
) -> Tensor:
    """`kernels.attention.hstu_attention` as if the cp group were one device.

    q, k: [rows of this rank, H, Dqk]; v: [rows, H, Dv], in the order of seen.shard.rows.
    alpha, scale: not 0. exchange: one of EXCHANGES; results do not depend on it but for the order
    of sums. deterministic: as there, if no sequence of the batch is cut; else gradients are.
    projected: as there, for when none is.
    Returns [rows, H, Dv] in q's dtype. Differentiable: gradients of k and v are sums over the
    group. Every rank of the group must call it, with however few rows. Raises ValueError, naming
    the argument, before anything is sent.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange: {exchange!r} is not one of {', '.join(EXCHANGES)}")
    check_rows(q, k, v)
    for name, x in (("q", q), ("k", k)):
        if x.shape[0] != seen.shard.rows.num_rows:
            raise ValueError(
                f"{name}: {x.shape[0]} rows, this rank's shard has {seen.shard.rows.num_rows}"
            )
    for name, factor in (("alpha", alpha), ("scale", scale)):
        if not 0 < abs(factor) < math.inf:
            raise ValueError(f"{name}: want a finite number, and not 0, got {factor}")
    if _exchanges(seen):
        return EXCHANGES[exchange].attention(q, k, v, seen=seen, alpha=alpha, scale=scale)
    return hstu_attention(
        q,
        k,
        v,
        queries=seen.shard.device_rows,
        keys=seen.shard.device_rows,
        intervals=seen.intervals,
        alpha=alpha,
        scale=scale,
        deterministic=deterministic,
        projected=projected,
    )


def _exchanges(seen: Visibility) -> bool:
    """Whether any sequence is cut."""
    return any(seen.shard.num_shared)
