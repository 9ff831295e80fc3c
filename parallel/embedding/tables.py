"""Embedding tables: their description, their sharding over all processes, their first values."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.keyed import KeyedOptimizer

from parallel.embedding.lookup import route_on_host
from parallel.embedding.plan import embedding_plan
from parallel.mesh import Mesh

OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}
INIT_STD = 0.02
BLOCK_ROWS = 4096  # rows drawn from one random generator


@dataclass(frozen=True)
class Table:
    """One embedding table, looked up under several feature names."""

    name: str
    num_embeddings: int
    dim: int
    features: tuple[str, ...]


def embedding_collection(
    tables: Sequence[Table], device: torch.device | str
) -> EmbeddingCollection:
    """The unsharded module."""
    configs = [
        EmbeddingConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.dim,
            feature_names=list(table.features),
        )
        for table in tables
    ]
    return EmbeddingCollection(tables=configs, device=torch.device(device))


def shard_tables(
    tables: Sequence[Table],
    mesh: Mesh,
    *,
    tokens_per_rank: int,
    optimizer: str,
    lr: float,
    eps: float,
    seed: int,
) -> ShardedEmbeddingCollection:
    """Tables over all processes of the mesh, with the optimizer fused into their backward pass.

    tokens_per_rank: ids a process looks up in a step, for the planner's estimates.
    """
    fused: dict[str, object] = {"optimizer": OPTIMIZERS[optimizer], "learning_rate": lr}
    if optimizer != "sgd":
        fused["eps"] = eps
    sharder = EmbeddingCollectionSharder(fused_params=fused)
    module = embedding_collection(tables, "meta")
    sharded = sharder.shard(
        module,
        embedding_plan(module, sharder, mesh, tokens_per_rank),
        ShardingEnv.from_process_group(mesh.world),
        mesh.device,
    )
    route_on_host(sharded, (feature for table in tables for feature in table.features))
    initialize(sharded, seed)
    return sharded


def initialize(sharded: ShardedEmbeddingCollection, seed: int) -> None:
    """Fill with normal values that depend on seed, table and row alone, not on the plan."""
    for name, weight in sharded.state_dict().items():
        for shard in weight.local_shards():
            (row, column), (rows, columns) = (
                shard.metadata.shard_offsets,
                shard.metadata.shard_sizes,
            )
            for start in range(row - row % BLOCK_ROWS, row + rows, BLOCK_ROWS):
                block = _block(f"{seed}/{name}/{start}", weight.size(1), shard.tensor.device)
                first, last = max(start, row), min(start + BLOCK_ROWS, row + rows)
                shard.tensor[first - row : last - row] = block[
                    first - start : last - start, column : column + columns
                ]


def _block(key: str, dim: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(zlib.crc32(key.encode()))
    return torch.empty(BLOCK_ROWS, dim, device=device).normal_(0, INIT_STD, generator=generator)


def fused_optimizer(sharded: ShardedEmbeddingCollection) -> KeyedOptimizer:
    """The optimizer whose state lives beside the tables, for checkpoints."""
    return sharded.fused_optimizer
