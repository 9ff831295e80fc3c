"""Ends a process that waits too long for another rank, and says what it was doing.

A GPU that waits raises nothing by itself. Operations that wait for others are put on a list with an
event behind them; a thread looks whether the oldest goes on. On a CPU the process group's own
timeout raises, and the error gets the same words.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import torch


class Event(Protocol):
    """What `torch.cuda.Event` offers here."""

    def query(self) -> bool: ...


class Watchdog:
    """Of one process."""

    def __init__(self, rank: int, timeout: timedelta, device: torch.device) -> None:
        self.rank, self.timeout, self.device = rank, timeout, device
        self.where = "start"
        self._pending: deque[tuple[float, str, Event]] = deque()
        self._thread: threading.Thread | None = None

    @contextmanager
    def doing(self, what: str, *, beside: bool = False) -> Iterator[None]:
        """Around a part of the job in which other ranks may fail this one; errors will name it.

        beside: in a thread, while the main thread does something else.
        On a GPU an error ends the process: to clean up would be to wait for the device, which may
        wait for a rank that is gone.
        """
        before = self.where
        if not beside:
            self.where = what
        try:
            yield
        except RuntimeError as error:
            message = self._named(what, error)
            if self.device.type == "cuda":
                traceback.print_exc()
                self._give_up(message)
            raise RuntimeError(message) from error
        finally:
            if not beside:
                self.where = before

    @contextmanager
    def operation(self, operation: str) -> Iterator[None]:
        """Around what the host (CPU) or the current stream (GPU) waits for another rank in."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(self._named(f"{self.where}: {operation}", error)) from error
        if self.device.type == "cuda":
            self.watch(operation, torch.cuda.current_stream(self.device).record_event())

    def watch(self, operation: str, event: Event) -> None:
        """`event` is recorded behind `operation`, and must come within the timeout."""
        self._pending.append((time.monotonic(), f"{self.where}: {operation}", event))
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
            self._thread.start()

    def _look(self) -> None:
        if self.device.type == "cuda" and torch.cuda.is_available():
            # Or asking for an event would make a context on device 0.
            torch.cuda.set_device(self.device)
        timeout = self.timeout.total_seconds()
        moved = time.monotonic()
        while True:
            time.sleep(min(1.0, timeout / 10))
            while self._pending and self._is_done(self._pending[0]):
                self._pending.popleft()
                moved = time.monotonic()
            if self._pending:
                since, operation, _ = self._pending[0]
                if time.monotonic() - max(since, moved) > timeout:
                    self._give_up(f"rank {self.rank}: {operation}: {self._waited()}")

    def _named(self, what: str, error: RuntimeError) -> str:
        """The error with rank and operation before it, unless something within has named them."""
        rank, message = f"rank {self.rank}: ", str(error)
        if message.startswith(rank):
            return message
        if "Timed out waiting" in message:  # gloo's words
            message = f"{self._waited()}: {message}"
        return f"{rank}{what}: {message}"

    def _waited(self) -> str:
        waited = f"nothing for {self.timeout.total_seconds():.0f} s (parallel.timeout_s)"
        return f"{waited}; another rank hangs or has died"

    def _is_done(self, waiting: tuple[float, str, Event]) -> bool:
        _, operation, event = waiting
        try:
            return event.query()
        except RuntimeError as error:  # what the device did before it has failed
            self._give_up(f"rank {self.rank}: {operation}: {error}")
            raise

    def _give_up(self, message: str) -> None:
        """Without cleaning up: the device cannot be stopped, nor threads that wait for it."""
        print(f"{message}. Ending the job.", file=sys.stderr, flush=True)
        os._exit(1)
