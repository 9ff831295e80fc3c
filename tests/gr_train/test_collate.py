"""Collation against a slow twin that appends token by token, and its edge cases."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_train.data.collate import FEATURES, collate
from gr_train.data.sample import Sample


def make_sample(rng: np.random.Generator, num_events: int, contextual: int, targets: int) -> Sample:
    times = 1_000_000 + np.cumsum(rng.integers(0, 100, num_events))
    last = int(times[-1]) if num_events else 1_000_000
    return Sample(
        contextual=rng.integers(0, 5, contextual),
        items=rng.integers(0, 50, num_events),
        actions=rng.integers(0, 7, num_events),
        timestamps=times,
        candidates=rng.integers(0, 50, targets),
        candidate_labels=rng.integers(0, 4, targets),
        request_time=last + int(rng.integers(-5, 100)),
    )


def expected_rows(s: Sample, task: str, style: str, max_length: int) -> list[tuple[int, ...]]:
    """(id, action, gap, label) per token, one at a time."""
    if (len(s.items) < 2) if task == "retrieval" else (len(s.candidates) == 0):
        return []
    contextual = [(int(x), 0, 0, -1) for x in s.contextual]
    events: list[list[tuple[int, ...]]] = []
    for i in range(len(s.items) - (task == "retrieval")):
        gap = int(s.timestamps[i] - s.timestamps[i - 1]) if i else 0
        label = int(s.items[i + 1]) if task == "retrieval" else -1
        item, action = int(s.items[i]), int(s.actions[i])
        if style == "merged":
            events.append([(item, action, gap, label)])
        else:
            events.append([(item, 0, gap, -1), (action, 0, gap, label)])
    targets: list[tuple[int, ...]] = []
    if task == "ranking":
        gap = max(s.request_time - int(s.timestamps[-1]), 0) if len(s.timestamps) else 0
        targets = [
            (int(c), 0, gap, int(y)) for c, y in zip(s.candidates, s.candidate_labels, strict=True)
        ]
    while events and len(contextual) + sum(map(len, events)) + len(targets) > max_length:
        del events[0]
    return contextual + [token for event in events for token in event] + targets


@given(
    events=st.lists(st.integers(0, 12), max_size=4),
    contextual=st.integers(0, 3),
    targets=st.integers(0, 4),
    room=st.integers(0, 30),
    task=st.sampled_from(["retrieval", "ranking"]),
    style=st.sampled_from(["merged", "interleaved"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_equals_the_slow_twin(events, contextual, targets, room, task, style, seed):
    rng = np.random.default_rng(seed)
    samples = [make_sample(rng, n, contextual, targets) for n in events]
    max_length = contextual + (targets if task == "ranking" else 0) + 2 + room
    batch = collate(
        samples, task=task, style=style, num_contextual=contextual, max_length=max_length
    )
    wanted = [expected_rows(s, task, style, max_length) for s in samples]
    assert batch.lengths.tolist() == [len(rows) for rows in wanted]
    assert max(batch.lengths.tolist(), default=0) <= max_length
    assert batch.num_targets.tolist() == [targets if task == "ranking" else 0] * len(events)
    got = list(zip(*(batch.tokens[name].tolist() for name in FEATURES), strict=True))
    assert got == [row for rows in wanted for row in rows]


def test_batch_without_sequences():
    batch = collate([], task="ranking", style="merged", num_contextual=2, max_length=5)
    assert batch.lengths.shape == batch.num_targets.shape == (0,)
    assert batch.num_tokens == 0


def test_one_event_has_no_next_item_and_so_no_tokens():
    sample = make_sample(np.random.default_rng(0), 1, contextual=2, targets=0)
    batch = collate([sample], task="retrieval", style="merged", num_contextual=2, max_length=9)
    assert batch.lengths.tolist() == [0]


def test_truncation_keeps_the_gap_of_the_first_event_kept():
    sample = make_sample(np.random.default_rng(0), 6, contextual=0, targets=0)
    batch = collate([sample], task="retrieval", style="merged", num_contextual=0, max_length=2)
    assert batch.tokens["gap"].tolist() == np.diff(sample.timestamps)[2:4].tolist()
    assert batch.tokens["label"].tolist() == sample.items[-2:].tolist()


@pytest.mark.parametrize(
    ("task", "targets", "style", "wanted"),
    [
        ("ranking", 4, "merged", 7),
        ("ranking", 4, "interleaved", 8),
        ("retrieval", 0, "interleaved", 4),
    ],
)
def test_max_length_too_small_is_refused(task, targets, style, wanted):
    sample = make_sample(np.random.default_rng(0), 5, contextual=2, targets=targets)
    for max_length in (3, wanted - 1):
        with pytest.raises(ValueError, match=rf"={max_length}: no event fits .*at least {wanted}"):
            collate([sample], task=task, style=style, num_contextual=2, max_length=max_length)


def test_candidates_of_a_user_without_events_need_no_room_for_one():
    sample = make_sample(np.random.default_rng(0), 0, contextual=2, targets=4)
    batch = collate([sample], task="ranking", style="merged", num_contextual=2, max_length=6)
    assert batch.lengths.tolist() == [6]


@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_long_sequences_are_fast(task):
    sample = make_sample(np.random.default_rng(0), 1_000_000, contextual=2, targets=3)
    start = time.perf_counter()
    batch = collate(
        [sample], task=task, style="interleaved", num_contextual=2, max_length=3_000_000
    )
    assert time.perf_counter() - start < 2  # a Python loop over the events takes longer
    assert batch.num_tokens > 1_999_990
