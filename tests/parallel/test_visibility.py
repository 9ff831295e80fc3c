"""Which positions each rank sees, and what a halo therefore moves."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings

from kernels.jagged import Jagged
from kernels.masks import semi_local_intervals
from kernels.naive import visible
from parallel.layout import LAYOUTS
from parallel.shard import Shard
from parallel.visibility import Visibility
from tests.kernels.cases import Case, cases

CPU = torch.device("cpu")


def make_shard(lengths: torch.Tensor, num_targets: torch.Tensor, layout: str, cp: int) -> Shard:
    parts = tuple(LAYOUTS[layout](cp).positions(lengths, r) for r in range(cp))
    return Shard(lengths, num_targets, parts, {}, None, 0, CPU)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(case=cases())
@settings(max_examples=50, deadline=None)
def test_seen_parts_are_the_union_of_what_queries_see(layout: str, case: Case) -> None:
    shard = make_shard(case.lengths, case.num_targets, layout, 3)
    seen = Visibility(shard, lambda queries, _, __: case.intervals(queries))
    whole = Jagged.whole(case.lengths)
    for part, got in zip(shard.parts, seen.seen_parts, strict=True):
        intervals = case.intervals(part)
        q_offsets, k_offsets, g_offsets = (x.offsets.tolist() for x in (part, whole, got))
        for b in range(len(case.lengths)):
            keys = whole.positions[k_offsets[b] : k_offsets[b + 1]]
            want = visible(intervals[q_offsets[b] : q_offsets[b + 1]], keys).any(0).nonzero()[:, 0]
            assert got.positions[g_offsets[b] : g_offsets[b + 1]].tolist() == want.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_halo_is_the_window_and_not_the_sequence(layout: str) -> None:
    """The ring sends 32,768 rows a rank; semi-local attention needs some 1,000 of them."""
    lengths = torch.tensor([65_536], dtype=torch.int32)
    shard = make_shard(lengths, torch.zeros_like(lengths), layout, 2)
    seen = Visibility(shard, partial(semi_local_intervals, local=1024, prefix=128))
    for part, needed in zip(shard.parts, seen.seen_parts, strict=True):
        foreign = (~torch.isin(needed.positions, part.positions)).sum()
        assert 0 <= foreign <= 0.05 * 32_768
