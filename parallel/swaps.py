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
        return Route(links.direct, name, dict(sorted(most_rows.items())))

    def reversed(self) -> Route:
        size = self.link.group.size()
        most_rows = {size - shift: rows for shift, rows in reversed(self.most_rows.items())}
        return replace(self, name=f"sums for {self.name}", most_rows=most_rows)


class Swaps:
    """Rows on their way along a route."""

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
        self.leaving = send.split_with_sizes(list(send_splits))
        self.coming = [send.new_empty(0, width)] * size
        self.arrivals: list[Arrival] = []
        ways = []
        for shift, most in route.most_rows.items():  # first all inboxes: while they grow, all wait
            to, source = (rank + shift) % size, (rank - shift) % size
            name, numel = f"{route.name} {shift} ranks away", receive_splits[source] * width
            place = link.inbox(name, numel, most * width, send.dtype)
            self.coming[source] = place.view(-1, width)
            if numel or send_splits[to]:
                ways.append((name, (self.leaving[to],), to, place, source))
        for way in ways:
            arrival = link.swap(*way)
            if receive_splits[way[-1]]:
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
