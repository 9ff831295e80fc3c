"""Random jagged batches and masks for the kernel tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels.jagged import Jagged
from kernels.masks import hstu_intervals, semi_local_intervals
from kernels.naive import visible


@dataclass(frozen=True)
class Case:
    """One batch's lengths and one mask over it."""

    lengths: Tensor
    num_targets: Tensor
    num_contextual: int
    window: int = 0
    full_suffix: int = 0
    local: int = 0  # > 0: semi-local
    prefix: int = 0
    behind: int = 0  # so far behind the last key ends that reach it

    def intervals(self, queries: Jagged) -> Tensor:
        return self.mask(queries, self.lengths, self.num_targets)

    def mask(self, queries: Jagged, lengths: Tensor, num_targets: Tensor) -> Tensor:
        """The mask over another batch."""
        whole = (queries, lengths, num_targets)
        if self.local:
            intervals = semi_local_intervals(
                *whole, num_contextual=self.num_contextual, local=self.local, prefix=self.prefix
            )
        else:
            intervals = hstu_intervals(
                *whole,
                num_contextual=self.num_contextual,
                window=self.window,
                full_suffix=self.full_suffix,
            )
        starts, ends = intervals.view(-1, 2, 2).unbind(-1)
        reach = (ends >= lengths[queries.sequence_ids()][:, None]) & (starts < ends)
        return torch.stack([starts, ends + self.behind * reach.int()], -1).view(-1, 4)


@st.composite
def cases(draw: st.DrawFn, max_length: int = 40, max_sequences: int = 5) -> Case:
    contextual = draw(st.integers(0, 4))
    lengths, targets = [], []
    for _ in range(draw(st.integers(0, max_sequences))):
        target = draw(st.integers(0, 5))
        history = draw(st.one_of(st.just(0), st.just(1), st.integers(0, max_length)))
        lengths.append(0 if history == 0 and draw(st.booleans()) else contextual + history + target)
        targets.append(target if lengths[-1] else 0)
    semi_local = draw(st.booleans())
    return Case(
        lengths=torch.tensor(lengths, dtype=torch.int32),
        num_targets=torch.tensor(targets, dtype=torch.int32),
        num_contextual=contextual,
        window=draw(st.sampled_from([0, 1, 2, 7, 100])),
        full_suffix=draw(st.sampled_from([0, 1, 3, 100])),
        local=draw(st.integers(1, 12)) if semi_local else 0,
        prefix=draw(st.integers(0, 10)),
        behind=draw(st.sampled_from([0, 1, 1000])),
    )


def part_of(whole: Jagged, keep: Tensor) -> Jagged:
    """The rows for which `keep`, bool [T], says so."""
    counts = torch.zeros(whole.num_sequences, dtype=torch.int32, device=keep.device)
    counts.index_add_(0, whole.sequence_ids(), keep.to(torch.int32))
    return Jagged(Jagged.whole(counts).offsets, whole.positions[keep])


def any_intervals(seed: int) -> tuple[Jagged, Tensor]:
    """Unlike any mask of ours: random ends, rows that see nothing, more runs than a plan has room
    for."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 150, (2,), generator=generator, dtype=torch.int32)
    lengths[0] += 1
    whole = Jagged.whole(lengths)
    size = int(torch.randint(1, 20, (), generator=generator))
    ends = torch.rand(whole.num_rows // size + 1, 4, generator=generator).sort(-1).values
    ends = ends.repeat_interleave(size, 0)[: whole.num_rows]
    ends = ends * (lengths[whole.sequence_ids()][:, None] + 1)
    intervals = ends.to(torch.int32)
    intervals[torch.rand(whole.num_rows, generator=generator) < 0.1] = 0
    return whole, intervals


def visible_pairs(queries: Jagged, keys: Jagged, intervals: Tensor) -> Tensor:
    """bool [Tq, Tk]: of all sequences."""
    same = queries.sequence_ids()[:, None] == keys.sequence_ids()[None]
    return same & visible(intervals, keys.positions)
