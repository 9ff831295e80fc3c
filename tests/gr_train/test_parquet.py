"""Parquet splits: what is written is read, once, by any number of readers; bad rows are named."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_train.config import SyntheticConfig
from gr_train.data.loader import share
from gr_train.data.parquet import ParquetReader, ParquetSplit, schema, write_split
from gr_train.data.sample import DatasetInfo, Sample
from gr_train.data.synthetic import SyntheticSource, synthetic_info

INFO = DatasetInfo(num_items=1000, num_actions=2)


def numbered(count: int, first: int = 0) -> list[Sample]:
    """Samples told apart by their one item."""
    none = np.zeros(0, np.int64)
    return [
        Sample(none, np.array([i]), np.array([0]), np.array([i]), none, none, 0)
        for i in range(first, first + count)
    ]


def number(sample: Sample) -> int:
    return int(sample.items[0])


def write_files(root: Path, sizes: list[int], rows_per_group: int) -> ParquetSplit:
    for k, size in enumerate(sizes):
        write_split(
            numbered(size, sum(sizes[:k])), INFO, root / "tmp", rows_per_group=rows_per_group
        )
        (root / "train").mkdir(exist_ok=True)
        (root / "tmp" / "part-00000.parquet").rename(root / "train" / f"{k}.parquet")
    return ParquetSplit(root, "train", INFO)


@pytest.mark.parametrize("num_tasks", [0, 3])
def test_round_trip(tmp_path, num_tasks):
    config = SyntheticConfig(contextual_sizes=[5, 9], num_tasks=max(num_tasks, 1))
    info = synthetic_info(config)
    source = SyntheticSource(config, 0)
    samples = [source.sample("train", i) for i in range(10)]
    if num_tasks == 0:
        none = np.zeros(0, np.int64)
        info = replace(info, tasks=[])
        samples = [
            replace(s, candidates=none, candidate_labels=none, request_time=0) for s in samples
        ]
    assert write_split(iter(samples), info, tmp_path / "test", rows_per_group=4) == 10
    split = ParquetSplit(tmp_path, "test", info)
    assert [len(part.rows) for part in split.groups] == [4, 4, 2]
    for got, wanted in zip(split.samples(range(10)), samples, strict=True):
        for f in fields(Sample):
            np.testing.assert_array_equal(getattr(got, f.name), getattr(wanted, f.name))


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    rows_per_group=st.integers(1, 5),
    readers=st.integers(1, 5),
    skip=st.integers(0, 60),
)
@settings(max_examples=40, deadline=None)
def test_every_reader_deals_its_rows_once_an_epoch_and_resumes(
    tmp_path_factory, sizes, rows_per_group, readers, skip
):
    split = write_files(tmp_path_factory.mktemp("data"), sizes, rows_per_group)
    total = sum(sizes)
    assert [number(s) for s in split.samples(range(total))] == list(range(total))
    seen: list[int] = []
    for index in range(readers):
        rows = share(total, index, readers)
        if len(rows) == 0:
            continue
        reader = ParquetReader(split, rows, index=index, seed=1)
        dealt = [number(s) for s in islice(reader.samples(), 2 * len(rows))]
        first, second = sorted(dealt[: len(rows)]), sorted(dealt[len(rows) :])
        assert first == second == list(rows)
        seen += first
        resumed = [number(s) for s in islice(reader.samples(skip), 7)]
        assert resumed == [number(s) for s in islice(reader.samples(), skip, skip + 7)]
    assert seen == list(range(total))
    counts = sum(split.item_counts(share(total, i, readers)) for i in range(readers))
    assert counts.tolist() == [1] * total + [0] * (1000 - total)


def test_epochs_readers_and_seeds_differ_in_order(tmp_path):
    split = write_files(tmp_path, [40], rows_per_group=10)

    def order(seed: int, index: int, epoch: int) -> list[int]:
        reader = ParquetReader(split, range(40), index=index, seed=seed)
        return [number(s) for s in islice(reader.samples(epoch * 40), 40)]

    orders = [order(0, 0, 0), order(1, 0, 0), order(0, 1, 0), order(0, 0, 1), list(range(40))]
    assert len({tuple(o) for o in orders}) == 5


def test_only_the_row_groups_needed_are_opened(tmp_path, monkeypatch):
    split = write_files(tmp_path, [40], rows_per_group=10)
    opened: list[int] = []
    read = ParquetSplit.read
    monkeypatch.setattr(
        ParquetSplit, "read", lambda self, part: opened.append(part.group) or read(self, part)
    )
    assert [number(s) for s in split.samples(range(15, 25))] == list(range(15, 25))
    assert opened == [1, 2]
    opened.clear()
    reader = ParquetReader(split, range(40), index=0, seed=0)
    next(reader.samples(4 * 40 + 35))  # the fifth epoch, in its last row group
    assert len(opened) == 1


RANKING = DatasetInfo(num_items=10, num_actions=3, contextual={"country": 4}, tasks=["like"])
GOOD = {
    "item_ids": [[1, 2], [3], []],
    "action_ids": [[0, 1], [2], []],
    "timestamps": [[5, 5], [1], []],
    "country": [0, 3, 1],
    "candidate_ids": [[9], [], [1, 2]],
    "request_time": [6, 2, 0],
    "label_like": [[1], [], [0, 1]],
}


def write_raw(folder: Path, columns: dict[str, list]) -> ParquetSplit:
    """GOOD, twice, with these columns in the second row group: its rows are 3, 4 and 5."""
    (folder / "train").mkdir()
    kinds = pa.schema([f for f in schema(RANKING) if f.name in columns])
    with pq.ParquetWriter(folder / "train" / "x.parquet", kinds) as writer:
        for group in (GOOD, columns):
            writer.write_table(pa.table({n: group[n] for n in kinds.names}, schema=kinds))
    return ParquetSplit(folder, "train", RANKING)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("item_ids", [[1, 2], [10], []], "row 4: item_ids has 10, not in 0 .. 9"),
        ("item_ids", [[1, -1], [3], []], "row 3: item_ids has -1, not in 0 .. 9"),
        ("action_ids", [[0, 1], [3], []], "row 4: action_ids has 3, not in 0 .. 2"),
        ("candidate_ids", [[9], [], [1, 77]], "row 5: candidate_ids has 77, not in 0 .. 9"),
        ("country", [0, 3, 4], "row 5: country has 4, not in 0 .. 3"),
        ("label_like", [[1], [], [0, 2]], "row 5: label_like has 2, not in 0 .. 1"),
        ("action_ids", [[0, 1], [], []], "row 4: action_ids has 0 values, item_ids 1"),
        ("timestamps", [[5, 5], [1], [1]], "row 5: timestamps has 1 values, item_ids 0"),
        ("label_like", [[1], [1], [0]], "row 4: label_like has 1 values, candidate_ids 0"),
        ("timestamps", [[5, 4], [1], []], "row 3: timestamps go back from 5 to 4"),
        ("item_ids", [[1, 2], None, []], "row 4: item_ids is or contains null"),
        ("timestamps", [[1, None], [1], []], "row 3: timestamps is or contains null"),
        ("country", [0, 1, None], "row 5: country is or contains null"),
        ("request_time", [0, None, 1], "row 4: request_time is or contains null"),
    ],
)
def test_bad_rows_are_named(tmp_path, column, values, message):
    split = write_raw(tmp_path, {**GOOD, column: values})
    assert len(list(split.samples(range(3)))) == 3
    with pytest.raises(ValueError, match=r"x\.parquet, " + message):
        list(split.samples(range(6)))
    if column == "item_ids":
        with pytest.raises(ValueError, match=r"x\.parquet, row"):
            split.item_counts(range(6))


def test_a_row_is_named_when_its_group_is_cut(tmp_path):
    split = write_raw(tmp_path, {**GOOD, "country": [0, 3, 4]})
    with pytest.raises(ValueError, match=r"x\.parquet, row 5: country has 4"):
        list(split.samples(range(4, 6)))
    assert len(list(split.samples(range(3, 5)))) == 2


def test_time_may_go_back_from_one_row_to_the_next(tmp_path):
    split = write_raw(tmp_path, GOOD)
    samples = list(split.samples(range(6)))
    assert [s.items.tolist() for s in samples[:3]] == GOOD["item_ids"]
    assert [s.candidate_labels.tolist() for s in samples[3:]] == GOOD["label_like"]


@pytest.mark.parametrize("name", list(GOOD))
def test_a_missing_column_is_named(tmp_path, name):
    columns = {k: v for k, v in GOOD.items() if k != name}
    with pytest.raises(ValueError, match=rf"x\.parquet: no column '{name}'"):
        write_raw(tmp_path, columns)


def test_other_integer_and_boolean_types_are_read(tmp_path):
    (tmp_path / "train").mkdir()
    table = pa.table(
        {**GOOD, "item_ids": pa.array(GOOD["item_ids"], pa.large_list(pa.int32()))}
        | {"label_like": pa.array([[True], [], [False, True]])}
    )
    pq.write_table(table, tmp_path / "train" / "x.parquet")
    samples = list(ParquetSplit(tmp_path, "train", RANKING).samples(range(3)))
    assert samples[2].candidate_labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("country", ["a", "b", "c"], "want an integer, found string"),
        ("country", [[1], [2], [3]], "want an integer, found list"),
        ("item_ids", [1, 2, 3], "want a list of integers, found int64"),
        ("item_ids", [[[1]], [[2]], [[3]]], "want a list of integers, found list"),
        ("label_like", [[0.5], [], [0.1, 1.0]], "want a list of integers, found list"),
        # Read as integers, these would silently be a thousand times too far apart.
        (
            "timestamps",
            pa.array(GOOD["timestamps"], pa.list_(pa.timestamp("ms"))),
            r"want a list of integers \(unix seconds\), found list.*timestamp",
        ),
    ],
)
def test_columns_of_other_types_are_refused_before_any_is_read(tmp_path, name, values, message):
    (tmp_path / "train").mkdir()
    pq.write_table(pa.table({**GOOD, name: values}), tmp_path / "train" / "x.parquet")
    with pytest.raises(ValueError, match=rf"x\.parquet: column {name}: {message}"):
        ParquetSplit(tmp_path, "train", RANKING)


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path=.*no \*\.parquet files in .*train"):
        ParquetSplit(tmp_path, "train", INFO)
    (tmp_path / "train").mkdir()
    pq.write_table(schema(INFO).empty_table(), tmp_path / "train" / "empty.parquet")
    with pytest.raises(ValueError, match=r"empty\.parquet: has no rows"):
        ParquetSplit(tmp_path, "train", INFO)
    (tmp_path / "train" / "empty.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"empty\.parquet: not a Parquet file"):
        ParquetSplit(tmp_path, "train", INFO)


def test_the_writer_refuses_to_mix_data_sets(tmp_path):
    write_split(numbered(3), INFO, tmp_path / "train")
    with pytest.raises(ValueError, match="already holds Parquet files"):
        write_split(numbered(3), INFO, tmp_path / "train")
    with pytest.raises(ValueError, match="no samples"):
        write_split([], INFO, tmp_path / "valid")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"num_items": 3}', "lacks 'num_actions'"),
        ('{"num_items": 3, "num_actions": 2, "task": []}', "unknown key 'task'; want .*tasks"),
        ("[1]", "want an object"),
        ("{", "not JSON"),
        ('{"num_items": "3", "num_actions": 2}', "num_items='3': want a vocabulary size"),
    ],
)
def test_dataset_json_is_no_such_thing(tmp_path, text, message):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=rf"dataset\.json: {message}"):
        DatasetInfo.load(tmp_path)


def test_dataset_json_is_checked(tmp_path):
    info = replace(RANKING, contextual={"country": 0})
    info.save(tmp_path)
    with pytest.raises(ValueError, match=r"dataset\.json: country=0: want"):
        DatasetInfo.load(tmp_path)
    with pytest.raises(ValueError, match=r"two columns would be named 'item_ids'"):
        schema(replace(RANKING, contextual={"item_ids": 3}))
