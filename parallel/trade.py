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


class Swaps:
    """Rows for every rank of a cp group, and from each, on their way by the group's link."""

    def __init__(
        self,
        send: Tensor,
        send_splits: Sequence[int],
        receive_splits: Sequence[int],
        *,
        name: str,
        link: Transport,
        shifts: Sequence[int],
        most: int,
    ) -> None:
        """send, and splits: as of `begin_trade`.

        name: of the messages. shifts: how many ranks further any rows go, rising. most: rows of the
        largest message. All three the same on every rank.
        """
        rank, size, width = link.group.rank(), link.group.size(), send.shape[1]
        self.link, self.leaving = link, send.split(list(send_splits))
        self.coming = [send.new_empty(0, width)] * size
        self.arrivals: list[Arrival] = []
        for shift in shifts:
            to, source = (rank + shift) % size, (rank - shift) % size
            inbox = f"{name} {shift} ranks away"
            place = link.inbox(inbox, receive_splits[source] * width, most * width, send.dtype)
            self.coming[source] = place.view(-1, width)
            if send_splits[to] or receive_splits[source]:
                arrival = link.swap(inbox, (self.leaving[to],), to, place, source)
                self.arrivals += [arrival] * (receive_splits[source] > 0)

    def arrive(self) -> list[Tensor]:
        """What came from each rank, in the link's inboxes: until the next swaps of this name."""
        for arrival in self.arrivals:
            arrival.wait()
        return self.coming

    def settle(self) -> None:
        """What is enqueued from now on may overwrite what was sent. Until then it must be kept;
        later than `arrive`, so that nothing waits for ranks that are late to receive."""
        for message in self.leaving:
            self.link.settle(message)


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
