"""Tensors [T, H, D] as kernels read and write them: rows aligned, heads padded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.triton.integers import next_power_of_2


class Target:
    """Where a kernel writes: `wanted` itself, or what it takes a copy from if heads are padded."""

    def __init__(self, wanted: Tensor, add: Tensor | None) -> None:
        self.wanted, self.dim = wanted, wanted.shape[2]
        dim = padded_dim(self.dim)
        padded = dim != self.dim
        self.written = wanted.new_empty(*wanted.shape[:2], dim) if padded else wanted
        self.out = rows_of(self.written)
        self.add = (None, 0) if add is None else rows_of(_padded(add) if padded else add)

    def sums_of_left(self) -> Tensor:
        """Float32 [T, H, padded dim], contiguous: what is added, which a tile has read by then, or
        where it will write, if that will do."""
        for x in self.add[0], self.written:
            if x is not None and x.dtype == torch.float32 and x.is_contiguous():
                return x
        return torch.empty(self.written.shape, dtype=torch.float32, device=self.written.device)

    def is_ready(self, dtype: torch.dtype) -> bool:
        """Whether a descriptor of this dtype can write here."""
        return is_ready(self.written, dtype)

    def finish(self) -> Tensor:
        if self.written is not self.wanted:
            self.wanted.copy_(self.written[..., : self.dim])
        return self.wanted


class Through:
    """What a gradient [T, H, D] is taken back through before it is written: silu(before + bias).

    before: [T, H, D]; bias: [H, D]; dbias: float32 [H, D], overwritten by `finish`, which comes
    after the launch that `arguments` are of.
    """

    def __init__(self, before: Tensor, bias: Tensor, dbias: Tensor) -> None:
        self.before, self.bias, self.dbias = before, bias, dbias

    def of_heads(self, start: int, end: int) -> Through:
        return Through(self.before[:, start:end], self.bias[start:end], self.dbias[start:end])

    def arguments(self, parts: int) -> tuple[object, ...]:
        """Of a kernel whose programs of so many parts leave sums over their rows, each its own."""
        self.sums = self.bias.new_zeros(parts, *self.bias.shape, dtype=torch.float32)
        return *rows_of(self.before), self.bias.contiguous(), self.sums

    def finish(self) -> None:
        torch.sum(self.sums, 0, out=self.dbias)


NOT_THROUGH = None, 0, None, None


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x [T, H, D] and its stride from row to row; a row itself must be contiguous."""
    _, heads, dim = x.shape
    row, head, one = x.stride()
    assert one == 1
    assert heads == 1 or head == dim
    return x, row


def nothing(add: Tensor | None, out: Tensor) -> Tensor:
    return out.zero_() if add is None else out.copy_(add)


def ready(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x [T, H, D] with rows as descriptors want them: contiguous, apart, aligned; heads padded."""
    dtype = dtype or x.dtype
    if is_ready(x, dtype):
        return x
    x = _padded(x.to(dtype))
    return x if is_ready(x, dtype) else x.clone(memory_format=torch.contiguous_format)


def is_ready(x: Tensor, dtype: torch.dtype) -> bool:
    _, heads, dim = x.shape
    row, head, one = x.stride()
    packed = one == 1 and (heads == 1 or head == dim) and row >= heads * dim
    aligned = row * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0
    return packed and aligned and x.dtype == dtype and dim == padded_dim(dim)


def _padded(x: Tensor) -> Tensor:
    """Head dim up to a power of two, at least 32, with zeros: they add nothing to any product."""
    more = padded_dim(x.shape[2]) - x.shape[2]
    return F.pad(x, (0, more)) if more else x


def padded_dim(dim: int) -> int:
    return max(32, next_power_of_2(dim))
