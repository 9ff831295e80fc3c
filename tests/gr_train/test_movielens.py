"""MovieLens preparation: the three formats, the split by time, errors, and the real 100K file."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gr_train.data.movielens import CSV_HEADER, prepare_movielens
from gr_train.data.parquet import ParquetSplit
from gr_train.data.sample import DatasetInfo, Sample

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "ml-100k" / "u.data.gz"

# user, movie, rating, time; user 7 rated two movies at time 30 and user 9 too few
RATINGS = [
    (7, 50, 4, 30),
    (9, 50, 1, 99),
    (7, 20, 2, 30),
    (7, 90, 5, 10),
    (7, 10, 1, 20),
    (7, 40, 3, 40),
]


def text(kind: str, ratings: list[tuple[float, ...]] = RATINGS) -> str:
    separator = {"100K": "\t", "1M": "::", "20M": ","}[kind]
    lines = [CSV_HEADER] if kind == "20M" else []
    lines += [separator.join(map(str, row)) for row in ratings]
    return "\n".join(lines) + "\n"


def read(out: Path, split: str) -> list[Sample]:
    rows = ParquetSplit(out, split, DatasetInfo.load(out))
    return list(rows.samples(range(rows.num_rows)))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ["100K", "1M", "20M"])
def test_formats_and_leave_one_out(tmp_path, kind, zipped):
    file = tmp_path / "any_name"
    data = text(kind).encode()
    file.write_bytes(gzip.compress(data) if zipped else data)
    prepared = prepare_movielens(file, tmp_path / "out")
    assert (prepared.users, prepared.skipped_users) == (1, 1)
    assert (prepared.items, prepared.ratings) == (5, 5)
    assert DatasetInfo.load(tmp_path / "out") == DatasetInfo(num_items=5, num_actions=5)
    movies = pq.read_table(tmp_path / "out" / "items.parquet")
    assert movies["item_id"].to_pylist() == [0, 1, 2, 3, 4]
    assert movies["movie_id"].to_pylist() == [10, 20, 40, 50, 90]
    whole = [4, 0, 3, 1, 2]  # by time; the tie at 30 in the file's order
    for split, length in (("train", 3), ("valid", 4), ("test", 5)):
        (sample,) = read(tmp_path / "out", split)
        assert sample.items.tolist() == whole[:length]
        assert sample.actions.tolist() == [4, 0, 3, 1, 2][:length]
        assert sample.timestamps.tolist() == [10, 20, 30, 30, 40][:length]


def test_half_stars_are_ten_actions(tmp_path):
    ratings = [(1, k, k / 2, k) for k in range(1, 11)]
    (tmp_path / "ratings.csv").write_text(text("20M", ratings))
    prepare_movielens(tmp_path / "ratings.csv", tmp_path / "out")
    assert DatasetInfo.load(tmp_path / "out").num_actions == 10
    (sample,) = read(tmp_path / "out", "test")
    assert sample.actions.tolist() == list(range(10))


def test_ranking_holds_out_what_it_asks(tmp_path):
    """With 2 candidates, a user's 7 ratings: the test asks for the last 2, valid for 2 before."""
    ratings = [(1, 10 * k, 1 + k % 5, k) for k in range(7)] + [(2, 10, 5, k) for k in range(6)]
    (tmp_path / "u.data").write_text(text("100K", ratings))
    prepared = prepare_movielens(
        tmp_path / "u.data", tmp_path / "out", task="ranking", num_candidates=2
    )
    assert (prepared.users, prepared.skipped_users) == (1, 1)
    for split, end in (("train", 3), ("valid", 5), ("test", 7)):
        (sample,) = read(tmp_path / "out", split)
        assert sample.items.tolist() == list(range(end - 2))
        assert sample.candidates.tolist() == [end - 2, end - 1]
        assert sample.candidate_labels.tolist() == [int(1 + k % 5 >= 4) for k in (end - 2, end - 1)]
        assert sample.request_time == end - 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (text("20M") + "1,2,x,4\n", "ratings, line 8: .*'x'"),
        (text("1M") + "1::2::3\n", "ratings, line 7: "),
        (text("100K") + "1\t\t3\t4\n", "ratings, line 7: "),
        (text("20M") + "1,2,5.5,4\n", "ratings, line 8: rating 5.5"),
        (text("100K") + "1\t2\t0\t4\n", "ratings, line 7: rating 0, want"),
        ("user,item\n", "ratings, line 1: 'user,item' is none of"),
        ("", "ratings, line 1: '' is none of"),
        (CSV_HEADER + "\n", "no user has the 4 ratings"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    (tmp_path / "ratings").write_text(content)
    with pytest.raises(ValueError, match=message):
        prepare_movielens(tmp_path / "ratings", tmp_path / "out")


def test_missing_and_cut_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file"):
        prepare_movielens(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(text("100K").encode() * 1000)[:-50])
    with pytest.raises(ValueError, match=r"cut\.gz"):
        prepare_movielens(tmp_path / "cut.gz", tmp_path / "out")


@pytest.mark.skipif(not REAL.is_file(), reason="MovieLens-100K is not beside the repository")
def test_real_file(tmp_path):
    prepared = prepare_movielens(REAL, tmp_path)
    assert (prepared.users, prepared.items, prepared.ratings) == (943, 1682, 100_000)
    assert prepared.skipped_users == 0
    assert DatasetInfo.load(tmp_path).num_actions == 5
    train, test = read(tmp_path, "train"), read(tmp_path, "test")
    assert sum(len(s.items) for s in train) == 100_000 - 2 * 943
    assert sum(len(s.items) for s in test) == 100_000
    for short, whole in zip(train, test, strict=True):
        np.testing.assert_array_equal(short.items, whole.items[:-2])
