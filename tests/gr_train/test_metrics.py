"""Metrics against their definitions, spread unevenly over ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from gr_train.metrics import BinaryMetrics, RankMetrics
from parallel.mesh import build_mesh

RANKS = [[1, 2, 11, 700, 10], [], [3]]
LOGITS = [[3.0, -1.0, 0.2, 0.1], [], [-2.0, 0.5]]
LABELS = [[1.0, 0.0, 0.0, 1.0], [], [0.0, 1.0]]


def compute_over_ranks():
    mesh = build_mesh(dp=dist_size(), cp=1, device=torch.device("cpu"))
    ranking, binary = RankMetrics([10]), BinaryMetrics(["click"])
    ranking.update(torch.tensor(RANKS[mesh.rank], dtype=torch.int64))
    binary.update(
        torch.tensor(LOGITS[mesh.rank]).view(-1, 1), torch.tensor(LABELS[mesh.rank]).view(-1, 1)
    )
    return ranking.compute(mesh.world), binary.compute(mesh.world)


def dist_size() -> int:
    import os

    return int(os.environ["WORLD_SIZE"])


def test_uneven_ranks(run_in_world) -> None:
    for ranking, binary in run_in_world(3, compute_over_ranks):
        ranks = [r for rank in RANKS for r in rank]
        hits = [r for r in ranks if r <= 10]
        assert ranking["samples"] == 6
        assert ranking["HR@10"] == pytest.approx(len(hits) / 6)
        assert ranking["NDCG@10"] == pytest.approx(sum(1 / math.log2(1 + r) for r in hits) / 6)
        assert ranking["MRR"] == pytest.approx(sum(1 / r for r in ranks) / 6)

        pairs = [
            (score, label)
            for scores, labels in zip(LOGITS, LABELS, strict=True)
            for score, label in zip(scores, labels, strict=True)
        ]
        positive = [s for s, y in pairs if y]
        negative = [s for s, y in pairs if not y]
        wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
        assert binary["AUC/click"] == pytest.approx(wins / len(positive) / len(negative))
        entropy = sum(math.log1p(math.exp(-s if y else s)) for s, y in pairs) / len(pairs)
        assert binary["NE/click"] == pytest.approx(entropy / math.log(2))


def test_without_a_group() -> None:
    metrics = RankMetrics([1])
    metrics.update(torch.tensor([1, 2]))
    assert metrics.compute()["HR@1"] == 0.5
    assert not dist.is_initialized()


@pytest.mark.parametrize("labels", [[], [1.0, 1.0]])
def test_one_class_is_not_a_number(labels: list[float]) -> None:
    metrics = BinaryMetrics(["click"])
    metrics.update(torch.zeros(len(labels), 1), torch.tensor(labels).view(-1, 1))
    result = metrics.compute()
    assert math.isnan(result["AUC/click"])
    assert math.isnan(result["NE/click"])
