"""A jagged all-to-all: rows for every rank of a group, and from it; and their order around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.source import Arrival
from parallel.transport import Transport


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


def begin_swaps(
    send: Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    *,
    name: str,
    link: Transport,
    shifts: Sequence[int],
    most: int,
) -> Callable[[], list[Tensor]]:
    """`begin_trade` by a cp group's link: the rows of each rank, in the link's inboxes.

    name: of the messages. shifts: how many ranks further any rows go, rising. most: rows of the
    largest message. All three the same on every rank. The next trade of this name may overwrite
    what has come.
    """
    rank, size, width = link.group.rank(), link.group.size(), send.shape[1]
    leaving = send.split(list(send_splits))
    coming = [send.new_empty(0, width)] * size
    arrivals: list[Arrival] = []
    for shift in shifts:
        to, source = (rank + shift) % size, (rank - shift) % size
        inbox = f"{name} {shift} ranks away"
        place = link.inbox(inbox, receive_splits[source] * width, most * width, send.dtype)
        arrivals.append(link.swap(inbox, (leaving[to],), to, place, source))
        coming[source] = place.view(-1, width)

    def arrive() -> list[Tensor]:
        for arrival in arrivals:
            arrival.wait()
        for message in leaving:
            link.settle(message)
        return coming

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
