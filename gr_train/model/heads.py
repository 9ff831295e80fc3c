"""From hidden rows to losses: sampled softmax over items, binary tasks on candidates.

Losses are sums over this rank's labels. The caller divides by the *global* count of labels, so that
gradients do not depend on how rows are spread over ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gr_train.model.inputs import unit_rows

LOGITS = 1 << 26  # in memory at a time


def sampled_softmax_loss(
    hidden: Tensor,
    labels: Tensor,
    label_embeddings: Tensor,
    negatives: Tensor,
    negative_embeddings: Tensor,
    temperature: float,
) -> Tensor:
    """Sum of -log p(label) among the label and the shared negatives; cosine over temperature.

    hidden, label_embeddings: [n, D]; labels: int64 [n]; negatives: int64 [M];
    negative_embeddings: [M, D]. A negative that is a row's label does not compete in that row.
    Many rows are taken so many at a time, and their logits computed again in the backward pass:
    else these would be the fullest moment of a step.
    """
    alike = (negatives, unit_rows(negative_embeddings), temperature)
    most = max(1, LOGITS // (len(negatives) + 1))
    pieces = [x.split(most) for x in (hidden, labels, label_embeddings)]
    if len(pieces[0]) == 1:
        return _sampled_softmax_loss(hidden, labels, label_embeddings, *alike)
    losses = [
        checkpoint(
            _sampled_softmax_loss, *rows, *alike, use_reentrant=False, preserve_rng_state=False
        )
        for rows in zip(*pieces, strict=True)
    ]
    return torch.stack(losses).sum()


def _sampled_softmax_loss(
    hidden: Tensor,
    labels: Tensor,
    label_embeddings: Tensor,
    negatives: Tensor,
    unit_negatives: Tensor,
    temperature: float,
) -> Tensor:
    hidden, label_embeddings = unit_rows(hidden, 1 / temperature), unit_rows(label_embeddings)
    positive = (hidden * label_embeddings).sum(-1, keepdim=True)
    negative = hidden @ unit_negatives.T
    negative = negative.masked_fill_(labels[:, None] == negatives, -torch.inf)
    logits = torch.cat([positive, negative], 1)
    first = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
    return F.cross_entropy(logits, first, reduction="sum")


def task_labels(labels: Tensor, num_tasks: int) -> Tensor:
    """Bitmasks int64 [n] -> float32 [n, num_tasks]; bit i is task i."""
    bits = torch.arange(num_tasks, device=labels.device)
    return ((labels[:, None] >> bits) & 1).float()


def binary_tasks_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of the tasks' mean binary cross entropy; logits [n, tasks], labels [n]."""
    targets = task_labels(labels, logits.shape[1])
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum")
    return loss / logits.shape[1]
