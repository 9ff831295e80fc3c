"""Gradients laid out as their inputs.

Where the inputs of an operation are columns of one buffer, the gradients that it leaves are columns
of one buffer as well, which the backward pass before it takes whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor


def empty_gradients(*inputs: Tensor) -> list[Tensor]:
    """Uninitialized, of the inputs' shapes and dtypes; of columns of one buffer, such columns."""
    if not are_columns(inputs):
        return [x.new_empty(x.shape) for x in inputs]
    rows, row = inputs[0].shape[0], inputs[0].stride(0)
    start = min(_start(x) for x in inputs)
    whole = inputs[0].new_empty(rows * row)
    return [whole.as_strided(x.shape, x.stride(), _start(x) - start) for x in inputs]


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Parts [rows, width_i] as one [rows, sum of widths]: a view, if they lie like that already."""
    follows = all(_start(x) + x.shape[1] == _start(y) for x, y in pairwise(parts))
    if not follows or not are_columns(parts):
        return torch.cat(list(parts), 1)
    first, width = parts[0], sum(x.shape[1] for x in parts)
    return first.as_strided((first.shape[0], width), first.stride())


def are_columns(parts: Sequence[Tensor]) -> bool:
    """Whether these are different columns of the same rows of one buffer."""
    if any(type(x) is not Tensor for x in parts):
        return False  # traced by torch.compile: they have no memory
    rows = _rows(parts[0])
    if not all(_rows(x) == rows and is_packed(x) for x in parts):
        return False
    spans = sorted((_start(x), _start(x) + prod(x.shape[1:])) for x in parts)
    apart = all(x[1] <= y[0] for x, y in pairwise(spans))
    return apart and spans[-1][1] - spans[0][0] <= parts[0].stride(0)


def _rows(x: Tensor) -> tuple[object, ...]:
    return x.untyped_storage().data_ptr(), x.dtype, x.shape[0], x.stride(0)


def is_packed(x: Tensor) -> bool:
    """Whether each row [...] is contiguous."""
    packed = 1
    for size, stride in zip(x.shape[:0:-1], x.stride()[:0:-1], strict=True):
        if stride != packed and size != 1:
            return False
        packed *= size
    return True


def _start(x: Tensor) -> int:
    return int(x.storage_offset())
