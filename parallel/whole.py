"""Which sequences of a cp group stay whole on one rank: a cut one costs messages, a whole one none.

Where a group has many sequences, equal work for its ranks does not take cutting all of them. In
order of length, as many at a time as there are ranks are dealt one to each, the longest to the rank
with the least work. Sequences that differ much from those they are dealt with, such as one huge
among many tiny, would leave ranks unequal: these are cut instead, as many as pay.
"""

from __future__ import annotations

import torch
from torch import Tensor

CUT = -1
PRICE = 0.05  # of a cut sequence's work: what attention over a ring was measured to lose, at most
FEW = 16  # so many dealt sets, or a power of two of them, are tried to be cut


def owners(lengths: Tensor, ranks: int) -> Tensor:
    """The rank that holds a sequence whole, or CUT: lengths int64 [groups, B] -> int64 [groups, B].

    Of groups with fewer than B sequences the rest have length 0. Even are tokens (memory, matrix
    products) and squares of lengths (attention), and what lies between, as windows do, nearly so.
    The same everywhere for the same lengths: sums are of integers; ties go to the lower index and
    rank.
    """
    groups, count = lengths.shape
    sets = -(-count // ranks)
    padded = torch.nn.functional.pad(lengths, (0, sets * ranks - count))
    sizes, order = padded.sort(descending=True, stable=True)
    work = torch.stack([sizes, sizes**2], -1).view(groups, sets, ranks, 2)
    total = work.sum((1, 2)).clamp_(min=1).double()[:, None]  # [groups, 1, 2]

    tries = torch.tensor([n for n in range(sets + 1) if n <= FEW or n == sets or not n & (n - 1)])
    unlike = work[:, :, 0, 1] - work[:, :, -1, 1]
    place = unlike.argsort(stable=True, dim=-1, descending=True).argsort()
    cut = place[:, None] < tries[:, None]  # [groups, tries, sets]
    of_cut = (work.sum(2)[:, None] * cut[..., None]).sum(2)  # [groups, tries, 2]
    load = of_cut[:, :, None].repeat(1, 1, ranks, 1)  # of each rank, times their number
    rank = torch.empty(groups, len(tries), sets, ranks, dtype=torch.int64)
    for i in range(sets):
        least = load[..., 1].argsort(stable=True, dim=-1)
        rank[:, :, i] = least
        dealt = ranks * work[:, None, i] * ~cut[:, :, i, None, None]
        load.scatter_add_(2, least[..., None].expand_as(dealt), dealt)
    slowest = (load.amax(2) / total).amax(-1)
    best = (slowest + PRICE * of_cut[..., 1] / total[..., 1]).argmin(1)

    chosen = torch.arange(groups), best
    found = torch.where(cut[chosen][..., None], CUT, rank[chosen]).flatten(1)
    return torch.empty_like(found).scatter_(1, order, found)[:, :count]
