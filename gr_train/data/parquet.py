"""Samples in Parquet: the schema, a streaming writer, and readers for data larger than memory.

A data set is a folder: dataset.json (DatasetInfo) and train/, valid/, test/ with *.parquet files.
A row is a sample. Columns: `item_ids`, `action_ids`, `timestamps` (lists of int64), an int64 column
per contextual feature and, if the data set has ranking tasks, `candidate_ids` (list of int64),
`request_time` (int64) and `label_<task>` (list of 0 and 1) per task.

The unit of reading is the row group: one at a time per reader is in memory. A file's columns are
checked when a split is opened, its rows as they are read; errors name the file and the row, counted
from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr_train.data.sample import DatasetInfo, Ids, Sample

EVENT_COLUMNS = ("item_ids", "action_ids", "timestamps")


def schema(info: DatasetInfo) -> pa.Schema:
    columns = [(name, pa.list_(pa.int64())) for name in EVENT_COLUMNS]
    columns += [(name, pa.int64()) for name in info.contextual]
    if info.tasks:
        columns += [("candidate_ids", pa.list_(pa.int64())), ("request_time", pa.int64())]
        columns += [(f"label_{task}", pa.list_(pa.int8())) for task in info.tasks]
    names = [name for name, _ in columns]
    clash = sorted({name for name in names if names.count(name) > 1})
    if clash:
        raise ValueError(f"dataset.json: two columns would be named {clash[0]!r}; rename a feature")
    return pa.schema(columns)


def write_split(
    samples: Iterable[Sample], info: DatasetInfo, folder: Path, *, rows_per_group: int = 1024
) -> int:
    """Streams samples to a file in `folder`, a split of a data set. Returns their number.

    A reader holds a row group in memory: with long histories, choose fewer rows per group.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.parquet")):
        raise ValueError(f"{folder}: already holds Parquet files; remove them or choose another")
    remaining = iter(samples)
    group = list(islice(remaining, rows_per_group))
    if not group:
        raise ValueError(f"{folder}: no samples to write")
    rows = 0
    with pq.ParquetWriter(folder / "part-00000.parquet", schema(info)) as writer:
        while group:
            writer.write_table(_table(group, info))
            rows += len(group)
            group = list(islice(remaining, rows_per_group))
    return rows


def _table(samples: list[Sample], info: DatasetInfo) -> pa.Table:
    def lists(arrays: list[Ids]) -> pa.ListArray:
        offsets = pa.array([0, *accumulate(map(len, arrays))], pa.int32())
        return pa.ListArray.from_arrays(offsets, np.concatenate(arrays))

    columns: list[Any] = [lists([s.items for s in samples])]
    columns.append(lists([s.actions for s in samples]))
    columns.append(lists([s.timestamps for s in samples]))
    columns += list(np.stack([s.contextual for s in samples], axis=1))
    if info.tasks:
        columns.append(lists([s.candidates for s in samples]))
        columns.append([s.request_time for s in samples])
        for bit in range(len(info.tasks)):
            columns.append(lists([s.candidate_labels >> bit & 1 for s in samples]))
    kinds = schema(info)
    arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, kinds, strict=True)]
    return pa.Table.from_arrays(arrays, schema=kinds)


@dataclass(frozen=True)
class Part:
    """Some rows of a row group; for most readers and groups, all of them."""

    file: Path
    group: int
    group_row: int  # of the group's first row, in its file
    rows: range  # in the group


class ParquetSplit:
    """The rows of a split, numbered over its files in order of their names."""

    def __init__(self, root: Path, split: str, info: DatasetInfo) -> None:
        self.info = info
        self.schema = schema(info)
        self.folder = root / split
        self.groups: list[Part] = []
        files = sorted(self.folder.glob("*.parquet"))
        if not files:
            raise ValueError(f"data.path={str(root)!r}: no *.parquet files in {self.folder}")
        for file in files:
            self.groups += _row_groups(file, self.schema)
        self.first_rows = np.cumsum([0] + [len(part.rows) for part in self.groups])
        self.num_rows = int(self.first_rows[-1])

    def parts(self, rows: range) -> list[Part]:
        """The row groups that overlap `rows` of the split, cut to them."""
        parts = []
        for part, first in zip(self.groups, self.first_rows.tolist(), strict=False):
            start = max(rows.start - first, 0)
            stop = min(rows.stop - first, len(part.rows))
            if start < stop:
                parts.append(Part(part.file, part.group, part.group_row, range(start, stop)))
        return parts

    def samples(self, rows: range) -> Iterator[Sample]:
        """In order, once."""
        for part in self.parts(rows):
            block = self.read(part)
            for row in range(len(part.rows)):
                yield block.sample(row)

    def read(self, part: Part) -> Rows:
        """Raises ValueError if the rows are not what the data set says."""
        table = _read_table(part, self.schema)
        return _checked_rows(table, part, self.info)

    def has_row_of(self, column: str, least: int) -> bool:
        """Whether the lists of any row have so many values; reads until it finds one."""
        wanted = pa.schema([self.schema.field(column)])
        for part in self.parts(range(self.num_rows)):
            lists = _list_column(_read_table(part, wanted), column, part)
            if np.diff(lists.offsets).max() >= least:
                return True
        return False

    def item_counts(self, rows: range) -> Ids:
        """Occurrences of each item in the histories."""
        counts = np.zeros(self.info.num_items, np.int64)
        item_ids = pa.schema([self.schema.field("item_ids")])
        for part in self.parts(rows):
            items = _list_column(_read_table(part, item_ids), "item_ids", part)
            _check_range(items, self.info.num_items, "item_ids", part)
            np.add.at(counts, items.values, 1)
        return counts


class ParquetReader:
    """Deals some rows of a training split over and over, each epoch in a new order.

    The order of the row groups, and of the rows inside each, follows from (seed, epoch, index)
    alone, so a position is one number and reaching it opens none of the row groups before it.
    """

    def __init__(self, split: ParquetSplit, rows: range, *, index: int, seed: int) -> None:
        assert len(rows) > 0
        self.split, self.rows, self.index, self.seed = split, rows, index, seed
        self.parts = split.parts(rows)

    def samples(self, skip: int = 0) -> Iterator[Sample]:
        """Endless, without the first `skip` samples."""
        epoch, skip = divmod(skip, len(self.rows))
        while True:
            yield from self._epoch(epoch, skip)
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int, skip: int) -> Iterator[Sample]:
        rng = np.random.default_rng((self.seed, epoch, self.index))
        for k in rng.permutation(len(self.parts)).tolist():
            part = self.parts[k]
            if skip >= len(part.rows):
                skip -= len(part.rows)
                continue
            # Seeded by group: the order inside one does not depend on which were skipped.
            rng_rows = np.random.default_rng((self.seed, epoch, self.index, k))
            block = self.split.read(part)
            for row in rng_rows.permutation(len(part.rows)).tolist()[skip:]:
                yield block.sample(row)
            skip = 0


@dataclass(frozen=True)
class Lists:
    """A list column: the values of row i are values[offsets[i] : offsets[i + 1]]."""

    values: Ids
    offsets: Ids

    def row(self, i: int) -> Ids:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def row_of(self, value: int) -> int:
        """The row that values[value] belongs to."""
        return int(np.searchsorted(self.offsets, value, side="right")) - 1


@dataclass(frozen=True)
class Rows:
    """Checked rows in memory."""

    items: Lists
    actions: Lists
    timestamps: Lists
    contextual: Ids  # [rows, features]
    candidates: Lists | None
    labels: Ids  # one per candidate
    request_times: Ids

    def sample(self, i: int) -> Sample:
        none = np.zeros(0, np.int64)
        ranked = self.candidates
        return Sample(
            contextual=self.contextual[i],
            items=self.items.row(i),
            actions=self.actions.row(i),
            timestamps=self.timestamps.row(i),
            candidates=ranked.row(i) if ranked else none,
            candidate_labels=Lists(self.labels, ranked.offsets).row(i) if ranked else none,
            request_time=int(self.request_times[i]) if ranked else 0,
        )


def _row_groups(file: Path, wanted: pa.Schema) -> list[Part]:
    try:
        with pq.ParquetFile(file) as opened:
            metadata, present = opened.metadata, opened.schema_arrow
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a Parquet file: {error}") from error
    missing = [name for name in wanted.names if name not in present.names]
    if missing:
        raise ValueError(f"{file}: no column {missing[0]!r}; it has {sorted(present.names)}")
    for want in wanted:
        _check_type(file, want, present.field(want.name).type)
    if metadata.num_rows == 0:
        raise ValueError(f"{file}: has no rows; remove the file")
    parts, first = [], 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        parts.append(Part(file, group, first, range(rows)))
        first += rows
    return parts


def _check_type(file: Path, want: pa.Field, found: pa.DataType) -> None:
    """Lists or single values as wanted, of integers (of any size) or booleans."""
    values = found.value_type if _is_list(found) else found
    integers = pa.types.is_integer(values) or pa.types.is_boolean(values)
    integers = integers or pa.types.is_null(values)  # what a writer without types makes of []
    if integers and _is_list(found) == _is_list(want.type):
        return
    kind = "a list of integers" if _is_list(want.type) else "an integer"
    times = " (unix seconds)" if want.name in ("timestamps", "request_time") else ""
    raise ValueError(f"{file}: column {want.name}: want {kind}{times}, found {found}")


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _read_table(part: Part, wanted: pa.Schema) -> pa.Table:
    try:
        with pq.ParquetFile(part.file) as opened:
            # Single-threaded: many processes share a host, and loader workers are forks.
            table = opened.read_row_group(part.group, columns=wanted.names, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{part.file}: cannot read row group {part.group}: {error}") from error
    return table.slice(part.rows.start, len(part.rows))


def _checked_rows(table: pa.Table, part: Part, info: DatasetInfo) -> Rows:
    items, actions, timestamps = (_list_column(table, name, part) for name in EVENT_COLUMNS)
    _check_same_lengths(actions, "action_ids", items, "item_ids", part)
    _check_same_lengths(timestamps, "timestamps", items, "item_ids", part)
    _check_range(items, info.num_items, "item_ids", part)
    _check_range(actions, info.num_actions, "action_ids", part)
    _check_sorted(timestamps, "timestamps", part)
    contextual = np.zeros((table.num_rows, len(info.contextual)), np.int64)
    for k, (name, size) in enumerate(info.contextual.items()):
        contextual[:, k] = _column(table, name, part)
        _check_range(_one_per_row(contextual[:, k]), size, name, part)
    if not info.tasks:
        none = np.zeros(0, np.int64)
        return Rows(items, actions, timestamps, contextual, None, none, none)

    candidates = _list_column(table, "candidate_ids", part)
    _check_range(candidates, info.num_items, "candidate_ids", part)
    labels = np.zeros_like(candidates.values)
    for bit, task in enumerate(info.tasks):
        answers = _list_column(table, f"label_{task}", part)
        _check_same_lengths(answers, f"label_{task}", candidates, "candidate_ids", part)
        _check_range(answers, 2, f"label_{task}", part)
        labels |= answers.values << bit
    request_times = _column(table, "request_time", part)
    return Rows(items, actions, timestamps, contextual, candidates, labels, request_times)


def _column(table: pa.Table, name: str, part: Part) -> Ids:
    column = _cast(table, name, pa.int64(), part)
    _check_no_nulls(_one_per_row(column.is_null().to_numpy(zero_copy_only=False)), name, part)
    return column.to_numpy()


def _list_column(table: pa.Table, name: str, part: Part) -> Lists:
    column = _cast(table, name, pa.large_list(pa.int64()), part)
    _check_no_nulls(_one_per_row(column.is_null().to_numpy(zero_copy_only=False)), name, part)
    # A slice keeps its parent's offsets, while flatten() begins with the slice's first value.
    offsets = column.offsets.to_numpy() - column.offsets[0].as_py()
    values = column.flatten()
    nulls = Lists(values.is_null().to_numpy(zero_copy_only=False), offsets)
    _check_no_nulls(nulls, name, part)
    return Lists(values.to_numpy(), offsets)


def _cast(table: pa.Table, name: str, kind: pa.DataType, part: Part) -> pa.Array:
    try:
        return table[name].cast(kind).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{part.file}: column {name}: {error}") from error


def _one_per_row(values: Ids) -> Lists:
    return Lists(values, np.arange(len(values) + 1))


def _check_no_nulls(nulls: Lists, name: str, part: Part) -> None:
    if nulls.values.any():
        _refuse(part, nulls.row_of(int(nulls.values.argmax())), name, "is or contains null")


def _check_range(ids: Lists, size: int, name: str, part: Part) -> None:
    outside = (ids.values < 0) | (ids.values >= size)
    if outside.any():
        at = int(outside.argmax())
        _refuse(part, ids.row_of(at), name, f"has {ids.values[at]}, not in 0 .. {size - 1}")


def _check_same_lengths(a: Lists, a_name: str, b: Lists, b_name: str, part: Part) -> None:
    lengths = np.diff(a.offsets), np.diff(b.offsets)
    if not np.array_equal(*lengths):
        row = int((lengths[0] != lengths[1]).argmax())
        _refuse(part, row, a_name, f"has {lengths[0][row]} values, {b_name} {lengths[1][row]}")


def _check_sorted(times: Lists, name: str, part: Part) -> None:
    back = np.diff(times.values) < 0
    # From one row to the next, time may go back.
    starts = times.offsets[1:-1]
    back[starts[(starts > 0) & (starts < len(times.values))] - 1] = False
    if back.any():
        at = int(back.argmax())
        _refuse(
            part,
            times.row_of(at),
            name,
            f"go back from {times.values[at]} to {times.values[at + 1]}",
        )


def _refuse(part: Part, row: int, name: str, what: str) -> None:
    raise ValueError(f"{part.file}, row {part.group_row + part.rows.start + row}: {name} {what}")
