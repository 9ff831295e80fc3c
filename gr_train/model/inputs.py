"""From a shard of ids to the rows a model reads.

Which kind of token sits where follows from (position, length, targets), known on the host for every
rank; so all index lists are made there, in advance, and nothing waits for the device. Two styles:

interleaved  contextual..., item, action, item, action, ..., candidate, candidate, ...
merged       contextual..., item + action, item + action, ..., candidate, candidate, ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.row_sums import Sum, Term, sum_rows
from kernels.transfer import copy_together
from parallel.shard import Shard


@dataclass(frozen=True)
class Inputs:
    """What one forward pass looks up and where it goes: on the device but for ids; int64."""

    ids: dict[str, Tensor]  # embedding feature -> ids, on the host
    rows: dict[str, Tensor]  # the same features -> rows of this rank they are added to
    positions: Tensor  # int32 [rows]: all candidates share one, the end of the history
    buckets: Tensor  # int32 [rows]: of the time since the token before
    label_rows: Tensor  # rows that predict something
    labels: Tensor  # what they predict: the next item (retrieval), a bitmask of tasks (ranking)
    label_ids: Tensor  # the same, on the host
    num_labels: int  # of all processes together


def make_inputs(
    shard: Shard,
    *,
    contextual: Sequence[str],
    task: str,
    style: str,
    time_buckets: int,
    last_only: bool,
) -> Inputs:
    """Index lists of this rank's rows.

    contextual: names of the contextual features, one token each, in order.
    time_buckets: how many there are.
    last_only: retrieval predicts from the last history token alone (evaluation).
    """
    rows = shard.rows
    sequence, position = rows.sequence_ids(), rows.positions
    history = (shard.lengths - shard.num_targets)[sequence]
    event_token = position - len(contextual)
    is_target = position >= history
    is_event = (event_token >= 0) & ~is_target
    if style == "merged":
        is_action, is_item, predicts = is_event, is_event | is_target, is_event
    else:
        is_action = is_event & (event_token % 2 == 1)
        is_item = (is_event & (event_token % 2 == 0)) | is_target
        predicts = is_action
    if task == "ranking":
        predicts = is_target
    elif last_only:
        predicts = predicts & (position == history - 1)

    def where(mask: Tensor) -> Tensor:
        return mask.nonzero()[:, 0]

    at = {"item": where(is_item), "action": where(is_action)}
    for index, name in enumerate(contextual):
        at[name] = where((position == index) & ~is_target)
    source = {"action": shard.tokens["action" if style == "merged" else "id"]}
    ids = {name: source.get(name, shard.tokens["id"])[index] for name, index in at.items()}
    label_rows = where(predicts)
    label_ids = shard.tokens["label"][label_rows]
    label_rows, labels, *indices = copy_together(
        [label_rows, label_ids, *at.values()], shard.device
    )
    positions, buckets = copy_together(
        [torch.minimum(position, history), bucket_of(shard.tokens["gap"], time_buckets)],
        shard.device,
    )
    lengths, num_targets = shard.of_all or (shard.lengths, shard.num_targets)
    num_labels = count_labels(
        lengths,
        num_targets,
        num_contextual=len(contextual),
        task=task,
        style=style,
        last_only=last_only,
    )
    rows_of = dict(zip(at, indices, strict=True))
    return Inputs(ids, rows_of, positions, buckets, label_rows, labels, label_ids, num_labels)


def count_labels(
    lengths: Tensor,
    num_targets: Tensor,
    *,
    num_contextual: int,
    task: str,
    style: str,
    last_only: bool,
) -> int:
    """Label rows in whole sequences, as `make_inputs` finds them in the shards of these."""
    if task == "ranking":
        return int(num_targets.sum())
    event_tokens = (lengths - num_targets - num_contextual).clamp(min=0)
    per_event = 1 if style == "merged" else 2
    if last_only:
        return int(((event_tokens > 0) & (event_tokens % per_event == 0)).sum())
    return int((event_tokens // per_event).sum())


def bucket_of(gap: Tensor, buckets: int) -> Tensor:
    """HSTU's floor(log(max(gap, 1)) / 0.301) (arXiv 2402.17152): seconds -> bucket ids, int32.

    Zeros if there are no buckets.
    """
    if not buckets:
        return torch.zeros_like(gap, dtype=torch.int32)
    return (gap.clamp(min=1).double().log() / 0.301).floor().int().clamp(max=buckets - 1)


class InputEncoder(nn.Module):
    """Adds to what the tables say of each token its position and the time since the one before."""

    def __init__(self, width: int, max_length: int, buckets: int, dropout: float) -> None:
        super().__init__()
        self.position = nn.Embedding(max_length + 1, width)
        self.time = nn.Embedding(buckets, width) if buckets else None
        self.dropout = nn.Dropout(dropout)
        for module in filter(None, (self.position, self.time)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, embedded: Tensor, inputs: Inputs) -> Tensor:
        """[rows, width], from and to the same dtype."""
        tables, terms = [self.position.weight], [Term(0, inputs.positions)]
        if self.time is not None:
            tables.append(self.time.weight)
            terms.append(Term(1, inputs.buckets))
        (x,) = sum_rows(tables, [Sum(len(embedded), embedded.dtype, terms, embedded)])
        return self.dropout(x)


def init_linear(linear: nn.Linear) -> nn.Linear:
    """Normal weights of variance 1 / fan-in, zero bias."""
    nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
