"""A jagged all-to-all: rows for every rank of a group, and from it; and their order around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor


def trade_rows(
    send: Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: dist.ProcessGroup | None,
) -> Tensor:
    """send: [sum(send_splits), ...], rank after rank. Returns [sum(receive_splits), ...], likewise.

    Splits are numbers of rows, each by rank of the group (None: all processes). Collective.
    """
    return _trade(send, send_splits, receive_splits, group, beside=False)[0]


def begin_trade(
    send: Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: dist.ProcessGroup | None,
) -> Callable[[], Tensor]:
    """`trade_rows` beside what comes next: call what is returned for the rows."""
    received, work = _trade(send, send_splits, receive_splits, group, beside=True)
    assert work is not None

    def arrive() -> Tensor:
        work.wait()
        return received

    return arrive


def _trade(
    send: Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: dist.ProcessGroup | None,
    beside: bool,
) -> tuple[Tensor, dist.Work | None]:
    received = send.new_empty(sum(receive_splits), *send.shape[1:])
    splits = list(receive_splits), list(send_splits)
    return received, dist.all_to_all_single(received, send, *splits, group=group, async_op=beside)


def regroup(x: Tensor, counts: Sequence[Sequence[int]]) -> Tensor:
    """Rows of (i, j), i after i and j after j in each, as many as counts[i][j]: to j after j.

    x itself if that is their order.
    """
    if sum(any(of_i) for of_i in counts) < 2 or sum(map(any, zip(*counts, strict=True))) < 2:
        return x
    pieces = x.split(list(chain.from_iterable(counts)))
    columns = len(counts[0])
    return torch.cat([piece for j in range(columns) for piece in pieces[j::columns]])
