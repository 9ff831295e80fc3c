"""Layouts: every position once, equal shares, equal causal work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.masks import hstu_intervals, interval_lengths
from parallel.layout import LAYOUTS, ZigzagLayout

lengths_strategy = st.lists(
    st.one_of(st.integers(0, 20), st.integers(0, 3000)), min_size=0, max_size=30
)


@pytest.mark.parametrize("name", LAYOUTS)
@given(lengths=lengths_strategy, cp=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_every_position_has_one_owner(name: str, lengths: list[int], cp: int) -> None:
    layout = LAYOUTS[name](cp)
    tensor = torch.tensor(lengths, dtype=torch.int32)
    seen = []
    for rank in range(cp):
        part = layout.positions(tensor, rank)
        sequence = part.sequence_ids()
        inside = sequence[1:] == sequence[:-1]
        assert bool((part.positions.diff()[inside] > 0).all()), "positions rise in a sequence"
        seen += list(zip(sequence.tolist(), part.positions.tolist(), strict=True))
    want = [(b, p) for b, n in enumerate(lengths) for p in range(n)]
    assert sorted(seen) == want


@pytest.mark.parametrize("name", LAYOUTS)
@given(lengths=lengths_strategy, cp=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_token_counts_are_balanced(name: str, lengths: list[int], cp: int) -> None:
    layout = LAYOUTS[name](cp)
    tensor = torch.tensor(lengths, dtype=torch.int32)
    counts = torch.stack([layout.positions(tensor, r).lengths() for r in range(cp)])
    if lengths:
        assert int((counts.amax(0) - counts.amin(0)).max()) <= 1, "of one sequence"
    totals = counts.sum(1)
    assert int(totals.max() - totals.min()) <= 1, "of the batch"


def test_zigzag_balances_causal_work() -> None:
    lengths = torch.tensor([10_000, 7, 3_333, 1, 0, 64_000], dtype=torch.int32)
    none = torch.zeros_like(lengths)
    layout = ZigzagLayout(8)
    work = torch.stack(
        [
            interval_lengths(hstu_intervals(layout.positions(lengths, r), lengths, none)).sum()
            for r in range(8)
        ]
    ).double()
    assert float(work.max() / work.mean()) < 1.001


def test_zigzag_of_one_long_sequence() -> None:
    lengths = torch.tensor([12], dtype=torch.int32)
    layout = ZigzagLayout(3)
    got = [layout.positions(lengths, r).positions.tolist() for r in range(3)]
    assert got == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
