"""Deal the sequences of a global batch to dp groups so that every group has the same work.

The groups of a step wait for the slowest. Within a group, layouts and `whole.py` even out the work.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


def deal(costs: Tensor, num_groups: int) -> Tensor:
    """The group of each sequence: costs [N], not negative -> int64 [N].

    Heaviest first, each to the group with the least work so far: the slowest group is at most a
    third over the best possible (Graham 1969), and close to it when no sequence is larger than a
    group's share. The same everywhere for the same costs; ties go to the lower index and group.
    """
    if num_groups < 1:
        raise ValueError(f"num_groups={num_groups}: want at least 1")
    groups = torch.empty(costs.numel(), dtype=torch.int64)
    load = [(0.0, group) for group in range(num_groups)]
    order = torch.argsort(costs.double(), descending=True, stable=True).tolist()
    amounts = costs.tolist()
    for index in order:
        work, group = load[0]
        groups[index] = group
        heapq.heapreplace(load, (work + amounts[index], group))
    return groups
