"""The next things are made by another thread while the one before is in use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")

# So many are made beforehand. With one, what is begun late in a use of the one before has to be
# made in the rest of it; with two, making one may take as long as using one.
DEPTH = 2


class Ahead(Generic[T]):
    """Iterates over what `count` calls of `make` return.

    Each call is made when its result is wanted, or earlier and beside the user's own work, once the
    user says `begin`; always one after the other. `make` may use collectives that the user does
    not; `settle` is for when the user needs them. threaded: else `begin` does nothing.
    """

    def __init__(self, make: Callable[[], T], count: int, *, threaded: bool) -> None:
        self.make, self.left, self.threaded = make, count, threaded
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self.begun: deque[Future[T]] = deque()
        self.over = False

    def __iter__(self) -> Iterator[T]:
        try:
            while self.left:
                self.left -= 1
                yield self.begun.popleft().result() if self.begun else self._make()
        finally:
            self.over = True
            self.pool.shutdown()

    def _make(self) -> T:
        """Not after one that failed: other ranks' messages would be met by those of the next."""
        if self.over:
            raise RuntimeError("nothing is made any more")
        try:
            return self.make()
        except BaseException:
            self.over = True
            raise

    def begin(self) -> None:
        """Make the next ones now, if there are any to come."""
        while self.threaded and len(self.begun) < min(DEPTH, self.left):
            self.begun.append(self.pool.submit(self._make))

    def settle(self) -> None:
        """Wait until nothing is being made; nothing will be until `begin`."""
        for future in self.begun:
            future.exception()  # raised when it is asked for
