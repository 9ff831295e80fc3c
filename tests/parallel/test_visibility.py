"""Which positions each rank sees, and what a halo therefore moves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings

from kernels.jagged import Jagged
from kernels.masks import semi_local_intervals
from kernels.naive import visible
from parallel.layout import LAYOUTS
from parallel.links import Links
from parallel.send_receive import SendReceive
from parallel.shard import Shard
from parallel.visibility import Visibility
from tests.kernels.cases import Case, cases

CPU = torch.device("cpu")


def make_shard(lengths: torch.Tensor, num_targets: torch.Tensor, layout: str, cp: int) -> Shard:
    parts = LAYOUTS[layout](cp).parts(lengths)
    return Shard(lengths, num_targets, parts, {}, None, 0, CPU)


def seen_by_rows(case: Case, part: Jagged) -> list[list[int]]:
    """Of each sequence the positions that any row of `part` sees, asking every row."""
    intervals = case.intervals(part)
    rows = part.offsets.tolist()
    return [
        visible(intervals[rows[b] : rows[b + 1]], torch.arange(n)).any(0).nonzero()[:, 0].tolist()
        for b, n in enumerate(case.lengths.tolist())
    ]


def positions(part: Jagged) -> list[list[int]]:
    return [x.tolist() for x in part.positions.split(part.lengths().tolist())]


@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_ends_of_spans_tell_what_every_row_sees(layout: str, cp: int, case: Case) -> None:
    shard = make_shard(case.lengths, case.num_targets, layout, cp)
    seen = Visibility(shard, case.mask)
    for rank, part in enumerate(shard.parts):
        assert positions(seen.line.jagged(seen.held, rank, CPU)) == positions(part)
        wanted = seen_by_rows(case, part)
        assert positions(seen.line.jagged(seen.seen, rank, CPU)) == wanted
        for owner, held in enumerate(shard.parts):
            both = zip(wanted, positions(held), strict=True)
            assert seen.meets[rank][owner] == any(set(a) & set(b) for a, b in both)
            assert seen.met_by[owner][rank] == seen.meets[rank][owner]
        count = part.num_rows if rank == shard.rank else shard.num_shared[rank]
        assert torch.equal(seen.all_intervals[rank], case.intervals(part)[:count])


def test_a_halo_is_the_window_and_not_the_sequence() -> None:
    """The ring sends 32,768 rows a rank; semi-local attention needs some 1,000 of them."""
    lengths = torch.tensor([65_536], dtype=torch.int32)
    shard = make_shard(lengths, torch.zeros_like(lengths), "contiguous", 2)
    seen = Visibility(shard, partial(semi_local_intervals, local=1024, prefix=128))
    for rank, part in enumerate(shard.parts):
        needed = seen.line.jagged(seen.seen, rank, CPU)
        foreign = (~torch.isin(needed.positions, part.positions)).sum()
        assert 0 <= foreign <= 0.05 * 32_768


def test_tokens_that_see_all_of_it_do_not_ask_for_a_sequence() -> None:
    """Contextual tokens and targets visit the rank whose keys they see, which sees a window."""
    lengths, num_targets = torch.tensor([[65_536], [3]], dtype=torch.int32)
    mask = partial(semi_local_intervals, num_contextual=2, local=1024, prefix=128)
    for rank, (keys, queries) in enumerate([(0, 3), (1023 + 128, 2)]):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 2)
        links = Links(SendReceive(group, CPU, None))  # type: ignore[arg-type]
        shard = make_shard(lengths, num_targets, "contiguous", 2)
        halo = Visibility(replace(shard, rank=rank, links=links), mask, num_contextual=2).halo
        assert halo.wide is not None
        assert halo.keys.guests.num_rows == keys
        assert halo.wide.visit.guests.num_rows == queries
