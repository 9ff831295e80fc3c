"""The next thing is made by another thread while the one before is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Iterates over what `count` calls of `make` return.

    Each call is made when its result is wanted, or earlier and beside the user's own work, once the
    user says `begin`. `make` may use collectives that the user does not; `settle` is for when the
    user needs them. threaded: else `begin` does nothing.
    """

    def __init__(self, make: Callable[[], T], count: int, *, threaded: bool) -> None:
        self.make, self.left, self.threaded = make, count, threaded
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self.next: Future[T] | None = None

    def __iter__(self) -> Iterator[T]:
        with self.pool:
            while self.left:
                self.left -= 1
                begun, self.next = self.next, None
                yield begun.result() if begun else self.make()

    def begin(self) -> None:
        """Make the next one now, if there is one to come."""
        if self.threaded and self.left and self.next is None:
            self.next = self.pool.submit(self.make)

    def settle(self) -> None:
        """Wait until nothing is being made; nothing will be until `begin`."""
        if self.next is not None:
            self.next.exception()  # raised when it is asked for
