"""Full-set ranks against sorting all scores; the popularity baseline."""

from __future__ import annotations

import torch

from gr_train.config import ModelConfig
from gr_train.data.sample import DatasetInfo
from gr_train.evaluation import full_ranks, popularity_metrics
from gr_train.model.recommender import Recommender, tables
from kernels.sampled_softmax import unit_rows
from parallel.batch import JaggedBatch
from parallel.embedding.tables import embedding_collection

INFO = DatasetInfo(num_items=37, num_actions=2)

CPU = torch.device("cpu")


def make_model() -> Recommender:
    torch.manual_seed(0)
    config = ModelConfig(width=6)
    embeddings = embedding_collection(tables(config, INFO), "cpu")
    return Recommender(config, INFO, embeddings, torch.nn.Identity(), None)


@torch.no_grad()
def test_ranks_equal_a_sort() -> None:
    model = make_model()
    labels = torch.randint(37, (20,))
    users = unit_rows(torch.randn(20, 6))
    targets = unit_rows(model.item_embeddings(labels, CPU))
    scores = users @ unit_rows(model.item_embeddings(torch.arange(37), CPU)).T
    want = (scores.argsort(1, descending=True) == labels[:, None]).nonzero()[:, 1] + 1
    for chunk in (1, 5, 37, 100):
        assert torch.equal(full_ranks(model, users, labels, targets, chunk), want)


@torch.no_grad()
def test_a_collapsed_model_ranks_last() -> None:
    """Equal scores and NaN must not look like a perfect model."""
    model = make_model()
    labels = torch.tensor([3, 4])
    for users in (torch.zeros(2, 6), torch.full((2, 6), torch.nan)):
        ranks = full_ranks(model, users, labels, unit_rows(model.item_embeddings(labels, CPU)), 10)
        assert ranks.tolist() == [37, 37]


def test_popularity() -> None:
    counts = torch.tensor([5, 9, 0, 9])  # order: 1, 3, 0, 2
    batch = JaggedBatch(
        lengths=torch.tensor([2, 0, 1], dtype=torch.int32),
        num_targets=torch.zeros(3, dtype=torch.int32),
        tokens={"label": torch.tensor([2, 3, 0])},
    )
    metrics = popularity_metrics(counts, [batch], [1, 2], None)
    assert metrics["samples"] == 2  # the empty sequence holds nothing out
    assert metrics["HR@2"] == 0.5
    assert metrics["MRR"] == (1 / 2 + 1 / 3) / 2
