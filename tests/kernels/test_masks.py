"""Interval masks against the rules as DESIGN states them, pair by pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from kernels.jagged import Jagged
from kernels.masks import hstu_intervals, interval_lengths
from kernels.naive import visible
from tests.kernels.cases import Case, cases, part_of


def hstu_sees(case: Case, n: int, t: int, p: int, j: int) -> bool:
    """The HSTU rule for one pair of positions, transcribed."""
    history = n - t
    c = min(case.num_contextual, history)
    shift = max(c - 1, 0)
    last = history - shift

    def token_id(x: int) -> int:
        return min(max(x - shift, 0), last)

    if c > 0 and token_id(p) == 0 and j < history:
        return True
    if p == j:
        return True
    if token_id(p) <= token_id(j):
        return False
    exempt = case.full_suffix > 0 and token_id(p) >= last - case.full_suffix
    return case.window == 0 or exempt or token_id(p) - token_id(j) <= case.window


def semi_local_sees(case: Case, n: int, t: int, p: int, j: int) -> bool:
    history = n - t
    c = min(case.num_contextual, history)
    if p < c:
        return j < history
    if p >= history:
        return j < history or j == p
    return j <= p and (j < max(case.prefix, c) or j > p - case.local)


@given(cases())
@settings(max_examples=200, deadline=None)
def test_intervals_state_the_rule(case: Case) -> None:
    whole = Jagged.whole(case.lengths)
    intervals = case.intervals(whole)
    sees = semi_local_sees if case.local else hstu_sees
    offsets = whole.offsets.tolist()
    for b, (n, t) in enumerate(zip(case.lengths.tolist(), case.num_targets.tolist(), strict=True)):
        got = visible(intervals[offsets[b] : offsets[b + 1]], torch.arange(n))
        want = [[sees(case, n, t, p, j) for j in range(n)] for p in range(n)]
        assert got.tolist() == want


@given(cases())
@settings(max_examples=100, deadline=None)
def test_intervals_are_disjoint_and_in_range(case: Case) -> None:
    whole = Jagged.whole(case.lengths)
    a0, a1, b0, b1 = case.intervals(whole).unbind(-1)
    length = case.lengths[whole.sequence_ids()]
    for low, high in ((a0, a1), (b0, b1)):
        assert bool(((low >= 0) & (low <= high) & (high <= length + case.behind)).all())
    both = (a1 > a0) & (b1 > b0)
    assert bool((a1 <= b0)[both].all())


@given(cases())
@settings(max_examples=50, deadline=None)
def test_intervals_of_a_subset_of_positions(case: Case) -> None:
    """A rank that holds every third position computes the same rows as the whole does."""
    whole = Jagged.whole(case.lengths)
    keep = whole.positions % 3 == 1
    assert torch.equal(case.intervals(part_of(whole, keep)), case.intervals(whole)[keep])


def test_causal_cost_is_the_triangle() -> None:
    lengths = torch.tensor([7], dtype=torch.int32)
    intervals = hstu_intervals(Jagged.whole(lengths), lengths, torch.zeros_like(lengths))
    assert interval_lengths(intervals).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_lengths_are_not_negative() -> None:
    with pytest.raises(ValueError, match="got -3"):
        Jagged.whole(torch.tensor([-3, 5]))
