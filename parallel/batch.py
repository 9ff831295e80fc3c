"""A batch of jagged token features, as a reader makes it and before it is cut into shards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class JaggedBatch:
    """B whole sequences on the host. Everything a loss needs travels as a token feature.

    lengths: int32 [B], tokens per sequence: contextual, then history, then targets.
    num_targets: int32 [B], how many of them are targets.
    tokens: name -> int64 [T] with T = lengths.sum(), rows of the sequences concatenated.
    costs: float64 [B], the work in each sequence. If given, the sequences of all processes are
        dealt to the dp groups so that these have equal work; if not, they stay where they are read.
    """

    lengths: Tensor
    num_targets: Tensor
    tokens: dict[str, Tensor]
    costs: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("lengths", "num_targets"):
            if getattr(self, name).dtype != torch.int32:
                raise ValueError(f"{name}: want int32, got {getattr(self, name).dtype}")
        total = int(self.lengths.sum())
        for name, x in self.tokens.items():
            if x.dtype != torch.int64 or x.shape != (total,):
                raise ValueError(
                    f"tokens[{name!r}]: want int64 [{total}], the sum of lengths, "
                    f"got {x.dtype} {tuple(x.shape)}"
                )
        if self.num_targets.shape != self.lengths.shape:
            raise ValueError(f"num_targets: want shape {tuple(self.lengths.shape)} like lengths")
        if bool((self.num_targets < 0).any()):
            raise ValueError("num_targets: a sequence has fewer than 0")
        if bool((self.num_targets > self.lengths).any()):
            raise ValueError("num_targets: a sequence has more targets than tokens")
        if self.costs is not None and self.costs.shape != self.lengths.shape:
            raise ValueError(f"costs: want shape {tuple(self.lengths.shape)} like lengths")

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())
