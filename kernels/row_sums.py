"""Rows of tables looked up and added up: one pass over memory forward, one for each table backward.

What a token has (item, action, position, ...) is a row of a table each, and their sum is what the
model begins with. A row that many tokens take gets the sum of their gradients, in a fixed order:
the same bits in every run, however many they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import accumulator, takes_triton


@dataclass(frozen=True)
class Term:
    """Which row of a table each row of a sum takes.

    table: its number; rows: int32 [n], of the table; places: int64 [n], all different, the rows of
    the sum that take them. None: all, in order.
    """

    table: int
    rows: Tensor
    places: Tensor | None = None


@dataclass(frozen=True)
class Sum:
    """[num_rows, width] of a dtype: what the terms take from tables, and `add` if given.

    add: [num_rows, width], contiguous.
    """

    num_rows: int
    dtype: torch.dtype
    terms: Sequence[Term]
    add: Tensor | None = None


def sum_rows(
    tables: Sequence[Tensor],
    sums: Sequence[Sum],
    *,
    on_gradient: Mapping[int, Callable[[Tensor], None]] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Each of the sums, added up in float32 at least. tables: [R, width] each, contiguous.

    Of a table's gradient only the rows are added up that are taken; others are zeros. Values of
    `rows` and `places` are not checked on a GPU.
    on_gradient: table -> what to call with its gradient, before those of later tables are computed
    (on a GPU alone; elsewhere all come at once).
    backend: see `kernels.backend`.
    Raises ValueError, naming the argument, for shapes and dtypes that do not fit.
    """
    _check(tables, sums)
    adds = [x.add for x in sums]
    every = [*tables, *(x for x in adds if x is not None)]
    if all(takes_triton(backend, x) for x in every):
        return list(_SumRows.apply(sums, len(tables), on_gradient or {}, *tables, *adds))
    return [naive_sum(tables, x) for x in sums]


def naive_sum(tables: Sequence[Tensor], total: Sum) -> Tensor:
    """One sum, for PyTorch's autograd."""
    dtype = accumulator(tables[0].dtype)
    x = tables[0].new_zeros(total.num_rows, tables[0].shape[1], dtype=dtype)
    if total.add is not None:
        x = x + total.add
    for term in total.terms:
        found = F.embedding(term.rows, tables[term.table]).to(dtype)
        x = x + found if term.places is None else x.index_add(0, term.places, found)
    return x.to(total.dtype)


def take_rows(x: Tensor, rows: Tensor, *, backend: str = "auto") -> Tensor:
    """x[rows]. x: [R, width]; rows: int64 [n], all different, so that no gradients are added up."""
    if not takes_triton(backend, x):
        return x.index_select(0, rows)
    return _TakeRows.apply(x, rows)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sums: Sequence[Sum],
        num_tables: int,
        on_gradient: Mapping[int, Callable[[Tensor], None]],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        from kernels.triton import row_sums

        tables: Any = tensors[:num_tables]
        ctx.on_gradient = on_gradient
        ctx.terms = [x.terms for x in sums]
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in tensors]
        return tuple(
            row_sums.forward(
                [tables[term.table] for term in x.terms],
                [(term.rows, term.places) for term in x.terms],
                add,
                (x.num_rows, tables[0].shape[1]),
                x.dtype,
            )
            for x, add in zip(sums, tensors[num_tables:], strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        from kernels.triton import row_sums

        num_tables = len(ctx.like) - len(douts)
        grads: list[Tensor | None] = []
        for table in range(num_tables):
            if not ctx.needs_input_grad[3 + table]:
                grads.append(None)
                continue
            shape, dtype = ctx.like[table]
            grad, fresh = torch.zeros(shape, dtype=torch.float32, device=douts[0].device), True
            for terms, dout in zip(ctx.terms, douts, strict=True):
                taken = [(term.rows, term.places) for term in terms if term.table == table]
                if taken:
                    row_sums.add_gradients(grad, taken, dout, fresh)
                    fresh = False
            grads.append(grad.to(dtype))
            if table in ctx.on_gradient:
                ctx.on_gradient[table](grads[-1])
        for like, dout in zip(ctx.like[num_tables:], douts, strict=True):
            grads.append(None if like is None else dout.to(like[1]))
        return None, None, None, *grads


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = len(x)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from kernels.triton import row_sums

        (rows,) = ctx.saved_tensors
        own = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        shape = ctx.num_rows, dout.shape[1]
        return row_sums.forward([dout.contiguous()], [(own, rows)], None, shape, dout.dtype), None


def _check(tables: Sequence[Tensor], sums: Sequence[Sum]) -> None:
    if not tables:
        raise ValueError("tables: want at least one")
    for x in tables:
        if x.dim() != 2 or not x.is_floating_point() or x.shape[1] != tables[0].shape[1]:
            raise ValueError(
                f"tables: want numbers [rows, {tables[0].shape[-1]}], got {x.dtype} "
                f"{tuple(x.shape)}"
            )
        if not x.is_contiguous():
            raise ValueError(f"tables: rows must be contiguous, strides are {x.stride()}")
    for total in sums:
        shape = total.num_rows, tables[0].shape[1]
        if total.add is not None and (total.add.shape != shape or not total.add.is_contiguous()):
            raise ValueError(
                f"add: want contiguous {shape}, got {tuple(total.add.shape)}, strides "
                f"{total.add.stride()}"
            )
        if not total.terms:
            raise ValueError("terms: want at least one in each sum")
        for term in total.terms:
            if not 0 <= term.table < len(tables):
                raise ValueError(f"table: there is no number {term.table} among {len(tables)}")
            count = total.num_rows if term.places is None else len(term.places)
            if term.rows.dtype != torch.int32 or term.rows.shape != (count,):
                raise ValueError(
                    f"rows: want int32 [{count}], got {term.rows.dtype} {tuple(term.rows.shape)}"
                )
            if term.places is not None and term.places.dtype != torch.int64:
                raise ValueError(f"places: want int64, got {term.places.dtype}")
