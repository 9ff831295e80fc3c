"""Made-up samples of chosen lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gr_train.data.sample import DatasetInfo, Sample

INFO = DatasetInfo(
    num_items=50, num_actions=4, contextual={"country": 3, "device": 5}, tasks=["click", "like"]
)


def make_samples(
    events: Sequence[int], candidates: Sequence[int], *, num_contextual: int
) -> list[Sample]:
    """One sample per entry: that many events and that many candidates."""
    random = np.random.default_rng(0)
    return [
        Sample(
            contextual=random.integers(0, 3, num_contextual),
            items=random.integers(0, INFO.num_items, n),
            actions=random.integers(0, INFO.num_actions, n),
            timestamps=np.cumsum(random.integers(0, 10_000, n)),
            candidates=random.integers(0, INFO.num_items, t),
            candidate_labels=random.integers(0, 4, t),
            request_time=10**9,
        )
        for n, t in zip(events, candidates, strict=True)
    ]
