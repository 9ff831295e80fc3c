"""Launches the attention kernels on plain tensors: padding, descriptors, grids; no autograd.

Out, dq, dk and dv are written into tensors of any floating dtype, each plus another if wanted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.triton.backward import key_value_kernel, query_kernel
from kernels.triton.configs import Blocks, Config, config_for
from kernels.triton.forward import forward_kernel
from kernels.triton.integers import next_power_of_2
from kernels.triton.launcher import Rows
from kernels.triton.plan import Plan, plan_for
from kernels.weighting import Weighting


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weighting: Weighting,
    *,
    add: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """`out` [Tq, H, Dv], written with the result, plus `add` if given."""
    if q.shape[0] == 0 or k.shape[0] == 0:
        return _nothing(add, out)
    q, k, v = _ready(q), _ready(k), _ready(v)
    config, plan = _plan(q, v, weighting)
    blocks, tiles = config.forward, plan.query_tiles
    target = _Target(out, add, v.shape[2])
    forward_kernel[(tiles.shape[0] * (config.tile // blocks.m) * q.shape[1],)](
        q,
        q.stride(0),
        Rows(k, blocks.n),
        Rows(v, blocks.n),
        *target.add,
        *target.out,
        tiles,
        plan.bounds,
        q.shape[0],
        weighting.alpha / 2,
        weighting.scale,
        **_constants(q, v, config.tile, blocks),
    )
    return target.finish()


def query_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weighting: Weighting,
    *,
    add: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """`out` [Tq, H, Dqk], written with dq, plus `add` if given."""
    if q.shape[0] == 0 or k.shape[0] == 0:
        return _nothing(add, out)
    dout, q, k, v = _ready(dout, q.dtype), _ready(q), _ready(k), _ready(v)
    config, plan = _plan(q, v, weighting)
    blocks, tiles = config.query, plan.query_parts
    target = _Target(out, add, q.shape[2])
    query_kernel[(tiles.shape[0] * (config.part // blocks.m) * q.shape[1],)](
        dout,
        q,
        dout.stride(0),
        q.stride(0),
        Rows(k, blocks.n),
        Rows(v, blocks.n),
        *target.add,
        *target.out,
        tiles,
        plan.bounds,
        q.shape[0],
        weighting.alpha / 2,
        weighting.scale,
        **_constants(q, v, config.part, blocks),
    )
    return target.finish()


def key_value_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weighting: Weighting,
    *,
    add: tuple[Tensor, Tensor] | None = None,
    out: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """`out` [Tk, H, Dqk] and [Tk, H, Dv], written with dk and dv, plus `add` if given."""
    add_k, add_v = add or (None, None)
    if q.shape[0] == 0 or k.shape[0] == 0:
        return _nothing(add_k, out[0]), _nothing(add_v, out[1])
    dout, q, k, v = _ready(dout, q.dtype), _ready(q), _ready(k), _ready(v)
    config, plan = _plan(q, v, weighting)
    tiles = plan.key_parts
    key, value = _Target(out[0], add_k, k.shape[2]), _Target(out[1], add_v, v.shape[2])
    launches = [(config.key, True, config.value is None)]
    if config.value is not None:
        launches.append((config.value, False, True))
    rows = plan.most_segments * config.part
    sums = [x.new_empty(rows, *x.shape[1:], dtype=torch.float32) for x in (k, v)]
    for blocks, with_key, with_value in launches:
        key_value_kernel[(tiles.shape[0] * (config.part // blocks.n) * q.shape[1],)](
            Rows(dout, blocks.m),
            Rows(q, blocks.m),
            Rows(k, blocks.n),
            Rows(v, blocks.n),
            *key.add,
            *value.add,
            *key.out,
            *value.out,
            *sums,
            plan.counters(rows // blocks.n * q.shape[1]),
            tiles,
            plan.bounds,
            q.shape[0],
            weighting.alpha / 2,
            weighting.scale,
            KEY=with_key,
            VALUE=with_value,
            **_constants(q, v, config.part, blocks),
        )
    return key.finish(), value.finish()


class _Target:
    """Where a kernel writes: `wanted` itself, or what it takes a copy from if heads are padded."""

    def __init__(self, wanted: Tensor, add: Tensor | None, padded_dim: int) -> None:
        self.wanted, self.dim = wanted, wanted.shape[2]
        padded = padded_dim != self.dim
        self.written = wanted.new_empty(*wanted.shape[:2], padded_dim) if padded else wanted
        self.out = _rows(self.written)
        self.add = (None, 0) if add is None else _rows(_padded(add) if padded else add)

    def finish(self) -> Tensor:
        if self.written is not self.wanted:
            self.wanted.copy_(self.written[..., : self.dim])
        return self.wanted


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x [T, H, D] and its stride from row to row; a row itself must be contiguous."""
    _, heads, dim = x.shape
    row, head, one = x.stride()
    assert one == 1
    assert heads == 1 or head == dim
    return x, row


def _nothing(add: Tensor | None, out: Tensor) -> Tensor:
    return out.zero_() if add is None else out.copy_(add)


def _plan(q: Tensor, v: Tensor, weighting: Weighting) -> tuple[Config, Plan]:
    key = q.shape, v.shape[2], q.dtype
    known: tuple[Config, Plan] | None = weighting.plans.get(key)
    if known is None:
        queries, keys, intervals = weighting.queries, weighting.keys, weighting.intervals
        rows, heads, dim = q.shape
        mean_length = rows // queries.num_sequences
        config = config_for(max(dim, v.shape[2]), rows * heads, mean_length, q.dtype, q.device)
        known = config, plan_for(queries, keys, intervals, config.tile, config.part)
        weighting.plans[key] = known
    return known


def _ready(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x [T, H, D] with rows as descriptors want them: contiguous, apart, aligned; heads padded."""
    x = _padded(x if dtype is None or x.dtype == dtype else x.to(dtype))
    _, heads, dim = x.shape
    row, head, one = x.stride()
    packed = one == 1 and (heads == 1 or head == dim) and row >= heads * dim
    aligned = row * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0
    return x if packed and aligned else x.clone(memory_format=torch.contiguous_format)


def _padded(x: Tensor) -> Tensor:
    """Head dim up to a power of two, at least 32, with zeros: they add nothing to any product."""
    dim = x.shape[2]
    padded = max(32, next_power_of_2(dim))
    return x if padded == dim else F.pad(x, (0, padded - dim))


def _constants(q: Tensor, v: Tensor, tile: int, blocks: Blocks) -> dict[str, object]:
    return dict(
        HEADS=q.shape[1],
        QK_DIM=q.shape[2],
        V_DIM=v.shape[2],
        TILE=tile,
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        FAST=q.dtype != torch.float32 and q.is_cuda,
        PRECISION="tf32x3" if q.is_cuda else "ieee",  # of float32 products; others are exact
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
