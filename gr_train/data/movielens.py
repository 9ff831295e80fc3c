"""Raw MovieLens ratings to a Parquet data set, split by time: `gr-train prepare movielens`.

Reads the files as GroupLens ships them, told apart by their content and gzipped or not: 100K's
u.data (tabs), 1M's ratings.dat (::) and 20M's ratings.csv (with a header).

A user is a sequence of ratings, oldest first: the item is the movie (dense ids, in order of the raw
ids, which items.parquet keeps), the action is the rating. The end of every user is held out:
the test split has the whole sequence, valid lacks its end and train lacks as much again. Retrieval
holds out one event; ranking holds out the `num_candidates` events that are the candidates, so that
no split is trained on what another asks.
"""

from __future__ import annotations

import gzip
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gr_train.data.parquet import write_split
from gr_train.data.sample import DatasetInfo, Ids, Sample

logger = logging.getLogger(__name__)

COLUMNS = {
    "user": pa.int64(),
    "movie": pa.int64(),
    "rating": pa.float64(),
    "timestamp": pa.int64(),
}
CSV_HEADER = "userId,movieId,rating,timestamp"
NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Counts:
    """What `prepare_movielens` wrote."""

    users: int
    skipped_users: int  # with too few ratings for the splits
    items: int
    ratings: int  # of the users that were kept


def prepare_movielens(
    file: Path,
    out: Path,
    *,
    task: Literal["retrieval", "ranking"] = "retrieval",
    num_candidates: int = 10,
    positive_rating: float = 4.0,
) -> Counts:
    """Writes a data set to `out`. A ranked candidate is liked from `positive_rating` on."""
    if task == "ranking" and num_candidates < 1:
        raise ValueError(f"num_candidates={num_candidates}: want at least 1")
    ratings = _read(file)
    movies, items = np.unique(ratings.movies, return_inverse=True)
    # Five whole ratings, or ten where the file has half stars. A file's rows break ties in time.
    per_star = 1 if np.array_equal(ratings.values, np.round(ratings.values)) else 2
    order = np.lexsort((ratings.timestamps, ratings.users))
    events = _Events(
        items=items[order],
        actions=(ratings.values[order] * per_star).astype(np.int64) - 1,
        timestamps=ratings.timestamps[order],
        liked=(ratings.values[order] >= positive_rating).astype(np.int64),
    )
    info = DatasetInfo(
        num_items=len(movies),
        num_actions=5 * per_star,
        tasks=["like"] if task == "ranking" else [],
    )

    held_out = 1 if task == "retrieval" else num_candidates
    fewest = 2 * held_out + (2 if task == "retrieval" else num_candidates + 1)
    users, counts = np.unique(ratings.users, return_counts=True)
    stops = np.cumsum(counts)
    kept = np.flatnonzero(counts >= fewest)
    if len(kept) == 0:
        raise ValueError(f"{file}: no user has the {fewest} ratings that task={task!r} takes")

    out.mkdir(parents=True, exist_ok=True)
    targets = num_candidates if task == "ranking" else 0
    for split, cut in (("train", 2 * held_out), ("valid", held_out), ("test", 0)):
        spans = zip((stops - counts)[kept].tolist(), (stops - cut)[kept].tolist(), strict=True)
        write_split(
            (events.sample(start, stop, targets) for start, stop in spans), info, out / split
        )
    ids = pa.table({"item_id": np.arange(len(movies)), "movie_id": movies})
    pq.write_table(ids, out / "items.parquet")
    info.save(out)

    written = Counts(len(kept), len(users) - len(kept), len(movies), int(counts[kept].sum()))
    logger.info("%s: %s; a user needs %d ratings", out, written, fewest)
    return written


@dataclass(frozen=True)
class _Events:
    """Of all users, one user after the other, each oldest first."""

    items: Ids
    actions: Ids
    timestamps: Ids
    liked: Ids

    def sample(self, start: int, stop: int, num_targets: int) -> Sample:
        history, targets = slice(start, stop - num_targets), slice(stop - num_targets, stop)
        return Sample(
            contextual=NONE,
            items=self.items[history],
            actions=self.actions[history],
            timestamps=self.timestamps[history],
            candidates=self.items[targets],
            candidate_labels=self.liked[targets],
            request_time=int(self.timestamps[targets.start]) if num_targets else 0,
        )


@dataclass(frozen=True)
class _Ratings:
    users: Ids
    movies: Ids
    values: NDArray[np.float64]
    timestamps: Ids


def _read(file: Path) -> _Ratings:
    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; want MovieLens' u.data, ratings.dat or ratings.csv"
        )
    try:
        with file.open("rb") as opened:
            gzipped = opened.read(2) == b"\x1f\x8b"
        with (gzip.open if gzipped else open)(file, "rt", errors="replace") as text:
            first_line = text.readline(1000).strip()
        delimiter, names, header = _format(file, first_line)
        with pa.input_stream(str(file), compression="gzip" if gzipped else None) as stream:
            table = pyarrow.csv.read_csv(
                stream,
                # One thread: only then do errors tell the line.
                pyarrow.csv.ReadOptions(column_names=names, skip_rows=header, use_threads=False),
                pyarrow.csv.ParseOptions(
                    delimiter=delimiter, quote_char=False, ignore_empty_lines=False
                ),
                pyarrow.csv.ConvertOptions(
                    column_types=COLUMNS, include_columns=list(COLUMNS), null_values=[]
                ),
            )
    except (pa.ArrowInvalid, OSError, EOFError) as error:
        line = re.search(r"Row #(\d+): ", str(error))
        where = f"{file}, line {line[1]}" if line else str(file)
        raise ValueError(f"{where}: {error}") from error
    columns = [table[name].to_numpy() for name in COLUMNS]
    ratings = _Ratings(*columns)
    stars = ratings.values * 2
    bad = ~((stars >= 1) & (stars <= 10) & (stars == np.round(stars)))
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"{file}, line {row + 1 + header}: rating {ratings.values[row]:g}, "
            "want 0.5 to 5 in steps of 0.5"
        )
    return ratings


def _format(file: Path, first_line: str) -> tuple[str, list[str], int]:
    """Delimiter, names of the columns it makes, and lines of header."""
    if first_line == CSV_HEADER:
        return ",", list(COLUMNS), 1
    if first_line.count("\t") == 3:
        return "\t", list(COLUMNS), 0
    if first_line.count("::") == 3:  # a ":" on its own leaves an empty column in between
        return ":", ["user", "_1", "movie", "_2", "rating", "_3", "timestamp"], 0
    raise ValueError(
        f"{file}, line 1: {first_line[:80]!r} is none of MovieLens' formats: "
        f"user, movie, rating, timestamp between tabs or '::', or the header {CSV_HEADER!r}"
    )
