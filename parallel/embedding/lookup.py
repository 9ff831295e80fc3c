"""Looking up flat lists of ids in (sharded) embedding tables, in two parts.

`route` is the host's: ids travel to the processes that hold their rows, over the host's network,
so that all sizes are known to it and the device is never asked. It may run ahead of the step.
`Routed.look_up` is the device's: rows are read and travel back. Of sharded tables each process asks
for a row once, however many of its ids want it, and sends one gradient for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_sharding import BaseSparseFeaturesDist
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from kernels.row_sums import Sum, Term, sum_rows
from kernels.transfer import copy_together
from parallel.embedding.fetch import Way, fetch
from parallel.trade import regroup, trade_rows

# TorchRec's input is a batch of bags, and its kernels give each bag one thread. Ids of tokens have
# no bags, so each feature's ids from each process are cut into this many even segments.
SEGMENTS = 1024


@dataclass(frozen=True)
class Routed:
    """Ids where their rows are, on the device."""

    tables: EmbeddingCollection | ShardedEmbeddingCollection
    ids: KeyedJaggedTensor | KJTList
    parts: tuple[_Part, ...] = ()  # if the tables are sharded: of each kind of sharding

    def look_up(self) -> Found:
        """Collective if the tables are sharded."""
        rows: list[Tensor] = []
        where: dict[str, tuple[int, Tensor]] = {}
        if isinstance(self.tables, ShardedEmbeddingCollection):
            dim = self.tables._embedding_configs[0].embedding_dim
            for lookup, ids, part in zip(self.tables._lookups, self.ids, self.parts, strict=True):
                found = part.rows.split(part.counts)
                where |= {
                    name: (len(rows), x) for name, x in zip(part.features, found, strict=True)
                }
                rows.append(fetch(lookup(ids).view(-1, dim), part.way))
        else:
            for name, found in self.tables(self.ids).items():
                x = found.values()
                where[name] = len(rows), torch.arange(len(x), dtype=torch.int32, device=x.device)
                rows.append(x)
        ways = enumerate(part.way for part in self.parts)
        return Found(rows, where, {i: x.begin_return for i, x in ways if x.group.size() > 1})


@dataclass(frozen=True)
class Found:
    """Rows of tables, each there once, and which of them the ids of each feature mean."""

    rows: Sequence[Tensor]  # [., dim] each
    where: dict[str, tuple[int, Tensor]]  # feature -> which of these tensors, int32 [n] in it
    on_gradient: Mapping[int, Callable[[Tensor], None]]  # for a `sum_rows` that is given all rows

    def term(self, feature: str, places: Tensor | None = None) -> Term:
        """What a feature's ids bring to a sum; see `kernels.row_sums`."""
        return Term(*self.where[feature], places)

    def alone(self, feature: str) -> Sum:
        """[n, dim]: of each id of a feature its row, in float32."""
        return Sum(len(self.where[feature][1]), torch.float32, [self.term(feature)])

    def values(self, feature: str) -> Tensor:
        return sum_rows(self.rows, [self.alone(feature)])[0]


@dataclass(frozen=True)
class _Part:
    """What was asked for of the tables of one kind of sharding."""

    features: list[str]
    counts: list[int]  # ids of each
    rows: Tensor  # int32: for each of them, which of the rows that come
    way: Way


def route(
    tables: EmbeddingCollection | ShardedEmbeddingCollection,
    ids: dict[str, Tensor],
    device: torch.device,
    message_dtype: torch.dtype | None = None,
) -> Routed:
    """Feature -> int64 [n] on the host, to the processes that hold the rows. Collective if sharded.

    n may differ between features and between ranks. Sharded tables want all their features.
    message_dtype: that their rows, and the gradients of these, travel in; None for the tables'.
    """
    if isinstance(tables, ShardedEmbeddingCollection):
        return Routed(tables, *_route_sharded(tables, ids, device, message_dtype))
    per_key = [x.numel() for x in ids.values()]
    values, counts = copy_together([torch.cat(list(ids.values())), torch.tensor(per_key)], device)
    return Routed(tables, _bags(list(ids), values, counts[:, None], per_key))


def _route_sharded(
    tables: ShardedEmbeddingCollection,
    ids: dict[str, Tensor],
    device: torch.device,
    message_dtype: torch.dtype | None,
) -> tuple[KJTList, tuple[_Part, ...]]:
    """What `tables.input_dist` does, for any number of kinds of sharding in two messages, which go
    to and from the host: first how many ids of each feature come, then the ids."""
    names = list(ids)
    in_order = iter([names[i] for i in tables._features_order] or names)
    features = [list(islice(in_order, count)) for count in tables._feature_splits]
    table_of = {name: x.name for x in tables._embedding_configs for name in x.feature_names}
    sends = [
        _Send.of({name: ids[name] for name in of_part}, table_of, part)
        for of_part, part in zip(features, tables._input_dists, strict=True)
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
    values, device_counts, *rows = copy_together(
        [
            # They come rank after rank, each with feature after feature: the other way round.
            regroup(received, counts.tolist()),
            counts.T.flatten(),
            *(send.wanted for send in sends),
        ],
        device,
    )

    bags, parts = [], []
    host_counts = counts.split(held, 1)
    for of_part, send, come, device_come, here, where in zip(
        features,
        sends,
        host_counts,
        device_counts.view(-1, len(ranks)).split(held),
        values.split([int(x.sum()) for x in host_counts]),
        rows,
        strict=True,
    ):
        bags.append(_bags(send.keys[rank], here, device_come, come.sum(0).tolist()))
        way = Way(come.T.tolist(), send.splits, group, message_dtype)
        parts.append(_Part(of_part, [ids[name].numel() for name in of_part], where.int(), way))
    return KJTList(bags), tuple(parts)


@dataclass(frozen=True)
class _Send:
    """Ids of the tables of one kind of sharding, on the host. Lists are by rank."""

    features: list[int]  # that a rank takes
    keys: list[list[str]]  # their names
    counts: tuple[Tensor, ...]  # int64 [features]: ids of each
    ids: tuple[Tensor, ...]
    splits: list[int]  # how many
    wanted: Tensor  # int64: for each id that was asked for, which of the rows that come

    @staticmethod
    def of(
        asked: dict[str, Tensor],
        table_of: dict[str, str],
        part: BaseSparseFeaturesDist[KeyedJaggedTensor],
    ) -> _Send:
        ids, wanted = _each_once(asked, table_of)
        keys = list(ids)
        counts, values = torch.tensor([x.numel() for x in ids.values()]), torch.cat([*ids.values()])
        features = part._dist._splits
        if isinstance(part, RwSparseFeaturesDist):
            counts, values, _, _, place = torch.ops.fbgemm.block_bucketize_sparse_features(
                counts,
                values,
                bucketize_pos=False,
                sequence=True,
                block_sizes=part._feature_block_sizes_tensor,
                my_size=len(features),
            )
            wanted = place[wanted]
            keys = keys * len(features)
        by_rank = counts.split(features)
        splits = [int(x.sum()) for x in by_rank]
        taken = iter(keys)
        names = [list(islice(taken, n)) for n in features]
        return _Send(features, names, by_rank, values.split(splits), splits, wanted)


def _each_once(
    asked: dict[str, Tensor], table_of: dict[str, str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Features with each id of a table once, under the table's first feature; and for each id that
    was asked for, which of those it is: int64."""
    tables: dict[str, list[str]] = {}
    for name in asked:
        tables.setdefault(table_of[name], []).append(name)
    ids = {name: x[:0] for name, x in asked.items()}
    which: dict[str, Tensor] = {}
    for names in tables.values():
        together = torch.cat([asked[name] for name in names])
        ids[names[0]], places = torch.unique(together, return_inverse=True)
        which |= zip(names, places.split([asked[name].numel() for name in names]), strict=True)
    starts = dict(zip(ids, accumulate((x.numel() for x in ids.values()), initial=0), strict=False))
    return ids, torch.cat([which[name] + starts[tables[table_of[name]][0]] for name in asked])


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
