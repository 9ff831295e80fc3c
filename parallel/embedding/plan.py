"""Where each embedding table lives: TorchRec's planner says."""

from __future__ import annotations

import os

import torch
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ParameterSharding, ShardingType
from torchrec.modules.embedding_modules import EmbeddingCollection

from parallel.embedding.lookup import SEGMENTS
from parallel.mesh import Mesh

MANY_ROWS = 1024  # a process: of fewer, some could be asked for far more than others
SMALL_BYTES = 32 << 20  # that a process may send of a table, if all ask it for all rows


def embedding_plan(
    module: EmbeddingCollection,
    sharder: EmbeddingCollectionSharder,
    mesh: Mesh,
    tokens_per_rank: int,
) -> dict[str, ParameterSharding]:
    """Table name -> placement, the same on every rank. Collective."""
    # Whole rows only: the row-wise optimizer keeps one number a row, so cutting columns would
    # change the result. Never replicated: a replica has no fused optimizer. All processes look up
    # in all tables: of one that is held by a single process, this one alone serves everybody.
    constraints = {
        config.name: ParameterConstraints(
            sharding_types=_kinds(config.num_embeddings, config.embedding_dim, mesh.size),
            compute_kernels=[EmbeddingComputeKernel.FUSED.value],
            pooling_factors=[max(1.0, tokens_per_rank / SEGMENTS)] * len(config.feature_names),
        )
        for config in module.embedding_configs()
    }
    device = mesh.device.type
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=mesh.size,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", mesh.size)),
            compute_device=device,
            hbm_cap=torch.cuda.mem_get_info(mesh.device)[1] if device == "cuda" else None,
        ),
        batch_size=SEGMENTS,
        constraints=constraints,
        debug=False,
    )
    sharding = planner.collective_plan(module, [sharder], mesh.world)
    return sharding.get_plan_for_module("")


def _kinds(rows: int, dim: int, processes: int) -> list[str]:
    """Those of sharding that suit a table. Small ones are whole, each on one process: large ones,
    often a single one, then share their kind with none, and need not be put in order to be sent."""
    if rows >= MANY_ROWS * processes:
        return [ShardingType.ROW_WISE.value]
    if rows * dim * 4 * processes <= SMALL_BYTES:
        return [ShardingType.TABLE_WISE.value]
    return [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]
