"""Made-up users, for a first run, tests and benchmarks: no file, any vocabulary, any length.

Sample i is a pure function of (seed, split, i), so any process can make any sample. What there is
to learn, and why popularity does not help:

- Items come in series, as episodes do, and series in groups. The next item is usually the next
  of the series; otherwise the user jumps into a series of their favourite group, mildly by its
  popularity.
- The action says (usually) whether the event followed its predecessor or was a jump.
- A candidate is liked by how its group relates to the favourite one (see `_candidates`).

Nothing has the size of the vocabulary: items are computed, never looked up.
"""

from __future__ import annotations

import math

import numpy as np

from gr_train.config import SyntheticConfig
from gr_train.data.sample import DatasetInfo, Ids, Sample

SPLITS = ("train", "valid", "test")
SERIES = 10  # items i with the same i // SERIES; the last is followed by the first
GROUPS = 4  # series s belongs to group s % GROUPS
FOLLOW = 0.75  # chance that an event's item is the successor of the one before
TRUTHFUL = 0.9  # chance that the action tells followed from jumped
EPOCH_START = 1_600_000_000  # unix seconds; first events lie within a year of it


class SyntheticSource:
    """`sample(split, i)` for any i >= 0."""

    def __init__(self, config: SyntheticConfig, seed: int) -> None:
        if any(size < 1 for size in config.contextual_sizes):
            raise ValueError(
                f"data.synthetic.contextual_sizes={list(config.contextual_sizes)}: "
                "want sizes of at least 1; leave the list empty for no contextual features"
            )
        if seed < 0:
            raise ValueError(f"train.seed={seed}: want 0 or more")
        self.config = config
        self.seed = seed
        self.num_series = -(-config.num_items // SERIES)
        self.groups = min(GROUPS, self.num_series)
        self.tail = _tail_exponent(config.min_events, config.mean_events, config.max_events)

    def sample(self, split: str, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, SPLITS.index(split), index))
        num_events = self._num_events(rng)
        favourite = int(rng.integers(self.groups))

        followed = rng.random(num_events) < FOLLOW
        followed[0] = False
        jumps = np.flatnonzero(~followed)
        last_jump = np.cumsum(~followed) - 1  # which jump each event descends from
        steps = np.arange(num_events) - jumps[last_jump]
        items = self.follow(self._jump(rng, favourite, len(jumps))[last_jump], steps)
        told = followed ^ (rng.random(num_events) >= TRUTHFUL)
        actions = ((told + rng.random(num_events)) / 2 * self.config.num_actions).astype(np.int64)

        gaps = _time_gaps(rng, num_events + 1)
        gaps[0] += EPOCH_START + rng.integers(365 * 24 * 3600)
        times = np.cumsum(gaps)
        candidates, labels = self._candidates(rng, favourite, items[-1:])
        return Sample(
            contextual=self._contextual(rng, favourite),
            items=items,
            actions=actions,
            timestamps=times[:-1],
            candidates=candidates,
            candidate_labels=labels,
            request_time=int(times[-1]),
        )

    def _num_events(self, rng: np.random.Generator) -> int:
        """Density proportional to x^-(1 + tail), by inverting its distribution function."""
        low, high = self.config.min_events, self.config.max_events
        decay = self.tail * math.log((high + 1) / low)
        u = rng.random()
        exponent = u if decay == 0 else math.log1p(u * math.expm1(-decay)) / -decay
        return min(int(low * ((high + 1) / low) ** exponent), high)

    def follow(self, items: Ids, steps: Ids | int) -> Ids:
        """The items so many steps further on in their series."""
        first = items // SERIES * SERIES
        size = np.minimum(self.config.num_items - first, SERIES)
        return first + (items - first + steps) % size

    def _jump(self, rng: np.random.Generator, favourite: int, count: int) -> Ids:
        """Items of the favourite group; u^1.5 makes the popularity of series fall slowly."""
        rank = (self.num_series // self.groups * rng.random(count) ** 1.5).astype(np.int64)
        items = (rank * self.groups + favourite) * SERIES + rng.integers(SERIES, size=count)
        return np.minimum(items, self.config.num_items - 1)

    def _candidates(self, rng: np.random.Generator, favourite: int, last: Ids) -> tuple[Ids, Ids]:
        """Half of them from the favourite group, one of them the last item's successor.

        Task 0: the candidate is of the favourite group or is that successor.
        Task k: its group is one of the half of all groups that begins k after the favourite one.
        """
        count = self.config.num_candidates
        anywhere = rng.integers(self.config.num_items, size=count)
        candidates = np.where(rng.random(count) < 0.5, self._jump(rng, favourite, count), anywhere)
        successor = self.follow(last, 1)
        candidates[rng.integers(count)] = successor[0]
        distance = (candidates // SERIES - favourite) % self.groups
        labels = ((distance == 0) | (candidates == successor)).astype(np.int64)
        for task in range(1, self.config.num_tasks):
            liked = (distance - task) % self.groups < (self.groups + 1) // 2
            labels |= liked.astype(np.int64) << task
        return candidates, labels

    def _contextual(self, rng: np.random.Generator, favourite: int) -> Ids:
        """Each feature tells the favourite group, where its vocabulary is large enough to."""
        sizes = np.array(self.config.contextual_sizes, dtype=np.int64)
        drawn = rng.integers(sizes) if len(sizes) else sizes
        return (drawn // self.groups * self.groups + favourite) % sizes


def synthetic_info(config: SyntheticConfig) -> DatasetInfo:
    return DatasetInfo(
        num_items=config.num_items,
        num_actions=config.num_actions,
        contextual={f"feature_{k}": size for k, size in enumerate(config.contextual_sizes)},
        tasks=[f"task_{k}" for k in range(config.num_tasks)],
    )


def _time_gaps(rng: np.random.Generator, count: int) -> Ids:
    """Seconds between events: mostly a minute or so within a visit, at times days. At least 1."""
    return 1 + rng.lognormal(math.log(60), 2.0, count).astype(np.int64)


def _tail_exponent(low: int, mean: float, high: int) -> float:
    """The power law on [low, high] whose mean is `mean`; found by bisection.

    With y = log(x / low) the law is an exponential cut off at `span`, so its mean is a ratio of
    integrals of exp. Half is added because a drawn length is rounded down.
    """
    span = math.log((high + 1) / low)

    def integral(rate: float) -> float:  # of exp(rate * y) over [0, span]
        return span if abs(rate) < 1e-12 else math.expm1(rate * span) / rate

    least, most = -300 / span, 300 / span
    for _ in range(100):
        middle = (least + most) / 2
        if low * integral(1 - middle) / integral(-middle) > mean + 0.5:
            least = middle  # too long on average: a steeper tail
        else:
            most = middle
    return (least + most) / 2
