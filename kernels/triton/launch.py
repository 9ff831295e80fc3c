"""Launches the attention kernels on plain tensors: padding, descriptors, grids; no autograd.

Out, dq, dk and dv are written into tensors of any floating dtype, each plus another if wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.scratch import scratch_limit
from kernels.source import Source
from kernels.triton import resident
from kernels.triton.backward import key_value_kernel, query_kernel
from kernels.triton.configs import MANY, MANY_EACH, Blocks, Kept
from kernels.triton.forward import forward_kernel
from kernels.triton.integers import cdiv
from kernels.triton.launcher import Rows
from kernels.triton.slopes import SIDE, SQUARE, query_slopes_kernel
from kernels.triton.target import NOT_THROUGH, Target, Through, nothing, padded_dim, ready
from kernels.triton.walk import Walk, config_of
from kernels.weighting import Weighting


def forward(q: Tensor, *sources: Source, add: Tensor | None = None, out: Tensor) -> Tensor:
    """`out` [Tq, H, Dv], written with what q finds in the sources, plus `add` if given.

    Here and below: `add` may be overwritten if there are two sources.
    """
    if _in_turn(q, sources, "forward"):
        add = forward(q, sources[0], add=add, out=_sums(add, out))
        sources = sources[1:]
    walk = Walk(q, sources, resident="forward")
    if walk.is_empty:
        return nothing(add, out)
    config, q, target = walk.config, ready(q), Target(out, add)
    if walk.resident:
        resident.forward(walk, q, target)
        return target.finish()
    blocks, tiles = config.forward, walk.plan.query_tiles(*walk.more)
    for programs, left in walk.launches(len(tiles) * (config.tile // blocks.m), target):
        forward_kernel[(programs,)](
            q,
            q.stride(0),
            *target.add,
            *target.out,
            tiles,
            walk.heads,
            *walk.factors,
            *left,
            *walk.arguments(blocks.n),
            **walk.constants(config.tile, blocks),
        )
    return target.finish()


def query_gradient(
    dout: Tensor, q: Tensor, *sources: Source, add: Tensor | None = None, out: Tensor
) -> Tensor:
    """`out` [Tq, H, Dqk], written with dq, plus `add` if given."""
    if _in_turn(q, sources, "gradients"):
        add = query_gradient(dout, q, sources[0], add=add, out=_sums(add, out))
        sources = sources[1:]
    walk = Walk(q, sources, resident="gradients")
    if walk.is_empty:
        return nothing(add, out)
    config, dout, q = walk.config, ready(dout, q.dtype), ready(q)
    target = Target(out, add)
    if walk.resident:
        resident.query_gradient(walk, dout, q, target)
        return target.finish()
    blocks, tiles = config.query, walk.plan.query_parts(*walk.more)
    for programs, left in walk.launches(len(tiles) * (config.part // blocks.m), target):
        query_kernel[(programs,)](
            dout,
            q,
            dout.stride(0),
            q.stride(0),
            *target.add,
            *target.out,
            tiles,
            walk.heads,
            *walk.factors,
            *left,
            *walk.arguments(blocks.n),
            **walk.constants(config.part, blocks),
        )
    return target.finish()


def key_value_gradients(
    k: Tensor,
    v: Tensor,
    *sources: Source,
    add: tuple[Tensor, Tensor] | None = None,
    out: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """`out` [Tk, H, Dqk] and [Tk, H, Dv], written with dk and dv, plus `add` if given."""
    add_k, add_v = add or (None, None)
    if _in_turn(k, sources, "gradients"):
        sums = _sums(add_k, out[0]), _sums(add_v, out[1])
        add_k, add_v = key_value_gradients(k, v, sources[0], add=add, out=sums)
        sources = sources[1:]
    walk = Walk(k, sources, resident="gradients")
    if walk.is_empty:
        return nothing(add_k, out[0]), nothing(add_v, out[1])
    if walk.resident:
        key, value = Target(out[0], add_k), Target(out[1], add_v)
        resident.key_value_gradients(walk, ready(k), ready(v), key, value)
        return key.finish(), value.finish()
    walk.wait()
    config = walk.config
    launches = [(config.key, True, config.value is None)]
    if config.value is not None:
        launches.append((config.value, False, True))
    return _key_value_gradients(walk, launches, k, v, (add_k, add_v), out)


def _in_turn(tiled: Tensor, sources: Sequence[Source], resident: str) -> bool:
    """Whether programs that stay visit the first source faster, while the second is on its way,
    and then the second."""
    if len(sources) < 2 or sources[1].arrival is None or not sources[1].rows[0].shape[0]:
        return False
    (x, y), queries = sources[0].rows, sources[0].weighting.queries
    rows, dims = x.shape[0], (padded_dim(x.shape[2]), padded_dim(y.shape[2]))
    if rows * x.shape[1] < MANY or rows < MANY_EACH * queries.num_sequences or not tiled.shape[0]:
        return False
    config = config_of(queries, tiled.shape[1], dims, tiled.dtype, tiled.device)
    return config.resident is not None and getattr(config.resident, resident) is not None


def _sums(add: Tensor | None, out: Tensor) -> Tensor:
    """Where sums may be kept until they are added to."""
    if add is not None:
        return add
    return out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)


def gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weighting: Weighting,
    *,
    deterministic: bool = True,
    out: tuple[Tensor, Tensor, Tensor],
    through: tuple[Through, Through, Through] | None = None,
) -> bool:
    """`out`, written with dq, dk and dv of one block of queries and keys.

    Unless it is to be deterministic, where that is faster, one pass finds them all, if
    `scratch_limit` has room for a float32 dq and for sums of key tiles. Else, where that is faster,
    one launch; or dq, and perhaps dk, take slopes that the launch for dv keeps, if the host knows
    how long a sequence may be and there is room: for those of a few heads at a time, or, where dk
    has no launch of its own, of all. A ring, and a halo, find dq and dk of different pairs.

    through: what dq, dk and dv are to be taken back through. Returns whether they were, which they
    are where slopes are kept; if not, `out` is dq, dk and dv all the same.
    """
    slopes = None
    if q.shape[0] and v.shape[0]:
        dims = padded_dim(q.shape[2]), padded_dim(v.shape[2])
        config = config_of(weighting.queries, q.shape[1], dims, q.dtype, q.device)
        shipped, problem = config.resident, (dout, q, k, v, weighting, out)
        in_any_order = shipped and shipped.unordered and not deterministic
        if in_any_order and resident.gradients_in_any_order(*problem):
            return False
        if shipped and shipped.at_once:
            resident.gradients_at_once(*problem)
            return False
        slopes = _Slopes.of(config.kept, q, weighting)
    if slopes is None:
        key_value_gradients(k, v, Source((q, dout), weighting), out=out[1:])
        query_gradient(dout, q, Source((k, v), weighting), out=out[0])
        return False
    for start in range(0, q.shape[1], slopes.heads):
        end = start + slopes.heads
        heads = (x[:, start:end] for x in (dout, q, k, v, *out))
        of_heads = tuple(x.of_heads(start, end) for x in through) if through else None
        _gradients_by_slopes(slopes, weighting, of_heads, *heads)
    return through is not None


def keeps_slopes(q: Tensor, v: Tensor, weighting: Weighting) -> bool:
    """Whether the backward of these would, as things are."""
    dims = padded_dim(q.shape[2]), padded_dim(v.shape[2])
    config = config_of(weighting.queries, q.shape[1], dims, q.dtype, q.device)
    at_once = config.resident is not None and config.resident.at_once
    return not at_once and _Slopes.of(config.kept, q, weighting) is not None


@dataclass(frozen=True)
class _Slopes:
    """Room for those kept at a time: of so many heads, key parts, and query parts of a sequence."""

    blocks: Kept
    heads: int
    key_parts: int
    query_parts: int

    @staticmethod
    def of(blocks: Kept | None, q: Tensor, weighting: Weighting) -> _Slopes | None:
        """None: better found twice."""
        queries, keys = weighting.queries, weighting.keys
        if blocks is None or queries.max_length is None:
            return None
        key_parts = keys.num_rows // SIDE.value + keys.num_sequences
        query_parts = max(1, cdiv(min(queries.max_length, queries.num_rows), SIDE.value))
        most = scratch_limit() // (key_parts * query_parts * SQUARE.value * q.itemsize)
        heads = q.shape[1]
        # What one launch less saves is little, and lost by launches of fewer heads.
        if most < (heads if blocks.key is None else 1):
            return None
        return _Slopes(blocks, cdiv(heads, cdiv(heads, most)), key_parts, query_parts)


def _gradients_by_slopes(
    slopes: _Slopes,
    weighting: Weighting,
    through: tuple[Through, ...] | None,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    of_q, *of_keys = through or (None, None, None)
    walk, k = Walk(k, [Source((q, dout), weighting)], aligned=True), ready(k)
    blocks, heads = slopes.blocks, walk.heads
    numel = heads * slopes.key_parts * slopes.query_parts * SQUARE.value
    # Few different sizes, which the allocator finds again, whatever the lengths.
    step = 1 << max(0, numel.bit_length() - 4)
    kept = q.new_empty(min(cdiv(numel, step) * step, scratch_limit() // q.itemsize))
    of_heads = kept, slopes.key_parts, slopes.query_parts
    launches = [(blocks.value, blocks.key is None, True)]
    if blocks.key is not None:
        launches.append((blocks.key, True, False))
    _key_value_gradients(walk, launches, k, v, (None, None), (dk, dv), of_heads, of_keys)

    target, tiles = Target(dq, None), walk.plan.query_parts()
    query_slopes_kernel[(len(tiles) * heads,)](
        *target.out,
        *(of_q.arguments(len(tiles)) if of_q else NOT_THROUGH),
        tiles,
        heads,
        *walk.factors,
        *of_heads,
        Rows(k, SIDE.value),
        QK_DIM=walk.qk_dim,
        FAST=walk.is_fast,
        PRECISION=walk.precision,
        num_warps=blocks.query.warps,
        num_stages=blocks.query.stages,
    )
    target.finish()
    if of_q:
        of_q.finish()


def _key_value_gradients(
    walk: Walk,
    launches: Sequence[tuple[Blocks, bool, bool]],
    k: Tensor,
    v: Tensor,
    add: tuple[Tensor | None, Tensor | None],
    out: tuple[Tensor, Tensor],
    slopes: tuple[object, ...] = (None, 0, 0),
    through: Sequence[Through | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """launches: blocks, whether they find dk, and whether dv. slopes: as the kernel takes them.
    through: of dk and dv."""
    k, v = ready(k), ready(v)
    tiles, part = walk.plan.key_tiles(*walk.more), walk.plan.key_tile
    key, value = Target(out[0], add[0]), Target(out[1], add[1])
    rows = walk.plan.most_segments(*walk.more) * part
    sums = [x.new_empty(rows, *x.shape[1:], dtype=torch.float32) for x in (k, v)]
    for blocks, *wanted in launches:
        parts = len(tiles) * (part // blocks.n)
        of_keys = [x if some else None for x, some in zip(through, wanted, strict=True)]
        key_value_kernel[(parts * k.shape[1],)](
            Rows(k, blocks.n),
            Rows(v, blocks.n),
            *key.add,
            *value.add,
            *key.out,
            *value.out,
            *(y for x in of_keys for y in (x.arguments(parts) if x else NOT_THROUGH)),
            *sums,
            walk.plan.counters(rows // blocks.n * k.shape[1]),
            tiles,
            walk.heads,
            *walk.factors,
            *slopes,
            *walk.arguments(blocks.m),
            KEY=wanted[0],
            VALUE=wanted[1],
            SLOPES=slopes[0] is not None,
            **walk.constants(part, blocks),
        )
        for x in of_keys:
            if x:
                x.finish()
    return key.finish(), value.finish()
