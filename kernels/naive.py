"""HSTU attention as one reads it in the paper: all scores at once. The fast kernels' oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import accumulator
from kernels.weighting import Weighting


def visible(intervals: Tensor, key_positions: Tensor) -> Tensor:
    """Which keys each query sees: int32 [Tq, 4], int32 [Tk] -> bool [Tq, Tk]."""
    a0, a1, b0, b1 = intervals[:, :, None].unbind(1)
    in_a = (key_positions >= a0) & (key_positions < a1)
    in_b = (key_positions >= b0) & (key_positions < b1)
    return in_a | in_b


def naive_attention(q: Tensor, k: Tensor, v: Tensor, weighting: Weighting) -> Tensor:
    """out_i = scale * sum_j silu(alpha * q_i . k_j) v_j over visible j (arXiv 2402.17152, eq. 2).

    Shapes and dtypes as in `kernels.attention.hstu_attention`; differentiable through autograd.
    Materialises [H, Tq, Tk] scores for one sequence at a time.
    """
    queries, keys, intervals = weighting.queries, weighting.keys, weighting.intervals
    alpha, scale = weighting.alpha, weighting.scale
    compute = accumulator(q.dtype)
    q_offsets, k_offsets = queries.offsets.tolist(), keys.offsets.tolist()
    outs = [scale * torch.einsum("qhd,khd,khe->qhe", q[:0], k[:0], v[:0]).to(compute)]
    with torch.autocast(q.device.type, enabled=False):  # it would round what is summed
        for b in range(queries.num_sequences):
            q_rows = slice(q_offsets[b], q_offsets[b + 1])
            k_rows = slice(k_offsets[b], k_offsets[b + 1])
            scores = torch.einsum("qhd,khd->hqk", q[q_rows].to(compute), k[k_rows].to(compute))
            seen = visible(intervals[q_rows], keys.positions[k_rows])
            weights = F.silu(alpha * scores) * seen
            outs.append(scale * torch.einsum("hqk,khd->qhd", weights, v[k_rows].to(compute)))
    return torch.cat(outs).to(q.dtype)
