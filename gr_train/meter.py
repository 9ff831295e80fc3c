"""Loss and pace between two lines of the log, over all processes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.watchdog import Watchdog


class Meter:
    """Sums on the device; only `read` makes the host wait for it."""

    def __init__(self, device: torch.device, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = self.tokens = 0
        self.windows: list[tuple[float, float]] = []  # tokens of all processes, seconds
        self.since = time.perf_counter()

    def add(self, loss: Tensor, tokens: int) -> None:
        """One step: this process's loss, whose mean over processes is the loss, and its tokens."""
        self.loss += loss
        self.steps += 1
        self.tokens += tokens

    def read(self) -> tuple[float, float]:
        """Mean loss and tokens a second since the last call. Collective."""
        sums = self._over_ranks([self.loss / self.steps, self.loss.new_tensor(self.tokens)])
        loss, tokens = sums[0] / dist.get_world_size(), sums[1]
        self.windows.append((tokens, time.perf_counter() - self.since))
        self.loss.zero_()
        self.steps = self.tokens = 0
        self.since = time.perf_counter()
        return loss, tokens / self.windows[-1][1]

    def is_finite(self) -> bool:
        """Whether every process's loss has been, of each step since the last `read`. Collective."""
        return math.isfinite(self._over_ranks([self.loss])[0])

    def _over_ranks(self, values: list[Tensor]) -> list[float]:
        sums = torch.stack(values)
        with self.watchdog.operation("sum of losses"):
            dist.all_reduce(sums)
        return sums.tolist()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    @property
    def tokens_per_s(self) -> float:
        """Over all windows but the first, which warms up, if there are others."""
        windows = self.windows[1:] or self.windows
        return sum(tokens for tokens, _ in windows) / sum(seconds for _, seconds in windows)
