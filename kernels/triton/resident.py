"""Launches of kernels whose programs stay, see `hopper`: of one source."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.scratch import scratch_limit
from kernels.source import Source
from kernels.triton.hopper.forward import resident_forward_kernel
from kernels.triton.hopper.gradients import resident_gradients_kernel
from kernels.triton.hopper.unordered import resident_unordered_kernel
from kernels.triton.launcher import SharedRows, multiprocessors
from kernels.triton.masked import QUARTERS
from kernels.triton.target import Target, padded_dim, ready, rows_of
from kernels.triton.walk import Walk
from kernels.weighting import Weighting

WARPS = 4  # of a warpgroup
SWIZZLED = 64  # 16-bit columns


def forward(walk: Walk, q: Tensor, target: Target) -> None:
    walk.wait()
    plan, blocks, half = walk.plan, walk.blocks, walk.blocks.m // 2
    copies = blocks.copies and target.is_ready(q.dtype)
    resident_forward_kernel[(multiprocessors(q.device),)](
        SharedRows(q, half),
        *rows_of(q),
        *target.add,
        *target.out,
        SharedRows(target.written, half) if copies else None,
        plan.halved_query_tiles,
        plan.num_query_tiles,
        plan.counters(2),
        *walk.factors,
        *(SharedRows(x, blocks.n) for x in walk.rows[0]),
        plan.bounds,
        int(blocks.early),
        walk.heads,
        TILES=blocks.tiles,
        STAGES=blocks.stages,
        num_warps=WARPS,
    )


def query_gradient(walk: Walk, dout: Tensor, q: Tensor, query: Target) -> None:
    walk.wait()
    k, v = walk.rows[0]
    _gradients(walk, (q, dout), (k, v), query, None)


def key_value_gradients(walk: Walk, k: Tensor, v: Tensor, key: Target, value: Target) -> None:
    walk.wait()
    q, dout = walk.rows[0]
    _gradients(walk, (q, dout), (k, v), None, (key, value))


def gradients_at_once(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weighting: Weighting,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """`out`, written with dq, dk and dv by one launch."""
    walk = Walk(k, [Source((q, dout), weighting)], resident="gradients")
    query, key, value = targets = [Target(x, None) for x in out]
    q, dout = walk.rows[0]
    _gradients(walk, (q, dout), (ready(k), ready(v)), query, (key, value))
    for target in targets:
        target.finish()


def _gradients(
    walk: Walk,
    of_queries: tuple[Tensor, Tensor],
    of_keys: tuple[Tensor, Tensor],
    query: Target | None,
    keys: tuple[Target, Target] | None,
) -> None:
    """of_queries: q and dout; of_keys: k and v. query, keys: for dq, and for dk and dv."""
    (q, dout), (k, v) = of_queries, of_keys
    plan, blocks, half = walk.plan, walk.blocks, walk.blocks.m // 2
    # In place of those that are not wanted, what has their shape: no tile is there to write it.
    targets = query or Target(q, None), *(keys or (Target(k, None), Target(v, None)))
    copies = all(x.is_ready(q.dtype) for x in targets)
    written = []
    for target in targets:
        written += [*target.out, SharedRows(target.written, half) if copies else None]
    rows = plan.most_segments() * blocks.m if keys else 0
    sums = [x.new_empty(rows, *x.shape[1:], dtype=torch.float32) for x in of_keys]
    tiles = plan.halved_query_tiles if query else plan.halved_key_tiles
    none = plan.counters(1)
    resident_gradients_kernel[(multiprocessors(q.device),)](
        SharedRows(q, half),
        _pieces(q, half),
        *rows_of(q),
        SharedRows(dout, half),
        _pieces(dout, half),
        *rows_of(dout),
        SharedRows(k, half),
        SharedRows(v, half),
        *(x for target in targets for x in target.add),
        *written,
        *sums,
        plan.counters(rows // half * walk.heads),
        tiles,
        plan.num_query_tiles if query else none,
        plan.halved_key_tiles if keys else tiles,
        plan.num_key_tiles if keys else none,
        plan.most_segments_more if keys else 0,
        plan.counters(2),
        *walk.factors,
        plan.bounds,
        int(blocks.early),
        walk.heads,
        TILES=blocks.tiles,
        STAGES=blocks.stages,
        num_warps=WARPS,
    )


def _pieces(x: Tensor, block: int) -> SharedRows:
    """Pieces of blocks, of as many columns as lie together where a block is swizzled."""
    width = min(x.shape[2], SWIZZLED)
    return SharedRows(x.unflatten(2, (-1, width)).flatten(1, 2), block // QUARTERS.value)


def gradients_in_any_order(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weighting: Weighting,
    out: tuple[Tensor, Tensor, Tensor],
) -> bool:
    """`out`, written with dq, dk and dv: whether it could be done."""
    if padded_dim(q.shape[2]) != padded_dim(v.shape[2]):
        return False
    walk = Walk(k, [Source((q, dout), weighting)], resident="unordered")
    plan, blocks, heads, dim = walk.plan, walk.blocks, walk.heads, walk.qk_dim
    query, key, value = targets = [Target(x, None) for x in out]
    rows, half = plan.most_segments() * blocks.m, blocks.m // 2
    scratch = 4 * heads * dim * (q.shape[0] + 2 * rows)
    if scratch > scratch_limit() or not all(x.is_ready(q.dtype) for x in targets):
        return False
    sums = [k.new_empty(rows, heads, dim, dtype=torch.float32) for _ in range(2)]
    dq = torch.zeros(query.written.shape, dtype=torch.float32, device=q.device)
    k, v = ready(k), ready(v)
    resident_unordered_kernel[(multiprocessors(k.device),)](
        SharedRows(k, blocks.m),
        SharedRows(v, blocks.m),
        *key.out,
        SharedRows(key.written, half),
        *value.out,
        SharedRows(value.written, half),
        *sums,
        plan.counters(rows // half * heads),
        SharedRows(dq.view(-1, 2 * heads, dim // 2), blocks.n),
        plan.key_tiles_first_first,
        plan.num_key_tiles,
        plan.most_segments_more,
        plan.counters(2),
        *walk.factors,
        *(SharedRows(x, blocks.n) for x in walk.rows[0]),
        plan.bounds,
        int(blocks.early),
        heads,
        TILES=blocks.tiles,
        STAGES=blocks.stages,
        num_warps=WARPS,
    )
    torch.mul(dq, math.prod(walk.factors), out=query.written)
    for target in targets:
        target.finish()
    return True
