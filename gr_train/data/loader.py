"""Config to batches: deals the samples of a data set to processes and loader workers.

Training is an endless stream whose position is part of a checkpoint. Evaluation is one pass in
which every process sees the same number of batches, since it runs collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from gr_train.config import Config, DataConfig
from gr_train.data.collate import collate
from gr_train.data.sample import DatasetInfo, Ids, Sample
from gr_train.data.synthetic import SyntheticSource, synthetic_info

Split = Literal["train", "valid", "test"]
COUNTED_SEQUENCES = 4096  # of the endless synthetic training split, for item_counts


def dataset_info(data: DataConfig) -> DatasetInfo:
    return synthetic_info(data.synthetic)


def build_loader(
    config: Config, info: DatasetInfo, split: Split, *, rank: int, world_size: int
) -> StatefulDataLoader:
    """Yields JaggedBatch: this rank's share of data.batch_size (or eval.batch_size) sequences.

    data.num_workers applies to training.
    """
    dataset: IterableDataset[list[Sample]]
    if split == "train":
        dataset = TrainingSamples(config, info, rank, world_size)
    else:
        dataset = EvaluationSamples(config, info, split, rank, world_size)
    return StatefulDataLoader(
        dataset,
        batch_size=None,  # the streams below make the batches
        num_workers=config.data.num_workers if split == "train" else 0,
        collate_fn=partial(
            collate,
            task=config.model.task,
            style=config.model.input_style,
            num_contextual=len(info.contextual),
            max_length=config.data.max_length,
        ),
    )


def item_counts(config: Config, info: DatasetInfo, *, rank: int, world_size: int) -> Ids:
    """Occurrences of each item in this rank's share of the training split, for popularity."""
    counts = np.zeros(info.num_items, np.int64)
    source = SyntheticSource(config.data.synthetic, config.train.seed)
    for index in share(COUNTED_SEQUENCES, rank, world_size):
        np.add.at(counts, source.sample("train", index).items, 1)
    return counts


def share(total: int, index: int, count: int) -> range:
    """The index-th of `count` contiguous ranges that tile range(total)."""
    return range(index * total // count, (index + 1) * total // count)


class TrainingSamples(IterableDataset[list[Sample]]):
    """One endless stream per loader worker; the workers take turns, batch by batch."""

    def __init__(self, config: Config, info: DatasetInfo, rank: int, world_size: int) -> None:
        self.config, self.info, self.rank, self.world_size = config, info, rank, world_size

    def __iter__(self) -> SyntheticStream:
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        data = self.config.data
        source = SyntheticSource(data.synthetic, self.config.train.seed)
        indices = share(data.batch_size, self.rank, self.world_size)
        return SyntheticStream(source, indices, data.batch_size, range(index, 1 << 62, count))


class SyntheticStream:
    """Step s of the whole job is samples [s * batch_size, (s + 1) * batch_size)."""

    def __init__(
        self, source: SyntheticSource, indices: range, batch_size: int, steps: range
    ) -> None:
        self.source, self.indices, self.batch_size, self.steps = source, indices, batch_size, steps
        self.taken = 0

    def __iter__(self) -> SyntheticStream:
        return self

    def __next__(self) -> list[Sample]:
        first = self.steps[self.taken] * self.batch_size
        self.taken += 1
        return [self.source.sample("train", first + i) for i in self.indices]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


class EvaluationSamples(IterableDataset[list[Sample]]):
    """A contiguous share of the split, in batches; empty ones even out the ranks."""

    def __init__(
        self, config: Config, info: DatasetInfo, split: str, rank: int, world_size: int
    ) -> None:
        self.config, self.split, self.rank, self.world_size = config, split, rank, world_size
        self.source = SyntheticSource(config.data.synthetic, config.train.seed)
        self.total = config.data.synthetic.num_eval_sequences

    def __iter__(self) -> Iterator[list[Sample]]:
        size = self.config.eval.batch_size // self.world_size
        shares = [share(self.total, rank, self.world_size) for rank in range(self.world_size)]
        num_batches = max(-(-len(rows) // size) for rows in shares)
        samples = iter(self._samples(shares[self.rank]))
        for _ in range(num_batches):
            yield list(islice(samples, size))

    def _samples(self, rows: range) -> Iterable[Sample]:
        return (self.source.sample(self.split, i) for i in rows)
