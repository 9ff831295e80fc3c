"""One user's history as every source yields it, and what is known of a whole data set."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """Events oldest first. All arrays int64.

    contextual: [c], one id per contextual feature, each in its own vocabulary.
    items, actions, timestamps: [n]; unix seconds, not decreasing.
    candidates: [t] item ids to rank, none for retrieval.
    candidate_labels: [t]; bit i is the label of the data set's task i.
    request_time: unix seconds at which the candidates are ranked.
    """

    contextual: Ids
    items: Ids
    actions: Ids
    timestamps: Ids
    candidates: Ids
    candidate_labels: Ids
    request_time: int


@dataclass(frozen=True)
class DatasetInfo:
    """Vocabularies: ids run from 0 to size - 1. Stored as dataset.json beside Parquet files."""

    num_items: int
    num_actions: int
    contextual: dict[str, int] = field(default_factory=dict)  # feature -> vocabulary size, in order
    tasks: list[str] = field(default_factory=list)  # names of the binary tasks, bit 0 first

    @staticmethod
    def load(path: Path) -> DatasetInfo:
        """Of the data set in a folder. Raises ValueError that names the file and the key."""
        file = path / "dataset.json"
        if not file.is_file():
            raise ValueError(
                f"data.path={str(path)!r}: no dataset.json there; gr-train prepare makes it"
            )
        try:
            found = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file}: want an object with num_items and num_actions")
        for key in ("num_items", "num_actions"):
            if key not in found:
                raise ValueError(f"{file}: lacks {key!r}, a vocabulary size")
        known = [key.name for key in fields(DatasetInfo)]
        for key in found:
            if key not in known:
                raise ValueError(f"{file}: unknown key {key!r}; want some of {', '.join(known)}")
        info = DatasetInfo(**found)
        if not isinstance(info.contextual, dict) or not isinstance(info.tasks, list):
            raise ValueError(
                f"{file}: contextual maps features to vocabulary sizes, tasks is a list of names"
            )
        if len(info.tasks) > 62:
            raise ValueError(f"{file}: {len(info.tasks)} tasks, want at most 62")
        sizes = {"num_items": info.num_items, "num_actions": info.num_actions, **info.contextual}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{file}: {name}={size!r}: want a vocabulary size of at least 1")
        return info

    def save(self, path: Path) -> None:
        (path / "dataset.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
