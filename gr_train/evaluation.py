"""Evaluation on held-out data: the full item set for retrieval, candidates for ranking."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from gr_train.config import Config
from gr_train.metrics import BinaryMetrics, RankMetrics
from gr_train.model.heads import task_labels
from gr_train.model.recommender import Recommender
from kernels.sampled_softmax import unit_rows
from parallel.batch import JaggedBatch
from parallel.shard import Shard

USERS = 8192  # scored at a time


@torch.no_grad()
def evaluate(
    model: Recommender,
    batches: Iterable[JaggedBatch],
    shard: Callable[[JaggedBatch], Shard],
    config: Config,
    world: dist.ProcessGroup | None,
) -> dict[str, float]:
    """Metric name -> value over all samples of all ranks. Collective: equal numbers of batches."""
    prepared = (model.prepare(shard(batch), last_only=True) for batch in batches)
    predicted = [model.predict(batch) for batch in prepared]
    if config.model.task == "ranking":
        binary = BinaryMetrics(model.info.tasks)
        for logits, labels, _ in predicted:
            binary.update(logits, task_labels(labels, len(model.info.tasks)))
        return binary.compute(world)
    users = unit_rows(torch.cat([hidden for hidden, _, _ in predicted]))
    labels = torch.cat([labels for _, labels, _ in predicted])
    targets = unit_rows(torch.cat([found for _, _, found in predicted if found is not None]))
    metrics = RankMetrics(config.eval.k)
    metrics.update(full_ranks(model, users, labels, targets, config.eval.item_chunk))
    return metrics.compute(world)


def full_ranks(
    model: Recommender, users: Tensor, labels: Tensor, targets: Tensor, chunk: int
) -> Tensor:
    """The rank of each label among all items: int64 [n], 1 is best.

    users, targets: unit rows [n, D] of the query and of its label; labels: int64 [n].
    Items come in chunks from the sharded table: memory does not grow with the vocabulary. Ties, and
    scores that are not a number, count against the model. In float32: half precision would tie.
    """
    target_scores = (users * targets).sum(-1, keepdim=True)
    ranks = torch.ones_like(labels)
    for first in range(0, model.info.num_items, chunk):
        last = min(first + chunk, model.info.num_items)
        items = torch.arange(first, last)
        embeddings = unit_rows(model.item_embeddings(items, labels.device))
        items = items.to(labels.device)
        for some in torch.arange(len(users), device=labels.device).split(USERS):
            scores = users[some] @ embeddings.T
            not_worse = ~(scores < target_scores[some]) & (items != labels[some, None])
            ranks[some] += not_worse.sum(1)
    return ranks


def popularity_metrics(
    counts: Tensor,
    batches: Iterable[JaggedBatch],
    cutoffs: list[int],
    world: dist.ProcessGroup | None,
) -> dict[str, float]:
    """The baseline: every user is recommended the items that occur most often in training.

    counts: int64 [items] of this rank's share of the training data; summed over ranks here.
    batches: this rank's evaluation batches of whole sequences; the held-out item is a sequence's
    last label. Collective.
    """
    counts = counts.clone()
    if world is not None:
        dist.all_reduce(counts, group=world)
    # Position in the order of falling popularity; ties go to the lower id.
    order = torch.argsort(counts, descending=True, stable=True)
    rank_of = torch.empty_like(order)
    rank_of[order] = torch.arange(1, len(order) + 1)
    metrics = RankMetrics(cutoffs)
    for batch in batches:
        ends = batch.lengths.cumsum(0)[batch.lengths > 0] - 1
        metrics.update(rank_of[batch.tokens["label"][ends]])
    return metrics.compute(world)
