"""Looking up flat lists of ids in (sharded) embedding tables, in two parts.

`route` is the host's: ids travel to the processes that hold their rows, over the host's network,
so that all sizes are known to it and the device is never asked. It may run ahead of the step.
`Routed.look_up` is the device's: rows are read and travel back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.distributed.embedding import EmbeddingCollectionContext, ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import KJTList
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from kernels.transfer import copy_to

# TorchRec's input is a batch of bags, and its kernels give each bag one thread. Ids of tokens have
# no bags, so each feature's list is cut into this many even segments, the same on every rank.
SEGMENTS = 1024


@dataclass(frozen=True)
class Routed:
    """Ids where their rows are, on the device."""

    tables: EmbeddingCollection | ShardedEmbeddingCollection
    features: tuple[str, ...]
    ids: KeyedJaggedTensor | KJTList
    context: EmbeddingCollectionContext | None  # if the tables are sharded: the way back

    def look_up(self) -> dict[str, Tensor]:
        """Feature -> [n, dim]. Collective if the tables are sharded."""
        if isinstance(self.tables, ShardedEmbeddingCollection):
            found = self.tables.compute_and_output_dist(self.context, self.ids).wait()
        else:
            found = self.tables(self.ids)
        return {feature: found[feature].values() for feature in self.features}


def route(
    tables: EmbeddingCollection | ShardedEmbeddingCollection,
    ids: dict[str, Tensor],
    device: torch.device,
) -> Routed:
    """Feature -> int64 [n] on the host, to the processes that hold the rows. Collective if sharded.

    n may differ between features and between ranks. Sharded tables want all their features.
    """
    counts = [x.numel() for x in ids.values()]
    bags = KeyedJaggedTensor(
        keys=list(ids),
        values=torch.cat(list(ids.values())),
        lengths=torch.cat([_segments(count) for count in counts]),
        stride=SEGMENTS,
        length_per_key=counts,
    )
    if not isinstance(tables, ShardedEmbeddingCollection):
        return Routed(tables, tuple(ids), _copy(bags, device), None)
    context = tables.create_context()
    routed = tables.input_dist(context, bags).wait().wait()
    for sharding in context.sharding_contexts:
        sharding.features_before_input_dist = _copy(sharding.features_before_input_dist, device)
        for name in ("unbucketize_permute_tensor", "sparse_features_recat"):
            tensor = getattr(sharding, name)
            if tensor is not None:
                setattr(sharding, name, copy_to(tensor, device))
    return Routed(tables, tuple(ids), KJTList([_copy(x, device) for x in routed]), context)


def route_on_host(tables: ShardedEmbeddingCollection, features: Iterable[str]) -> None:
    """Have `tables` take ids on the host, wherever its rows are.

    TorchRec would make these parts at the first batch, on the device, and then read sizes from it.
    """
    tables._create_input_dist(list(features))
    tables._has_uninitialized_input_dist = False
    tables._features_order_tensor = tables._features_order_tensor.cpu()
    for part in tables._input_dists:
        part.cpu()


def _copy(bags: KeyedJaggedTensor, device: torch.device) -> KeyedJaggedTensor:
    if device.type == "cuda":
        bags = bags.pin_memory()
    return bags.to(device, non_blocking=True)


def _segments(count: int) -> Tensor:
    """`count` ids in SEGMENTS even parts, int32."""
    each, leftover = divmod(count, SEGMENTS)
    lengths = torch.full((SEGMENTS,), each, dtype=torch.int32)
    lengths[:leftover] += 1
    return lengths
