"""From hidden rows to the loss of binary tasks on candidates.

A sum over this rank's labels, as `kernels.sampled_softmax` is. The caller divides by the *global*
count of labels, so that gradients do not depend on how rows are spread over ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def task_labels(labels: Tensor, num_tasks: int) -> Tensor:
    """Bitmasks int64 [n] -> float32 [n, num_tasks]; bit i is task i."""
    bits = torch.arange(num_tasks, device=labels.device)
    return ((labels[:, None] >> bits) & 1).float()


def binary_tasks_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of the tasks' mean binary cross entropy; logits [n, tasks], labels [n]."""
    targets = task_labels(labels, logits.shape[1])
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum")
    return loss / logits.shape[1]
