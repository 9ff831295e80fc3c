"""Looking up flat lists of ids in (sharded) embedding tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

# TorchRec's input is a batch of bags, and its kernels give each bag one thread. Ids of tokens have
# no bags, so each feature's list is cut into this many even segments, the same on every rank.
SEGMENTS = 1024


def lookup(tables: nn.Module, ids: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of an EmbeddingCollection: feature -> int64 [n] gives feature -> [n, dim].

    n may differ between features and between ranks. Collective if the tables are sharded.
    """
    keys = list(ids)
    counts = [ids[key].numel() for key in keys]
    device = ids[keys[0]].device
    lengths = torch.cat([_segments(count) for count in counts]).to(device, non_blocking=True)
    features = KeyedJaggedTensor(
        keys=keys,
        values=torch.cat([ids[key] for key in keys]),
        lengths=lengths,
        stride=SEGMENTS,
        length_per_key=counts,
    )
    found = tables(features)
    return {key: found[key].values() for key in keys}


def _segments(count: int) -> Tensor:
    """`count` ids in SEGMENTS even parts, int32."""
    each, leftover = divmod(count, SEGMENTS)
    lengths = torch.full((SEGMENTS,), each, dtype=torch.int32)
    lengths[:leftover] += 1
    return lengths
