"""The dense model's residual stream is of the dtype that the config asks for."""

from __future__ import annotations

import pytest
import torch

from gr_train.config import Config, ModelConfig
from gr_train.data.collate import collate
from gr_train.model.recommender import DenseModel, Recommender, tables
from parallel.embedding.tables import embedding_collection
from parallel.layout import ZigzagLayout
from parallel.shard import shard_batch
from tests.gr_train.samples import INFO, make_samples


@pytest.mark.parametrize(
    ("precision", "fp32_residual", "want"),
    [
        (torch.bfloat16, False, torch.bfloat16),
        (torch.bfloat16, True, torch.float32),
        (None, False, torch.float32),
    ],
)
@pytest.mark.parametrize("kind", ["hstu", "sasrec"])
def test_residual_stream(
    kind: str, precision: torch.dtype | None, fp32_residual: bool, want: torch.dtype
) -> None:
    model = ModelConfig(kind=kind, width=16, qk_dim=8, v_dim=8)
    config = Config(model=model)
    dense = DenseModel(config, INFO)
    embeddings = embedding_collection(tables(model, INFO), "cpu")
    recommender = Recommender(model, INFO, embeddings, dense, None, precision, fp32_residual)
    context = list(INFO.contextual)
    batch = collate(
        make_samples([3, 9], [0, 0], num_contextual=len(context)),
        task=model.task,
        style=model.input_style,
        num_contextual=len(context),
        max_length=config.data.max_length,
    )
    shard = shard_batch(batch, ZigzagLayout(1), None)
    streams: list[torch.dtype] = []
    for layer in dense.layers:
        layer.register_forward_hook(lambda _, x, out: streams.extend([x[0].dtype, out.dtype]))
    negatives = torch.arange(INFO.num_items)
    loss = recommender.loss(recommender.prepare(shard, negatives))
    assert streams == [want] * 4
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in dense.parameters())
