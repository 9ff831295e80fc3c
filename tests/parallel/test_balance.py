"""Dealing sequences to dp groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.balance import deal


@given(costs=st.lists(st.integers(0, 10_000), max_size=60), groups=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_no_group_is_far_over_its_share(costs: list[int], groups: int) -> None:
    tensor = torch.tensor(costs, dtype=torch.float64)
    dealt = deal(tensor, groups)
    assert dealt.shape == tensor.shape
    work = torch.zeros(groups, dtype=torch.float64).index_add_(0, dealt, tensor)
    if costs:  # Graham's bound for any greedy order
        bound = sum(costs) / groups + max(costs) * (1 - 1 / groups)
        assert float(work.max()) <= bound + 1e-9


def test_one_huge_among_many_tiny() -> None:
    costs = torch.tensor([1.0] * 99 + [1000.0])
    dealt = deal(costs, 4)
    assert int((dealt == dealt[-1]).sum()) == 1, "the huge one has a group of its own"
    assert torch.bincount(dealt).sort().values.tolist() == [1, 33, 33, 33]


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_groups=0"):
        deal(torch.ones(3), 0)
