"""Samples to one jagged batch of token features: what a loader yields and a model reads.

Token features, all int64 [T]:

- id: in the vocabulary of the token's kind (the k-th contextual feature, items or actions).
- action: of the event, on its one token (style "merged"); 0 on every other token.
- gap: seconds since the previous event; 0 for contextual tokens and the very first event.
- label: retrieval: the next event's item; ranking: a target's bitmask of tasks; -1: no label.

A token's kind and position are not stored. They follow from its place in the sequence, the
sequence's length and its number of targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from gr_train.data.sample import Ids, Sample
from parallel.batch import JaggedBatch

FEATURES = ("id", "action", "gap", "label")
Task = Literal["retrieval", "ranking"]
Style = Literal["interleaved", "merged"]


def collate(
    samples: Sequence[Sample], *, task: Task, style: Style, num_contextual: int, max_length: int
) -> JaggedBatch:
    """One sequence per sample; one with nothing to learn from has no tokens.

    Retrieval: an event is asked for the item of the next one, so the last event is only a label.
    Ranking: all events are history, and each candidate is a target.
    A sequence longer than `max_length` tokens loses its oldest events.
    """
    sequences = []
    num_targets = []
    for sample in samples:
        assert len(sample.contextual) == num_contextual
        build = _retrieval if task == "retrieval" else _ranking
        sequence = build(sample, style, max_length)
        sequences.append(sequence)
        num_targets.append(len(sample.candidates) if task == "ranking" else 0)
    rows = np.concatenate([np.zeros((len(FEATURES), 0), np.int64), *sequences], axis=1)
    return JaggedBatch(
        lengths=torch.tensor([s.shape[1] for s in sequences], dtype=torch.int32),
        num_targets=torch.tensor(num_targets, dtype=torch.int32),
        tokens={name: torch.from_numpy(rows[k].copy()) for k, name in enumerate(FEATURES)},
    )


def _retrieval(sample: Sample, style: Style, max_length: int) -> Ids:
    if len(sample.items) < 2:
        return _rows(0)
    contextual = _contextual(sample)
    room = (max_length - contextual.shape[1]) // _tokens_per_event(style)
    if room < 1:
        raise ValueError(
            f"data.max_length={max_length}: no event fits after {contextual.shape[1]} "
            f"contextual tokens; want at least {contextual.shape[1] + _tokens_per_event(style)}"
        )
    events = slice(max(len(sample.items) - 1 - room, 0), len(sample.items) - 1)
    labels = sample.items[events.start + 1 :]
    return np.concatenate([contextual, _history(sample, events, labels, style)], axis=1)


def _ranking(sample: Sample, style: Style, max_length: int) -> Ids:
    if len(sample.candidates) == 0:
        return _rows(0)
    contextual, targets = _contextual(sample), _targets(sample)
    fixed = contextual.shape[1] + targets.shape[1]
    least = fixed + (_tokens_per_event(style) if len(sample.items) else 0)
    if least > max_length:
        raise ValueError(
            f"data.max_length={max_length}: no event fits beside {contextual.shape[1]} contextual "
            f"tokens and {targets.shape[1]} candidates, which are all kept; want at least {least}"
        )
    room = (max_length - fixed) // _tokens_per_event(style)
    events = slice(max(len(sample.items) - room, 0), len(sample.items))
    unlabelled = np.full(len(sample.items[events]), -1)
    return np.concatenate(
        [contextual, _history(sample, events, unlabelled, style), targets], axis=1
    )


def _contextual(sample: Sample) -> Ids:
    return _rows(len(sample.contextual), id=sample.contextual)


def _history(sample: Sample, events: slice, labels: Ids, style: Style) -> Ids:
    # On the full history: truncation must not change the gap of the first event that is kept.
    gaps = np.diff(sample.timestamps, prepend=sample.timestamps[:1])[events]
    items, actions = sample.items[events], sample.actions[events]
    if style == "merged":
        return _rows(len(items), id=items, action=actions, gap=gaps, label=labels)
    # The label sits on the action token: by then the model has seen the whole event.
    return _rows(
        2 * len(items),
        id=np.stack([items, actions], axis=1).reshape(-1),
        gap=np.repeat(gaps, 2),
        label=np.stack([np.full_like(labels, -1), labels], axis=1).reshape(-1),
    )


def _targets(sample: Sample) -> Ids:
    last = int(sample.timestamps[-1]) if len(sample.timestamps) else sample.request_time
    return _rows(
        len(sample.candidates),
        id=sample.candidates,
        gap=max(sample.request_time - last, 0),
        label=sample.candidate_labels,
    )


def _tokens_per_event(style: Style) -> int:
    return 1 if style == "merged" else 2


def _rows(
    count: int,
    *,
    id: Ids | int = 0,
    action: Ids | int = 0,
    gap: Ids | int = 0,
    label: Ids | int = -1,
) -> Ids:
    rows = np.empty((len(FEATURES), count), np.int64)
    for row, value in zip(rows, (id, action, gap, label), strict=True):
        row[:] = value
    return rows
