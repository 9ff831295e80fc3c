"""Made-up users: deterministic, of the wanted lengths, with structure that popularity misses."""

from __future__ import annotations

import time

import numpy as np
import pytest

from gr_train.config import SyntheticConfig
from gr_train.data.synthetic import FOLLOW, SyntheticSource, synthetic_info


def test_a_sample_is_a_function_of_seed_split_and_index():
    def draw(seed: int, split: str, index: int) -> list[int]:
        return SyntheticSource(SyntheticConfig(), seed).sample(split, index).items.tolist()

    assert draw(3, "valid", 7) == draw(3, "valid", 7)
    others = [draw(4, "valid", 7), draw(3, "test", 7), draw(3, "valid", 8)]
    assert draw(3, "valid", 7) not in others


@pytest.mark.parametrize("num_items", [1, 3, 7, 25, 1003, 10_000_000])
def test_ids_and_times_are_in_order(num_items):
    config = SyntheticConfig(num_items=num_items, contextual_sizes=[1, 3, 100], num_tasks=3)
    info = synthetic_info(config)
    source = SyntheticSource(config, 0)
    for index in range(50):
        sample = source.sample("train", index)
        assert config.min_events <= len(sample.items) <= config.max_events
        assert len(sample.actions) == len(sample.timestamps) == len(sample.items)
        assert len(sample.candidates) == len(sample.candidate_labels) == config.num_candidates
        for ids, size in [
            (sample.items, info.num_items),
            (sample.actions, info.num_actions),
            (sample.candidates, info.num_items),
            (sample.candidate_labels, 1 << len(info.tasks)),
            (sample.contextual, np.array(list(info.contextual.values()))),
        ]:
            assert ids.dtype == np.int64
            assert (ids >= 0).all()
            assert (ids < size).all()
        assert (np.diff(sample.timestamps) > 0).all()
        assert sample.request_time > sample.timestamps[-1]


@pytest.mark.parametrize(
    ("low", "mean", "high"), [(4, 50, 200), (10, 300, 20_000), (10, 10, 10), (4, 100, 110)]
)
def test_lengths_have_the_wanted_mean_and_a_heavy_tail(low, mean, high):
    config = SyntheticConfig(min_events=low, mean_events=mean, max_events=high, num_candidates=1)
    source = SyntheticSource(config, 0)
    lengths = [len(source.sample("train", i).items) for i in range(3000)]
    assert min(lengths) >= low
    assert max(lengths) <= high
    assert abs(np.mean(lengths) / mean - 1) < 0.1
    if high > 10 * mean:
        assert max(lengths) > 10 * np.median(lengths)


def test_the_last_item_tells_the_next_and_popularity_does_not():
    source = SyntheticSource(SyntheticConfig(num_items=1000), 0)
    samples = [source.sample("train", i) for i in range(1000)]
    followed = np.concatenate([source.follow(s.items[:-1], 1) == s.items[1:] for s in samples])
    assert abs(followed.mean() - FOLLOW) < 0.02
    items = np.concatenate([s.items for s in samples])
    popular = np.argsort(-np.bincount(items, minlength=1000))[:10]
    assert np.isin([source.sample("test", i).items[-1] for i in range(2000)], popular).mean() < 0.05


def test_actions_tell_followed_from_jumped():
    source = SyntheticSource(SyntheticConfig(num_actions=4), 0)
    samples = [source.sample("train", i) for i in range(300)]
    followed = np.concatenate([source.follow(s.items[:-1], 1) == s.items[1:] for s in samples])
    high = np.concatenate([s.actions[1:] >= 2 for s in samples])
    assert (followed == high).mean() > 0.85


def test_labels_are_balanced():
    source = SyntheticSource(SyntheticConfig(num_tasks=4), 0)
    labels = np.concatenate([source.sample("train", i).candidate_labels for i in range(500)])
    for task in range(4):
        assert 0.2 < (labels >> task & 1).mean() < 0.8


def test_long_histories_over_a_large_vocabulary_are_fast():
    config = SyntheticConfig(
        num_items=10_000_000, min_events=500_000, mean_events=500_000, max_events=500_000
    )
    start = time.perf_counter()
    sample = SyntheticSource(config, 0).sample("train", 0)
    assert time.perf_counter() - start < 1
    assert len(sample.items) == 500_000


def test_contextual_size_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"data\.synthetic\.contextual_sizes=\[5, 0\]"):
        SyntheticSource(SyntheticConfig(contextual_sizes=[5, 0]), 0)
