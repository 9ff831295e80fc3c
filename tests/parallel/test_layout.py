"""Layouts: every position once, equal shares, equal causal work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.masks import hstu_intervals, interval_lengths
from parallel.layout import LAYOUTS, STRIPE, ZigzagLayout
from parallel.whole import CUT

lengths_strategy = st.lists(
    st.one_of(st.integers(0, 20), st.integers(0, 9000)), min_size=0, max_size=30
)


@pytest.mark.parametrize("name", LAYOUTS)
@given(lengths=lengths_strategy, cp=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_every_position_has_one_owner(name: str, lengths: list[int], cp: int) -> None:
    layout = LAYOUTS[name](cp)
    tensor = torch.tensor(lengths, dtype=torch.int32)
    seen = []
    for part in layout.parts(tensor):
        assert part.max_length == max([0, *part.lengths().tolist()])
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
    counts = torch.stack([part.lengths() for part in layout.parts(tensor)])
    if lengths:
        assert int((counts.amax(0) - counts.amin(0)).max()) <= 1, "of one sequence"
    totals = counts.sum(1)
    assert int(totals.max() - totals.min()) <= 1, "of the batch"


@pytest.mark.parametrize("name", LAYOUTS)
@given(lengths=lengths_strategy, cp=st.integers(1, 9), data=st.data())
@settings(max_examples=100, deadline=None)
def test_spans_of_some_sequences(name: str, lengths: list[int], cp: int, data) -> None:
    layout = LAYOUTS[name](cp)
    tensor = torch.tensor(lengths, dtype=torch.int64)
    chosen = [b for b in range(len(lengths)) if data.draw(st.booleans())]
    owners = torch.tensor([data.draw(st.integers(CUT, cp - 1)) for _ in lengths], dtype=torch.int64)
    before = tensor.cumsum(0) - tensor
    sequence, starts, sizes = layout.spans(tensor[chosen], before[chosen], owners[chosen])
    parts = layout.parts(tensor, owners)
    rows = torch.stack([part.lengths() for part in parts])
    for b, owner in enumerate(owners.tolist()):
        assert owner == CUT or rows[owner, b] == rows[:, b].sum() == lengths[b]
    for rank, part in enumerate(parts):
        got: list[list[int]] = [[] for _ in chosen]
        blocks = zip(sequence.tolist(), starts[rank].tolist(), sizes[rank].tolist(), strict=True)
        for b, *chunks in blocks:
            got[b] += [
                p for start, size in zip(*chunks, strict=True) for p in range(start, start + size)
            ]
        of_all = part.positions.split(part.lengths().tolist())
        assert got == [of_all[b].tolist() for b in chosen]


def test_zigzag_balances_causal_work() -> None:
    lengths = torch.tensor([10_000, 7, 3_333, 1, 0, 64_000], dtype=torch.int32)
    none = torch.zeros_like(lengths)
    layout = ZigzagLayout(8)
    work = torch.stack(
        [
            interval_lengths(hstu_intervals(part, lengths, none)).sum()
            for part in layout.parts(lengths)
        ]
    ).double()
    assert float(work.max() / work.mean()) < 1.001


def test_zigzag_of_less_than_a_block() -> None:
    lengths = torch.tensor([12], dtype=torch.int32)
    layout = ZigzagLayout(3)
    got = [part.positions.tolist() for part in layout.parts(lengths)]
    assert got == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


def test_zigzag_of_a_long_sequence_is_stripes() -> None:
    lengths = torch.tensor([5, 4 * STRIPE + 4], dtype=torch.int32)
    layout = ZigzagLayout(2)
    stripes = torch.arange(4 * STRIPE).view(4, STRIPE)
    for rank, (mine, rest) in enumerate([([0, 3], [0, 3]), ([1, 2], [1, 2])]):
        got = layout.parts(lengths)[rank].positions.split([3 - rank, 2 * STRIPE + 2])[1]
        want = torch.cat([stripes[mine].flatten(), torch.tensor(rest) + 4 * STRIPE])
        assert got.tolist() == want.tolist()


def test_zigzag_balances_the_work_against_every_rank() -> None:
    """Of each step of a ring, not only of all together; no step is all heavy rows."""
    lengths = torch.tensor([64_000], dtype=torch.int32)
    positions = [part.positions for part in ZigzagLayout(4).parts(lengths)]
    for queries in positions:
        for keys in positions:
            seen = torch.searchsorted(keys, queries, right=True).double()  # by each row
            assert float(seen.mean()) == pytest.approx(64_000 / 4 / 2, rel=0.02)
            assert float((seen < seen.max() / 4).double().mean()) == pytest.approx(0.25, abs=0.02)
