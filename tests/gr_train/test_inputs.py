"""Index lists of the rows a model reads."""

from __future__ import annotations

import pytest
import torch

from gr_train.model.inputs import make_inputs
from parallel.batch import JaggedBatch
from parallel.layout import LAYOUTS
from parallel.shard import shard_batch

CONTEXTUAL = ["age", "country"]


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("style", ["merged", "interleaved"])
@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_counted_labels_are_those_found(task: str, style: str, last_only: bool) -> None:
    """Also in sequences cut short: every length with every number of targets."""
    sizes = torch.tensor([(n, t) for n in range(8) for t in range(n + 1)], dtype=torch.int32)
    lengths, num_targets = sizes.T.contiguous()
    tokens = torch.arange(int(lengths.sum()))
    names = ("id", "action", "gap", "label")
    batch = JaggedBatch(lengths, num_targets, dict.fromkeys(names, tokens))
    inputs = make_inputs(
        shard_batch(batch, LAYOUTS["zigzag"](1), None),
        contextual=CONTEXTUAL,
        task=task,
        style=style,
        time_buckets=8,
        last_only=last_only,
    )
    assert inputs.num_labels == inputs.label_rows.numel() > 0
