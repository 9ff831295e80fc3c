"""Spans against the points they cover."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.spans import alone, overlap


def covered(spans: torch.Tensor) -> list[int]:
    """How many spans cover each point."""
    return [int(((spans[:, 0] <= x) & (x < spans[:, 1])).sum()) for x in range(40)]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=8), st.sampled_from([1, 2])
)
def test_where_spans_lie_over_each_other(given: list[tuple[int, int]], times: int) -> None:
    spans = torch.tensor([(a, a + n) for a, n in given], dtype=torch.int64).view(-1, 2)
    depth = covered(spans)
    both, single = overlap(spans, times), alone(spans)
    assert covered(both) == [int(n >= times) for n in depth]
    assert covered(single) == [int(n == 1) for n in depth]
    for found in both, single:
        assert bool((found[:, 0] < found[:, 1]).all())
        assert bool((found[1:, 0] >= found[:-1, 1]).all())
