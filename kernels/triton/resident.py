"""Launches of kernels whose programs stay, see `hopper`: of one source."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.scratch import scratch_limit
from kernels.source import Source
from kernels.triton.hopper.backward import resident_backward_kernel
from kernels.triton.hopper.forward import resident_forward_kernel
from kernels.triton.hopper.query import resident_query_kernel
from kernels.triton.launcher import SharedRows, multiprocessors
from kernels.triton.target import Target, ready, rows_of
from kernels.triton.walk import Walk
from kernels.weighting import Weighting

WARPS = 4  # of a warpgroup


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
        plan.query_tiles(),
        plan.num_query_tiles,
        plan.counters(2),
        *walk.factors,
        *(SharedRows(x, blocks.n) for x in walk.rows[0]),
        plan.bounds,
        HEADS=walk.heads,
        TILES=blocks.tiles,
        STAGES=blocks.stages,
        num_warps=WARPS,
    )


def query_gradient(walk: Walk, dout: Tensor, q: Tensor, target: Target) -> None:
    walk.wait()
    plan, blocks, half = walk.plan, walk.blocks, walk.blocks.m // 2
    copies = blocks.copies and target.is_ready(q.dtype)
    resident_query_kernel[(multiprocessors(q.device),)](
        SharedRows(dout, half),
        *rows_of(dout),
        SharedRows(q, half),
        *rows_of(q),
        *target.add,
        *target.out,
        SharedRows(target.written, half) if copies else None,
        plan.query_tiles(),
        plan.num_query_tiles,
        plan.counters(2),
        *walk.factors,
        *(SharedRows(x, blocks.n) for x in walk.rows[0]),
        plan.bounds,
        HEADS=walk.heads,
        TILES=blocks.tiles,
        STAGES=blocks.stages,
        num_warps=WARPS,
    )


def key_value_gradients(
    walk: Walk, k: Tensor, v: Tensor, key: Target, value: Target, dq: Tensor | None = None
) -> None:
    """dq: zeros, float32 [Tq, H, dim], to which 2 / (scale * alpha) of it is added in any order."""
    walk.wait()
    plan, blocks, heads, dim = walk.plan, walk.blocks, walk.heads, walk.qk_dim
    rows, half = plan.most_segments() * blocks.n, blocks.n // 2
    sums = [k.new_empty(rows, heads, dim, dtype=torch.float32) for _ in range(2)]
    copies = key.is_ready(k.dtype) and value.is_ready(k.dtype)
    assert copies or dq is None
    resident_backward_kernel[(multiprocessors(k.device),)](
        SharedRows(k, blocks.n),
        SharedRows(v, blocks.n),
        *key.add,
        *value.add,
        *key.out,
        SharedRows(key.written, half) if copies else None,
        *value.out,
        SharedRows(value.written, half) if copies else None,
        *sums,
        plan.counters(rows // half * heads),
        None if dq is None else SharedRows(dq.view(-1, 2 * heads, dim // 2), blocks.m),
        plan.key_tiles(),
        plan.num_key_tiles,
        plan.most_segments_more,
        plan.counters(2),
        *walk.factors,
        *(SharedRows(x, blocks.m) for x in walk.rows[0]),
        SharedRows(plan.bounds[:, None], blocks.m),
        HEADS=heads,
        TILES=blocks.tiles,
        STAGES=blocks.stages,
        num_warps=WARPS,
    )


def gradients_in_any_order(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weighting: Weighting,
    out: tuple[Tensor, Tensor, Tensor],
) -> bool:
    """`out`, written with dq, dk and dv: whether it could be done, and is faster so."""
    walk = Walk(k, [Source((q, dout), weighting)], resident="key_value")
    if walk.is_empty or walk.resident is None or not walk.config.in_any_order:
        return False
    query, key, value = targets = [Target(x, None) for x in out]
    sums = 2 * walk.plan.most_segments() * walk.blocks.n
    scratch = 4 * walk.heads * walk.qk_dim * (q.shape[0] + sums)
    if scratch > scratch_limit() or not all(x.is_ready(q.dtype) for x in targets):
        return False
    dq = torch.zeros(query.written.shape, dtype=torch.float32, device=q.device)
    key_value_gradients(walk, ready(k), ready(v), key, value, dq)
    torch.mul(dq, math.prod(walk.factors), out=query.written)
    for target in targets:
        target.finish()
    return True
