"""Activations that the backward pass computes again instead of finding them kept.

For a layer that trades time for memory without running its attention twice, nor attention's
communication (selective rematerialisation, as in ULTRA-HSTU, arXiv 2602.16986).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.backend import compute_dtype


@dataclass
class _Kept:
    """What autograd holds in a tensor's place: the tensor, or which part of what is rebuilt."""

    tensor: Tensor | None
    source: int = -1
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0


class Recomputation:
    """A context for a forward pass, whose saved tensors can be forgotten after it.

    with Recomputation(x) as kept:
        ...                           # hidden is computed from x, and saved by some operations
    kept.forget([hidden], lambda: [project(x.detach())])

    The first operation in the backward that wants a forgotten tensor, or a view of one, has all of
    them rebuilt, without autograd and under the forward's autocast; each is freed again after its
    last use. `rebuild` must hold no tensor that needs a gradient, or nothing is ever freed.
    """

    def __init__(self, x: Tensor) -> None:
        self.autocast = (x.device.type, compute_dtype(x), torch.is_autocast_enabled(x.device.type))
        self.saved: list[_Kept] = []
        self.rebuilt: dict[int, Tensor] = {}
        self.uses: Counter[int] = Counter()  # of each forgotten tensor, in one backward pass
        self.uses_left: Counter[int] = Counter()

    def __enter__(self) -> Recomputation:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        del self.hooks  # a cycle of references, which would outlive the backward pass

    def forget(self, tensors: Sequence[Tensor], rebuild: Callable[[], Sequence[Tensor]]) -> None:
        """Forget what was saved of the memory of `tensors`; `rebuild` returns the same again."""
        self.rebuild = rebuild
        sources = {x.untyped_storage().data_ptr(): i for i, x in enumerate(tensors) if x.numel()}
        for kept in self.saved:
            x = kept.tensor
            assert x is not None
            source = sources.get(x.untyped_storage().data_ptr())
            if source is not None:
                kept.tensor, kept.source = None, source
                kept.size, kept.stride, kept.offset = x.size(), x.stride(), int(x.storage_offset())
                self.uses[source] += 1
        self.saved.clear()

    def _pack(self, x: Tensor) -> _Kept:
        self.saved.append(_Kept(x.detach()))
        return self.saved[-1]

    def _unpack(self, kept: _Kept) -> Tensor:
        if kept.tensor is not None:
            return kept.tensor
        if kept.source not in self.rebuilt:
            device, dtype, enabled = self.autocast
            with torch.no_grad(), torch.autocast(device, dtype, enabled=enabled):
                self.rebuilt = dict(enumerate(self.rebuild()))
            self.uses_left = self.uses.copy()
        part = self.rebuilt[kept.source].as_strided(kept.size, kept.stride, kept.offset)
        self.uses_left[kept.source] -= 1
        if self.uses_left[kept.source] == 0:
            del self.rebuilt[kept.source]
        return part
