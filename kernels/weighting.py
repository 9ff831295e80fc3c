"""How queries weigh keys: all that attention needs to know beside q, k and v."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from kernels.jagged import Jagged


@dataclass(frozen=True, eq=False)
class Weighting:
    """w_ij = scale * silu(alpha * q_i . k_j) for the keys j that query i sees, else 0.

    queries, keys: the rows of q, and of k and v; the same B sequences.
    intervals: int32 [Tq, 4], see `kernels.masks`.

    The tensors must not be written into once it has been used.
    """

    queries: Jagged
    keys: Jagged
    intervals: Tensor
    alpha: float
    scale: float

    @cached_property
    def plans(self) -> dict[object, Any]:
        """What kernels have found out about it, by what they asked."""
        return {}
