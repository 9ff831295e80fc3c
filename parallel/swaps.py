"""Rows from every rank of a cp group to every other, each pair's by one message of the link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kernels.source import Arrival
from parallel.links import Links
from parallel.transport import Transport


@dataclass(frozen=True)
class Route:
    """By what link, and between whom; the same on every rank."""

    link: Transport
    name: str  # of the messages
    most_rows: dict[int, int]  # of a message to the rank so many further, if there is any

    @staticmethod
    def of(counts: Tensor, links: Links, name: str) -> Route:
        """counts: int64 [rank, owner], how many rows of each owner each rank gets."""
        most_rows: dict[int, int] = {}
        for rank, owner in (counts > 0).nonzero().tolist():
            if rank != owner:
                shift = (rank - owner) % len(counts)
                most_rows[shift] = max(most_rows.get(shift, 0), int(counts[rank, owner]))
        return Route(links.across or links.within, name, dict(sorted(most_rows.items())))

    def reversed(self) -> Route:
        size = self.link.group.size()
        most_rows = {size - shift: rows for shift, rows in reversed(self.most_rows.items())}
        return replace(self, name=f"gradients of {self.name}", most_rows=most_rows)


class Swaps:
    """On their way."""

    def __init__(
        self,
        send: Tensor,
        send_splits: Sequence[int],
        receive_splits: Sequence[int],
        route: Route,
    ) -> None:
        """send: [sum(send_splits), width], rank after rank. Splits: rows to and from each rank."""
        link, width = route.link, send.shape[1]
        rank, size = link.group.rank(), link.group.size()
        self.link, self.dtype = link, send.dtype
        self.leaving = send.split(list(send_splits))
        self.coming = [send.new_empty(0, width)] * size
        self.arrivals: list[Arrival] = []
        for shift, most in route.most_rows.items():  # first all inboxes: while they grow, all wait
            source = (rank - shift) % size
            numel = receive_splits[source] * width
            place = link.inbox(_inbox(route, shift), numel, most * width, send.dtype)
            self.coming[source] = place.view(-1, width)
        for shift in route.most_rows:
            to, source = (rank + shift) % size, (rank - shift) % size
            ends = to if send_splits[to] else None, source if receive_splits[source] else None
            if ends == (None, None):
                continue
            message, place = (self.leaving[to],), self.coming[source].view(-1)
            arrival = link.swap(_inbox(route, shift), message, ends[0], place, ends[1])
            if receive_splits[source]:
                self.arrivals.append(arrival)

    def arrive(self) -> list[Tensor]:
        """What came from each rank, in the link's inboxes: until the next swaps of this name."""
        for arrival in self.arrivals:
            arrival.wait()
        return self.coming

    def settle(self) -> None:
        """What is enqueued from now on may overwrite what was sent. Until then it must be kept;
        later than `arrive`: who only sends need not wait for ranks that are late to receive."""
        for message in self.leaving:
            self.link.settle(message)


def _inbox(route: Route, shift: int) -> str:
    return f"{route.name} {shift} ranks away"
