"""Config to batches: deals the samples of a data set to processes and loader workers.

Training is an endless stream whose position is part of a checkpoint. Evaluation is one pass in
which every process sees the same number of batches, since it runs collectives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from gr_train.config import Config, ConfigError, DataConfig
from gr_train.data.collate import collate
from gr_train.data.parquet import ParquetReader, ParquetSplit
from gr_train.data.sample import DatasetInfo, Ids, Sample
from gr_train.data.synthetic import SyntheticSource, synthetic_info
from gr_train.model.mask import sequence_flops
from parallel.batch import JaggedBatch

Split = Literal["train", "valid", "test"]
COUNTED_SEQUENCES = 4096  # of the endless synthetic training split, for item_counts


def dataset_info(config: Config) -> DatasetInfo:
    """Raises ConfigError if the data set does not serve model.task."""
    data = config.data
    parquet = data.source == "parquet"
    info = DatasetInfo.load(_root(data)) if parquet else synthetic_info(data.synthetic)
    if config.model.task == "ranking" and not info.tasks:
        raise ConfigError(
            "model.task=ranking: the data set has no tasks that candidates are labelled with; "
            "use model.task=retrieval or prepare it for ranking"
        )
    return info


def build_loader(
    config: Config, info: DatasetInfo, split: Split, *, rank: int, world_size: int
) -> StatefulDataLoader:
    """Yields JaggedBatch: this rank's share of data.batch_size (or eval.batch_size) sequences.

    data.num_workers applies to training. With Parquet it multiplies the readers, and so changes
    the order of the samples.
    """
    balances = config.parallel.balance and world_size > config.parallel.cp
    dataset: IterableDataset[list[Sample]]
    if split != "train":
        dataset = EvaluationSamples(config, info, split, rank, world_size)
    elif config.data.source == "parquet":
        dataset = TrainingSamples(ParquetDeal(config, info, rank, world_size))
    else:
        dataset = TrainingSamples(SyntheticDeal(config, rank, world_size))
    return StatefulDataLoader(
        dataset,
        batch_size=None,  # the dataset makes the batches
        num_workers=config.data.num_workers if split == "train" else 0,
        # Starting to iterate draws a number; the global generator is dropout's, and is resumed.
        generator=torch.Generator(),
        collate_fn=partial(
            _make_batch, config, len(info.contextual), split == "train" and balances
        ),
    )


def _make_batch(
    config: Config, num_contextual: int, balance: bool, samples: list[Sample]
) -> JaggedBatch:
    batch = collate(
        samples,
        task=config.model.task,
        style=config.model.input_style,
        num_contextual=num_contextual,
        max_length=config.data.max_length,
    )
    if not balance:
        return batch
    return replace(batch, costs=sequence_flops(config.model, num_contextual, batch))


def item_counts(config: Config, info: DatasetInfo, *, rank: int, world_size: int) -> Ids:
    """Occurrences of each item in this rank's share of the training split, for popularity."""
    if config.data.source == "parquet":
        split = ParquetSplit(_root(config.data), "train", info)
        return split.item_counts(share(split.num_rows, rank, world_size))
    source = SyntheticSource(config.data.synthetic, config.train.seed)
    counts = np.zeros(info.num_items, np.int64)
    for index in share(COUNTED_SEQUENCES, rank, world_size):
        np.add.at(counts, source.sample("train", index).items, 1)
    return counts


def share(total: int, index: int, count: int) -> range:
    """The index-th of `count` contiguous ranges that tile range(total)."""
    return range(index * total // count, (index + 1) * total // count)


class SyntheticDeal:
    """Step s of the whole job is samples [s * batch_size, (s + 1) * batch_size)."""

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self.source = SyntheticSource(config.data.synthetic, config.train.seed)
        self.batch_size = config.data.batch_size
        self.rows = share(self.batch_size, rank, world_size)

    def batches(self, worker: int, num_workers: int, taken: int) -> Iterator[list[Sample]]:
        """This rank's, of every num_workers-th step, without the first `taken`."""
        for step in itertools.count(worker + taken * num_workers, num_workers):
            first = step * self.batch_size
            yield [self.source.sample("train", first + row) for row in self.rows]


class ParquetDeal:
    """Readers share the rows, and every step takes equally many from each of a worker's readers."""

    def __init__(self, config: Config, info: DatasetInfo, rank: int, world_size: int) -> None:
        data = config.data
        self.seed = config.train.seed
        self.split = ParquetSplit(_root(data), "train", info)
        per_worker = data.readers or world_size
        self.num_readers = per_worker * max(data.num_workers, 1)
        if self.split.num_rows < self.num_readers:
            raise ValueError(
                f"data.path={data.path!r}: {self.split.num_rows} training rows are too few for "
                f"{self.num_readers} readers; use a smaller data.readers (now {data.readers}), "
                f"fewer processes (now {world_size}) or data.num_workers (now {data.num_workers})"
            )
        ranking = config.model.task == "ranking"
        column, least = ("candidate_ids", 1) if ranking else ("item_ids", 2)
        if not self.split.has_row_of(column, least):
            raise ConfigError(
                f"data.path={data.path!r}: no row of the training split has {least} or more "
                f"{column}, so there is nothing to learn for model.task={config.model.task}"
            )
        self.rows_each = data.batch_size // per_worker
        self.mine = share(per_worker, rank, world_size)

    def batches(self, worker: int, num_workers: int, taken: int) -> Iterator[list[Sample]]:
        """This worker's, without the first `taken`."""
        skip = taken * self.rows_each
        streams = [self._reader(k * num_workers + worker).samples(skip) for k in self.mine]
        while True:
            yield [sample for s in streams for sample in itertools.islice(s, self.rows_each)]

    def _reader(self, index: int) -> ParquetReader:
        rows = share(self.split.num_rows, index, self.num_readers)
        return ParquetReader(self.split, rows, index=index, seed=self.seed)


class TrainingSamples(IterableDataset[list[Sample]]):
    """An endless stream of batches per loader worker; workers take turns, batch by batch.

    The ranks' batches of a step, joined, are the same for every world size, given equal readers.
    """

    def __init__(self, deal: SyntheticDeal | ParquetDeal) -> None:
        self.deal = deal

    def __iter__(self) -> TrainingStream:
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        return TrainingStream(partial(self.deal.batches, index, count))


class TrainingStream:
    """An iterator whose whole state is how many batches it has yielded."""

    def __init__(self, batches: Callable[[int], Iterator[list[Sample]]]) -> None:
        self.batches = batches
        self.load_state_dict({"taken": 0})

    def __iter__(self) -> TrainingStream:
        return self

    def __next__(self) -> list[Sample]:
        self.taken += 1
        return next(self._remaining)

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]
        self._remaining = self.batches(self.taken)


class EvaluationSamples(IterableDataset[list[Sample]]):
    """A contiguous share of the split, in batches; empty ones even out the ranks."""

    def __init__(
        self, config: Config, info: DatasetInfo, split: str, rank: int, world_size: int
    ) -> None:
        self.batch_size = config.eval.batch_size // world_size
        self.samples: Callable[[range], Iterable[Sample]]
        if config.data.source == "parquet":
            parquet = ParquetSplit(_root(config.data), split, info)
            self.samples, total = parquet.samples, parquet.num_rows
        else:
            source = SyntheticSource(config.data.synthetic, config.train.seed)
            self.samples = partial(map, partial(source.sample, split))
            total = config.data.synthetic.num_eval_sequences
        self.rows = share(total, rank, world_size)
        largest_share = max(len(share(total, other, world_size)) for other in range(world_size))
        self.num_batches = -(-largest_share // self.batch_size)

    def __iter__(self) -> Iterator[list[Sample]]:
        samples = iter(self.samples(self.rows))
        for _ in range(self.num_batches):
            yield list(itertools.islice(samples, self.batch_size))


def _root(data: DataConfig) -> Path:
    if data.path is None:
        raise ValueError("data.path=None: data.source=parquet reads a folder; name it")
    return Path(data.path)
