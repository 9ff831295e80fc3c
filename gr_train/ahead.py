"""The next thing is made by another thread while the one before is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Iterates over what `count` calls of `make` return, one call ahead of its user.

    `make` may use collectives that the user does not; `settle` is for when the user needs them.
    threaded: else each call is made when its result is wanted.
    """

    def __init__(self, make: Callable[[], T], count: int, *, threaded: bool) -> None:
        self.make, self.left, self.threaded = make, count, threaded
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self.next: Future[T] | None = None

    def __iter__(self) -> Iterator[T]:
        with self.pool:
            while self.left:
                self.left -= 1
                if not self.threaded:
                    yield self.make()
                    continue
                current = self.next or self.pool.submit(self.make)
                made = current.result()
                self.next = self.pool.submit(self.make) if self.left else None
                yield made

    def settle(self) -> None:
        """Wait until nothing is being made; nothing will be until the next one is asked for."""
        if self.next is not None:
            self.next.exception()  # raised when it is asked for
