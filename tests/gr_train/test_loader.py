"""Loaders: the same data for every world size, exact resume, evaluation that sees all once."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from gr_train.config import Config, ConfigError
from gr_train.data import loader
from gr_train.data.loader import build_loader, dataset_info, item_counts
from gr_train.data.parquet import write_split
from gr_train.data.sample import DatasetInfo, Sample
from parallel.batch import JaggedBatch

ROWS = {"train": 50, "valid": 7, "test": 13}
INFO = DatasetInfo(num_items=50, num_actions=2)


def numbered(number: int) -> Sample:
    """A sample told apart by its one input token."""
    none = np.zeros(0, np.int64)
    return Sample(none, np.array([number, 0]), np.zeros(2, np.int64), np.arange(2), none, none, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, rows in ROWS.items():
        write_split(map(numbered, range(rows)), INFO, root / split, rows_per_group=4)
    INFO.save(root)
    return root


def make_config(
    source: str, folder: Path, *, readers: int | None = None, workers: int = 0
) -> Config:
    config = Config()
    config.data.source = source
    config.data.path = str(folder)
    config.data.batch_size = 12
    config.data.readers = readers
    config.data.num_workers = workers
    config.data.synthetic.num_eval_sequences = 13
    config.eval.batch_size = 12
    return config


def batches(config: Config, rank: int, world_size: int, count: int) -> list[JaggedBatch]:
    info = dataset_info(config)
    loader = build_loader(config, info, "train", rank=rank, world_size=world_size)
    return list(islice(loader, count))


def rows(batch: JaggedBatch) -> list[list[int]]:
    """Each sequence's ids and labels."""
    lengths = batch.lengths.tolist()
    both = torch.stack([batch.tokens["id"], batch.tokens["label"]], dim=1).split(lengths)
    return [x.flatten().tolist() for x in both]


def same(a: JaggedBatch, b: JaggedBatch) -> bool:
    return torch.equal(a.lengths, b.lengths) and all(
        torch.equal(a.tokens[name], b.tokens[name]) for name in a.tokens
    )


def test_costs_are_found_by_the_workers(folder, monkeypatch) -> None:
    def costs_of(model, num_contextual: int, batch: JaggedBatch) -> torch.Tensor:
        return torch.full((len(batch.lengths),), os.getpid(), dtype=torch.float64)

    monkeypatch.setattr(loader, "sequence_flops", costs_of)
    (batch,) = batches(make_config("synthetic", folder, workers=1), 0, 2, 1)
    assert batch.costs is not None
    assert (batch.costs != os.getpid()).all()


@pytest.mark.parametrize(
    ("source", "readers", "worlds"),
    [("synthetic", None, [1, 2, 3, 12]), ("parquet", 6, [1, 2, 3, 6])],
)
def test_global_batches_do_not_depend_on_the_world_size(folder, source, readers, worlds):
    config = make_config(source, folder, readers=readers)
    joined = []
    for world_size in worlds:
        ranks = [batches(config, rank, world_size, 6) for rank in range(world_size)]
        steps = zip(*ranks, strict=True)
        joined.append([[row for batch in step for row in rows(batch)] for step in steps])
    assert all(len(step) == 12 for step in joined[0])
    assert all(other == joined[0] for other in joined[1:])


def test_workers_do_not_change_synthetic_batches(folder):
    alone = batches(make_config("synthetic", folder), 0, 2, 5)
    workers = batches(make_config("synthetic", folder, workers=2), 0, 2, 5)
    assert all(same(a, b) for a, b in zip(alone, workers, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_parquet_epochs_flow_into_one_another(folder, workers):
    """24 sequences of 25 rows a reader, twice: every row seen, none a third time."""
    config = make_config("parquet", folder, readers=2, workers=workers)
    seen = np.zeros(50, int)
    for rank in range(2):
        for batch in batches(config, rank, 2, 8):
            np.add.at(seen, batch.tokens["id"].numpy(), 1)
    assert seen.sum() == 96
    assert set(seen.tolist()) == {1, 2}
    assert (seen == 1).sum() == 4


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("source", ["synthetic", "parquet"])
def test_resume_is_exact(folder, source, workers):
    config = make_config(source, folder, readers=2, workers=workers)
    straight = batches(config, 1, 2, 15)
    info = dataset_info(config)
    for stop in (0, 3, 10):  # 4 batches are an epoch of 25 rows less one row
        loader = build_loader(config, info, "train", rank=1, world_size=2)
        taken = list(islice(loader, stop))
        state = copy.deepcopy(loader.state_dict())
        resumed = build_loader(config, info, "train", rank=1, world_size=2)
        resumed.load_state_dict(state)
        taken += list(islice(resumed, 15 - stop))
        assert all(same(a, b) for a, b in zip(taken, straight, strict=True))


@pytest.mark.parametrize("source", ["synthetic", "parquet"])
@pytest.mark.parametrize("world_size", [1, 3, 4, 6])
def test_evaluation_sees_every_sample_once_in_equally_many_batches(folder, source, world_size):
    config = make_config(source, folder)
    info = dataset_info(config)
    ranks = [
        list(build_loader(config, info, "test", rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(b) for b in ranks}) == 1
    assert all(len(batch.lengths) <= 12 // world_size for b in ranks for batch in b)
    config.eval.batch_size = 13
    (whole,) = build_loader(config, info, "test", rank=0, world_size=1)
    assert [row for b in ranks for batch in b for row in rows(batch)] == rows(whole)
    assert len(whole.lengths) == 13


def test_ranks_without_samples_yield_empty_batches(folder):
    config = make_config("parquet", folder)
    sizes = []
    for rank in range(12):  # share 7 rows
        loader = build_loader(config, INFO, "valid", rank=rank, world_size=12)
        sizes.append([len(batch.lengths) for batch in loader])
    assert all(len(s) == 1 for s in sizes)
    assert sum(s[0] for s in sizes) == 7


@pytest.mark.parametrize("source", ["synthetic", "parquet"])
def test_item_counts_of_the_ranks_add_up(folder, source):
    config = make_config(source, folder)
    info = dataset_info(config)
    whole = item_counts(config, info, rank=0, world_size=1)
    shares = [item_counts(config, info, rank=r, world_size=3) for r in range(3)]
    assert whole.shape == (info.num_items,)
    assert np.array_equal(sum(shares), whole)
    if source == "parquet":
        assert whole.tolist() == [51] + [1] * 49  # each sample's own number, and item 0


def test_too_few_rows_for_the_readers_are_refused(folder):
    config = make_config("parquet", folder, readers=60)
    with pytest.raises(ValueError, match="50 training rows are too few for 60 readers"):
        build_loader(config, INFO, "train", rank=0, world_size=1)


def test_ranking_without_tasks_is_refused(folder):
    config = make_config("parquet", folder)
    config.model.task = "ranking"
    with pytest.raises(ValueError, match=r"model\.task=ranking: the data set has no tasks"):
        dataset_info(config)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("retrieval", "2 or more item_ids.*model.task=retrieval"),
        ("ranking", "1 or more candidate_ids.*model.task=ranking"),
    ],
)
def test_data_with_nothing_to_learn_from_is_refused(tmp_path, task, words):
    none = np.zeros(0, np.int64)
    lonely = Sample(none, *[np.zeros(1, np.int64)] * 3, none, none, 0)
    info = replace(INFO, tasks=["like"])
    config = make_config("parquet", tmp_path)
    config.model.task = task
    write_split([lonely] * 20, info, tmp_path / "train", rows_per_group=8)
    with pytest.raises(ConfigError, match=rf"data\.path=.*{words}"):
        build_loader(config, info, "train", rank=0, world_size=1)


def test_a_folder_without_a_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path=.*no dataset\.json"):
        dataset_info(make_config("parquet", tmp_path))
