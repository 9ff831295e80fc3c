"""Looking up flat lists of ids in (sharded) embedding tables, in two parts.

`route` is the host's: ids travel to the processes that hold their rows, over the host's network,
so that all sizes are known to it and the device is never asked. It may run ahead of the step.
`Routed.look_up` is the device's: rows are read and travel back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.embedding import EmbeddingCollectionContext, ShardedEmbeddingCollection
from torchrec.distributed.embedding_sharding import BaseSparseFeaturesDist
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist
from torchrec.distributed.sharding.sequence_sharding import SequenceShardingContext
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from kernels.transfer import copy_together
from parallel.trade import trade_rows

# TorchRec's input is a batch of bags, and its kernels give each bag one thread. Ids of tokens have
# no bags, so each feature's ids from each process are cut into this many even segments.
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
    features = tuple(ids)
    if isinstance(tables, ShardedEmbeddingCollection):
        return Routed(tables, features, *_route_sharded(tables, ids, device))
    per_key = [x.numel() for x in ids.values()]
    values, counts = copy_together([torch.cat(list(ids.values())), torch.tensor(per_key)], device)
    return Routed(tables, features, _bags(list(ids), values, counts[:, None], per_key), None)


def _route_sharded(
    tables: ShardedEmbeddingCollection, ids: dict[str, Tensor], device: torch.device
) -> tuple[KJTList, EmbeddingCollectionContext]:
    """What `tables.input_dist` does, for any number of kinds of sharding in two messages, which go
    to and from the host: first how many ids of each feature come, then the ids."""
    names = list(ids)
    in_order = iter([names[i] for i in tables._features_order] or names)
    sends = [
        _Send.of({name: ids[name] for name in islice(in_order, count)}, part)
        for part, count in zip(tables._input_dists, tables._feature_splits, strict=True)
    ]
    group = tables._input_dists[0]._dist._pg
    rank, ranks = group.rank(), range(group.size())
    held = [send.features[rank] for send in sends]

    counts = _exchange(
        [send.counts[r] for r in ranks for send in sends],
        [sum(send.features[r] for send in sends) for r in ranks],
        [sum(held) for _ in ranks],
        group,
    ).view(len(ranks), sum(held))
    received = _exchange(
        [send.ids[r] for r in ranks for send in sends],
        [sum(send.splits[r] for send in sends) for r in ranks],
        counts.sum(1).tolist(),
        group,
    )
    # They come rank after rank, each with feature after feature; tables want it the other way.
    pieces = received.split(counts.flatten().tolist())
    by_feature = [piece for f in range(sum(held)) for piece in pieces[f :: sum(held)]]
    values, device_counts, *back = copy_together(
        [
            torch.cat([received[:0], *by_feature]),
            counts.T.flatten(),
            *(send.back for send in sends),
        ],
        device,
    )

    bags, context = [], tables.create_context()
    host_counts = counts.split(held, 1)
    for send, come, device_come, here, home in zip(
        sends,
        host_counts,
        device_counts.view(-1, len(ranks)).split(held),
        values.split([int(x.sum()) for x in host_counts]),
        back,
        strict=True,
    ):
        bags.append(_bags(send.keys[rank], here, device_come, come.sum(0).tolist()))
        context.sharding_contexts.append(
            SequenceShardingContext(
                features_before_input_dist=send.features_before,
                input_splits=send.splits,
                output_splits=come.sum(1).tolist(),
                unbucketize_permute_tensor=home,
            )
        )
    return KJTList(bags), context


@dataclass(frozen=True)
class _Send:
    """Ids of the tables of one kind of sharding, on the host. Lists are by rank."""

    features_before: KeyedJaggedTensor
    features: list[int]  # that a rank takes
    keys: list[list[str]]  # their names
    counts: tuple[Tensor, ...]  # int64 [features]: ids of each
    ids: tuple[Tensor, ...]
    splits: list[int]  # how many
    back: Tensor  # of tables cut into rows: where in this order each of the ids is

    @staticmethod
    def of(ids: dict[str, Tensor], part: BaseSparseFeaturesDist[KeyedJaggedTensor]) -> _Send:
        keys, per_key = list(ids), [x.numel() for x in ids.values()]
        counts, values = torch.tensor(per_key), torch.cat(list(ids.values()))
        back = values[:0]
        before = KeyedJaggedTensor(keys, values, lengths=counts, stride=1, length_per_key=per_key)
        features = part._dist._splits
        if isinstance(part, RwSparseFeaturesDist):
            counts, values, _, _, back = torch.ops.fbgemm.block_bucketize_sparse_features(
                counts,
                values,
                bucketize_pos=False,
                sequence=True,
                block_sizes=part._feature_block_sizes_tensor,
                my_size=len(features),
            )
            keys = keys * len(features)
        by_rank = counts.split(features)
        splits = [int(x.sum()) for x in by_rank]
        taken = iter(keys)
        names = [list(islice(taken, n)) for n in features]
        return _Send(before, features, names, by_rank, values.split(splits), splits, back)


def _exchange(
    pieces: Sequence[Tensor],
    send_splits: list[int],
    receive_splits: list[int],
    group: dist.ProcessGroup,
) -> Tensor:
    """pieces: for rank after rank. On the host."""
    send = torch.cat(list(pieces))
    if group.size() == 1:
        return send
    return trade_rows(send, send_splits, receive_splits, group)


def _bags(
    keys: list[str], values: Tensor, counts: Tensor, length_per_key: list[int]
) -> KeyedJaggedTensor:
    """Ids as TorchRec's kernels want them, cut into even bags.

    counts: int64 [features, messages] of ids; their sums over messages are length_per_key.
    """
    counts = counts[..., None]
    spare = torch.arange(SEGMENTS, device=counts.device) < counts % SEGMENTS
    lengths = (counts // SEGMENTS + spare).int()
    stride = SEGMENTS * counts.shape[1]
    return KeyedJaggedTensor(
        keys, values, lengths=lengths.flatten(), stride=stride, length_per_key=length_per_key
    )


def route_on_host(tables: ShardedEmbeddingCollection, features: Iterable[str]) -> None:
    """Have `tables` take ids on the host, wherever its rows are.

    TorchRec would make these parts at the first batch, on the device, and then read sizes from it.
    """
    tables._create_input_dist(list(features))
    tables._has_uninitialized_input_dist = False
    tables._features_order_tensor = tables._features_order_tensor.cpu()
    for part in tables._input_dists:
        part.cpu()
