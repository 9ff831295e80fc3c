"""HSTU attention in tiles: memory linear in the number of tokens, in plain PyTorch.

The default where there is no fast kernel (a CPU). HSTU attention has no softmax, so tiles simply
add, forward and backward, and nothing is kept between them but q, k and v.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import accumulator
from kernels.naive import visible
from kernels.weighting import Weighting

Gradients = tuple[Tensor, Tensor, Tensor]
BLOCK = 512  # rows a side; H * 512 * 512 float32 scores stay within a core's cache


def _tiles(weighting: Weighting) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Query rows, key rows and the mask (None: all visible) of every tile that is not empty."""
    queries, keys, intervals = weighting.queries, weighting.keys, weighting.intervals
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
    weighting: Weighting,
) -> Tensor:
    """The sum over visible keys, float32 [Tq, H, Dv] (float64 for float64 inputs)."""
    compute = accumulator(q.dtype)
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=compute, device=q.device)
    with torch.autocast(q.device.type, enabled=False):  # it would round what is summed
        for q_rows, k_rows, mask in _tiles(weighting):
            scores = torch.einsum("qhd,khd->hqk", q[q_rows].to(compute), k[k_rows].to(compute))
            scores *= weighting.alpha
            weights = scores * scores.sigmoid()
            if mask is not None:
                weights *= mask
            out[q_rows] += torch.einsum("hqk,khd->qhd", weights, v[k_rows].to(compute))
    return out.mul_(weighting.scale)


def blockwise_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting
) -> Gradients:
    """dq, dk, dv, float32 (float64 for float64 inputs)."""
    compute = accumulator(q.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=compute) for x in (q, k, v))
    for tile in _gradient_tiles(dout, q, k, v, weighting):
        tile.add_query(dq)
        tile.add_key_value(dk, dv)
    return dq, dk, dv


def blockwise_query_gradient(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting
) -> Tensor:
    """dq alone."""
    dq = torch.zeros_like(q, dtype=accumulator(q.dtype))
    for tile in _gradient_tiles(dout, q, k, v, weighting):
        tile.add_query(dq)
    return dq


def blockwise_key_value_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting
) -> tuple[Tensor, Tensor]:
    """dk and dv alone."""
    compute = accumulator(q.dtype)
    dk, dv = (torch.zeros_like(x, dtype=compute) for x in (k, v))
    for tile in _gradient_tiles(dout, q, k, v, weighting):
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
    weighting: Weighting,
) -> Iterator[_GradientTile]:
    """silu'(s) = sig(s)(1 + s(1 - sig(s)))."""
    compute = accumulator(q.dtype)
    for q_rows, k_rows, mask in _tiles(weighting):
        qs, ks, vs = q[q_rows].to(compute), k[k_rows].to(compute), v[k_rows].to(compute)
        dout_scaled = dout[q_rows].to(compute) * weighting.scale
        scores = torch.einsum("qhd,khd->hqk", qs, ks)
        scores *= weighting.alpha
        sigmoid = scores.sigmoid()
        weights = scores * sigmoid
        dscores = torch.einsum("qhd,khd->hqk", dout_scaled, vs)
        dscores *= sigmoid + weights * (1 - sigmoid)
        dscores *= weighting.alpha
        if mask is not None:
            weights *= mask
            dscores *= mask
        yield _GradientTile(q_rows, k_rows, qs, ks, dout_scaled, weights, dscores)
