"""Which sequences stay whole: as many as leave ranks with equal work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.whole import CUT, PRICE, owners


def shares(lengths: torch.Tensor, owner: torch.Tensor, ranks: int) -> torch.Tensor:
    """Tokens and squares of each rank, over the mean: [ranks, 2]."""
    work = torch.stack([lengths, lengths**2], 1).double()
    cut = work[owner == CUT].sum(0) / ranks
    of_ranks = torch.stack([work[owner == rank].sum(0) + cut for rank in range(ranks)])
    return of_ranks / of_ranks.mean(0).clamp(min=1)


@given(
    lengths=st.lists(st.one_of(st.integers(0, 20), st.integers(0, 60_000)), max_size=40),
    ranks=st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_ranks_stay_equal(lengths: list[int], ranks: int) -> None:
    """No worse than paying for the cut of all."""
    of_group = torch.tensor(lengths, dtype=torch.int64)
    owner = owners(of_group[None], ranks)[0]
    assert owner.shape == of_group.shape
    assert bool(((owner == CUT) | (owner >= 0) & (owner < ranks)).all())
    assert float(shares(of_group, owner, ranks).max()) <= 1 + PRICE + 1e-9


@pytest.mark.parametrize("longest", [9000, 3])
@pytest.mark.parametrize("count", [3, 33, 150])
def test_groups_do_not_depend_on_each_other(count: int, longest: int) -> None:
    """Nor on how many sequences others have: each rank asks for its own choice of groups."""
    torch.manual_seed(count)
    lengths = torch.randint(0, longest, (5, count)) * (torch.rand(5, count) < 0.8)
    lengths[0, 0] = 20 * longest
    together = owners(torch.nn.functional.pad(lengths, (0, 90)), 4)[:, :count]
    for group in range(5):
        assert torch.equal(together[group], owners(lengths[group : group + 1], 4)[0])


@pytest.mark.parametrize(
    ("lengths", "cut"),
    [
        ([16_000] * 4, []),
        ([16_000] * 3, [16_000]),  # of two ranks, one would have two
        # The huge one, and a few with it that would not fit.
        ([60_000, *range(100, 200)], [60_000, 199, 198, 197, 100]),
        ([60_000], [60_000]),
        ([], []),
    ],
)
def test_what_is_cut(lengths: list[int], cut: list[int]) -> None:
    of_group = torch.tensor(lengths, dtype=torch.int64)
    owner = owners(of_group[None], 2)[0]
    assert sorted(of_group[owner == CUT].tolist(), reverse=True) == cut
