"""Launches the attention kernels on plain tensors: padding, descriptors, grids; no autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.jagged import Jagged
from kernels.triton.backward import key_value_kernel, query_kernel
from kernels.triton.configs import Blocks, config_for
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
    in_place = out is not None and out.is_contiguous() and v.shape[2] == v_dim
    result = out if in_place else q.new_empty(rows, heads, v.shape[2], dtype=dtype)
    config = config_for(max(q.shape[2], v.shape[2]), q.dtype, q.device)
    plan = plan_for(queries, keys, intervals, config.tile)
    blocks = config.forward
    forward_kernel[(plan.query_cut.bound * (config.tile // blocks.m) * heads,)](
        _descriptor(q, blocks.m),
        _descriptor(k, blocks.n),
        _descriptor(v, blocks.n),
        result,
        plan.query_tiles,
        plan.bounds,
        rows,
        alpha / 2,
        scale,
        ADD=in_place,
        **_constants(q, v, config.tile, blocks),
    )
    if in_place:
        return result
    result = result[..., :v_dim]
    return result.contiguous() if out is None else out.add_(result)


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
    shapes = [x.shape for x in (q, k, v)]
    if q.shape[0] == 0 or k.shape[0] == 0:
        return tuple(x.new_zeros(x.shape, dtype=dtype) for x in (q, k, v))
    dout, q, k, v = _padded(dout.to(q.dtype)), _padded(q), _padded(k), _padded(v)
    dq, dk, dv = (x.new_empty(x.shape, dtype=dtype) for x in (q, k, v))
    config = config_for(max(q.shape[2], v.shape[2]), q.dtype, q.device)
    plan = plan_for(queries, keys, intervals, config.tile)

    blocks = config.key_value
    tiles = plan.key_tiles
    key_value_kernel[(len(tiles) * (config.tile // blocks.n) * q.shape[1],)](
        _descriptor(dout, blocks.m),
        _descriptor(q, blocks.m),
        _descriptor(k, blocks.n),
        _descriptor(v, blocks.n),
        dk,
        dv,
        tiles,
        plan.bounds,
        len(q),
        alpha / 2,
        scale,
        **_constants(q, v, config.tile, blocks),
    )
    blocks = config.query
    tiles = plan.query_tiles
    query_kernel[(len(tiles) * (config.tile // blocks.m) * q.shape[1],)](
        _descriptor(dout, blocks.m),
        _descriptor(q, blocks.m),
        _descriptor(k, blocks.n),
        _descriptor(v, blocks.n),
        dq,
        tiles,
        plan.bounds,
        len(q),
        alpha / 2,
        scale,
        **_constants(q, v, config.tile, blocks),
    )
    grads = (dq, dk, dv)
    return tuple(x[..., : s[2]].contiguous() for x, s in zip(grads, shapes, strict=True))


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
