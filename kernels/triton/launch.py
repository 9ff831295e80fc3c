"""Launches the attention kernels on plain tensors: padding, descriptors, grids; no autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.jagged import Jagged
from kernels.triton.backward import key_value_kernel, query_kernel
from kernels.triton.configs import Blocks, Config, config_for
from kernels.triton.forward import forward_kernel
from kernels.triton.plan import plan_for


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    alpha: float,
    scale: float,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[Tq, H, Dv] in `dtype` (q's if None), or `out` with the result added."""
    rows, heads, v_dim = q.shape[0], q.shape[1], v.shape[2]
    if rows == 0 or k.shape[0] == 0:
        return q.new_zeros(rows, heads, v_dim, dtype=dtype) if out is None else out
    q, k, v = _padded(q), _padded(k), _padded(v)
    add = out is not None and out.is_contiguous() and v.shape[2] == v_dim
    result = q.new_empty(rows, heads, v.shape[2], dtype=dtype) if out is None or not add else out
    config = _config(q, v, queries)
    plan = plan_for(queries, keys, intervals, config.tile)
    blocks, tiles = config.forward, plan.query_tiles
    forward_kernel[(len(tiles) * (config.tile // blocks.m) * heads,)](
        _descriptor(q, blocks.m),
        _descriptor(k, blocks.n),
        _descriptor(v, blocks.n),
        result,
        tiles,
        plan.bounds,
        rows,
        alpha / 2,
        scale,
        ADD=add,
        **_constants(q, v, config.tile, blocks),
    )
    if out is None:
        return result[..., :v_dim].contiguous()
    return out if add else out.add_(result[..., :v_dim])


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    alpha: float,
    scale: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in `dtype` (q's if None)."""
    qk_dim, v_dim = q.shape[2], v.shape[2]
    if q.shape[0] == 0 or k.shape[0] == 0:
        dq, dk, dv = (x.new_zeros(x.shape, dtype=dtype) for x in (q, k, v))
        return dq, dk, dv
    dout, q, k, v = _padded(dout.to(q.dtype)), _padded(q), _padded(k), _padded(v)
    dq, dk, dv = (x.new_empty(x.shape, dtype=dtype) for x in (q, k, v))
    config = _config(q, v, queries)
    plan = plan_for(queries, keys, intervals, config.tile)

    mask_and_scale = (plan.bounds, len(q), alpha / 2, scale)

    tiles = plan.key_tiles
    launches = [(config.key, True, config.value is None)]
    if config.value is not None:
        launches.append((config.value, False, True))
    for blocks, key, value in launches:
        key_value_kernel[(len(tiles) * (config.tile // blocks.n) * q.shape[1],)](
            _descriptor(dout, blocks.m),
            _descriptor(q, blocks.m),
            _descriptor(k, blocks.n),
            _descriptor(v, blocks.n),
            dk,
            dv,
            tiles,
            *mask_and_scale,
            KEY=key,
            VALUE=value,
            **_constants(q, v, config.tile, blocks),
        )
    blocks, tiles = config.query, plan.query_tiles
    query_kernel[(len(tiles) * (config.tile // blocks.m) * q.shape[1],)](
        _descriptor(dout, blocks.m),
        _descriptor(q, blocks.m),
        _descriptor(k, blocks.n),
        _descriptor(v, blocks.n),
        dq,
        tiles,
        *mask_and_scale,
        **_constants(q, v, config.tile, blocks),
    )
    dq, dk = dq[..., :qk_dim].contiguous(), dk[..., :qk_dim].contiguous()
    return dq, dk, dv[..., :v_dim].contiguous()


def _config(q: Tensor, v: Tensor, queries: Jagged) -> Config:
    mean_length = len(q) // queries.num_sequences
    return config_for(max(q.shape[2], v.shape[2]), mean_length, q.dtype, q.device)


def _padded(x: Tensor) -> Tensor:
    """Head dim up to a power of two, at least 32, with zeros: they add nothing to any product."""
    dim = max(32, triton.next_power_of_2(x.shape[2]))
    return x if dim == x.shape[2] else F.pad(x, (0, dim - x.shape[2]))


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """Blocks of rows of one head, out of x [T, H, D] seen as the matrix [T, H * D]."""
    matrix = x.flatten(1)
    bytes_per_row = matrix.stride(0) * matrix.element_size()
    if matrix.stride(1) != 1 or bytes_per_row % 16 or matrix.data_ptr() % 16:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(matrix, [block, x.shape[2]])


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
