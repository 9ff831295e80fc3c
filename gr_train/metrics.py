"""Metrics as sums over samples, exact however samples are spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.classification import BinaryAUROC


class RankMetrics:
    """HR@k, NDCG@k and MRR from the rank (1 is best) of each held-out item.

    With one relevant item, NDCG@k is 1 / log2(1 + rank) if rank <= k, else 0.
    """

    def __init__(self, cutoffs: Sequence[int]) -> None:
        self.cutoffs = list(cutoffs)
        self.sums = torch.zeros(2 * len(self.cutoffs) + 2, dtype=torch.float64)

    def update(self, ranks: Tensor) -> None:
        """ranks: int64 [n]."""
        ranks = ranks.cpu().double()
        gain = 1 / torch.log2(1 + ranks)
        values = [torch.ones_like(ranks), 1 / ranks]
        for k in self.cutoffs:
            values += [(ranks <= k).double(), gain * (ranks <= k)]
        self.sums += torch.stack(values).sum(1)

    def compute(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Means over all samples of all ranks of the group; collective."""
        sums = _sum_over(self.sums, group)
        count = max(float(sums[0]), 1.0)
        result = {}
        for i, k in enumerate(self.cutoffs):
            result[f"HR@{k}"] = float(sums[2 + 2 * i]) / count
            result[f"NDCG@{k}"] = float(sums[3 + 2 * i]) / count
        return {**result, "MRR": float(sums[1]) / count, "samples": float(sums[0])}


class BinaryMetrics:
    """Per task: AUC, and normalised entropy (cross entropy over that of the base rate).

    AUC is exact, so scores of all labels are kept until `compute`. Both are nan for a task whose
    labels are all alike.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = list(tasks)
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """logits, labels (0 or 1): [n, tasks]."""
        self.logits.append(logits.double().cpu())
        self.labels.append(labels.double().cpu())

    def compute(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Over all samples of all ranks of the group; collective."""
        none = torch.zeros(0, len(self.tasks), dtype=torch.float64)
        both = torch.stack([torch.cat([none, *x]) for x in (self.logits, self.labels)])
        logits, labels = _concat_over(both, group)
        result = {}
        for i, task in enumerate(self.tasks):
            score, label = logits[:, i], labels[:, i]
            base = label.mean()
            if not 0 < base < 1:  # without labels of both classes, neither is defined
                result[f"AUC/{task}"] = result[f"NE/{task}"] = float("nan")
                continue
            auroc = BinaryAUROC(sync_on_compute=False)
            auroc.update(score, label.long())
            entropy = torch.nn.functional.binary_cross_entropy_with_logits(score, label)
            base_entropy = -(torch.xlogy(base, base) + torch.xlogy(1 - base, 1 - base))
            result[f"AUC/{task}"] = float(auroc.compute())
            result[f"NE/{task}"] = float(entropy / base_entropy)
        return {**result, "samples": float(len(labels))}


def _sum_over(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    x = x.clone()
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def _concat_over(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate along dim 1, of which each rank may hold a different amount."""
    if group is None or group.size() == 1:
        return x
    pieces: list[Tensor] = [torch.empty(0)] * group.size()
    dist.all_gather_object(pieces, x, group=group)
    return torch.cat(pieces, 1)
