"""HSTU attention in tiles: memory linear in the number of tokens, in plain PyTorch.

The default where there is no fast kernel (a CPU). HSTU attention has no softmax, so tiles simply
add, forward and backward, and nothing is kept between them but q, k and v.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.jagged import Jagged
from kernels.naive import visible

Gradients = tuple[Tensor, Tensor, Tensor]
BLOCK = 512  # rows a side; H * 512 * 512 float32 scores stay within a core's cache


def _tiles(
    queries: Jagged, keys: Jagged, intervals: Tensor
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Query rows, key rows and the mask (None: all visible) of every tile that is not empty."""
    q_offsets, k_offsets = queries.offsets.tolist(), keys.offsets.tolist()
    for b in range(queries.num_sequences):
        for q0 in range(q_offsets[b], q_offsets[b + 1], BLOCK):
            q_rows = slice(q0, min(q0 + BLOCK, q_offsets[b + 1]))
            for k0 in range(k_offsets[b], k_offsets[b + 1], BLOCK):
                k_rows = slice(k0, min(k0 + BLOCK, k_offsets[b + 1]))
                mask = visible(intervals[q_rows], keys.positions[k_rows])
                count = int(mask.sum())
                if count:
                    yield q_rows, k_rows, None if count == mask.numel() else mask


def blockwise_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    alpha: float,
    scale: float,
) -> Tensor:
    """The sum over visible keys, float32 [Tq, H, Dv] (float64 for float64 inputs)."""
    compute = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=compute, device=q.device)
    for q_rows, k_rows, mask in _tiles(queries, keys, intervals):
        scores = torch.einsum("qhd,khd->hqk", q[q_rows].to(compute), k[k_rows].to(compute))
        scores *= alpha
        weights = scores * scores.sigmoid()
        if mask is not None:
            weights *= mask
        out[q_rows] += torch.einsum("hqk,khd->qhd", weights, v[k_rows].to(compute))
    return out.mul_(scale)


def blockwise_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Gradients:
    """dq, dk, dv, float32 (float64 for float64 inputs). mask: as of `blockwise_forward`."""
    compute = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, dtype=compute) for x in (q, k, v))
    for tile in _gradient_tiles(dout, q, k, v, **mask):
        tile.add_query(dq)
        tile.add_key_value(dk, dv)
    return dq, dk, dv


def blockwise_query_gradient(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
    """dq alone."""
    dq = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
    for tile in _gradient_tiles(dout, q, k, v, **mask):
        tile.add_query(dq)
    return dq


def blockwise_key_value_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, **mask: Any
) -> tuple[Tensor, Tensor]:
    """dk and dv alone."""
    compute = torch.promote_types(q.dtype, torch.float32)
    dk, dv = (torch.zeros_like(x, dtype=compute) for x in (k, v))
    for tile in _gradient_tiles(dout, q, k, v, **mask):
        tile.add_key_value(dk, dv)
    return dk, dv


@dataclass
class _GradientTile:
    q_rows: slice
    k_rows: slice
    q: Tensor  # [rows, H, D] of the tile, like k and dout
    k: Tensor
    dout: Tensor  # times scale
    weights: Tensor  # silu(s) [H, q, k]
    dscores: Tensor  # d loss / d (q . k)

    def add_query(self, dq: Tensor) -> None:
        dq[self.q_rows] += torch.einsum("hqk,khd->qhd", self.dscores, self.k)

    def add_key_value(self, dk: Tensor, dv: Tensor) -> None:
        dv[self.k_rows] += torch.einsum("hqk,qhd->khd", self.weights, self.dout)
        dk[self.k_rows] += torch.einsum("hqk,qhd->khd", self.dscores, self.q)


def _gradient_tiles(
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
) -> Iterator[_GradientTile]:
    """silu'(s) = sig(s)(1 + s(1 - sig(s)))."""
    compute = torch.promote_types(q.dtype, torch.float32)
    for q_rows, k_rows, mask in _tiles(queries, keys, intervals):
        qs, ks, vs = q[q_rows].to(compute), k[k_rows].to(compute), v[k_rows].to(compute)
        dout_scaled = dout[q_rows].to(compute) * scale
        scores = torch.einsum("qhd,khd->hqk", qs, ks)
        scores *= alpha
        sigmoid = scores.sigmoid()
        weights = scores * sigmoid
        dscores = torch.einsum("qhd,khd->hqk", dout_scaled, vs)
        dscores *= sigmoid + weights * (1 - sigmoid)
        dscores *= alpha
        if mask is not None:
            weights *= mask
            dscores *= mask
        yield _GradientTile(q_rows, k_rows, qs, ks, dout_scaled, weights, dscores)
