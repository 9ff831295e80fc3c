"""Rows that attention goes through: here already, or on their way from another device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from kernels.weighting import Weighting


class Arrival(ABC):
    """Of rows on their way."""

    @abstractmethod
    def wait(self) -> None:
        """What is enqueued from now on finds the rows; on a CPU, the host waits."""

    def signal(self) -> tuple[Tensor, int] | None:
        """An int32 in this device's memory, and the least it says once the rows are there, after
        `wait` at the latest: a kernel can look. None: there is no such number.
        """
        return None


@dataclass(frozen=True)
class Source:
    """Keys and values that queries see, or queries and their outputs' gradients that see keys.

    rows: [T, H, Dqk] and [T, H, Dv]. arrival: None if they are here.
    """

    rows: tuple[Tensor, Tensor]
    weighting: Weighting
    arrival: Arrival | None = None
