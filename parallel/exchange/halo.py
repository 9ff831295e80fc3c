"""Halo exchange: each rank sends only the key rows that the other ranks' queries see.

For windowed and semi-local masks, whose traffic is then the window and not the sequence. The rows
a rank sees are gathered in one jagged all-to-all, and attention runs on them in one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import hstu_attention
from parallel.relayout import relayout
from parallel.visibility import Visibility


def halo_attention(
    q: Tensor, k: Tensor, v: Tensor, *, seen: Visibility, alpha: float, scale: float
) -> Tensor:
    """See `parallel.attention.context_parallel_attention`."""
    move, keys = seen.halo
    halo = relayout(torch.cat([k, v], -1), move)
    halo_k, halo_v = halo.split([k.shape[2], v.shape[2]], dim=-1)
    return hstu_attention(
        q,
        halo_k,
        halo_v,
        queries=seen.shard.device_rows,
        keys=keys,
        intervals=seen.intervals,
        alpha=alpha,
        scale=scale,
    )
