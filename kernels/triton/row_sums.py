"""Sums of rows of tables, and the sums of gradients that each of those rows gets.

The second are of sorted keys: programs take an even share of the entries each, whatever their keys,
and add up those of equal ones. A sum that begins or ends in another program's share is written to a
list, and the list, sorted as it is, goes the same way.
"""

# ruff: noqa: N803 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.integers import cdiv, next_power_of_2
from kernels.triton.launcher import remembered
from kernels.triton.rows import block_at, block_shape, load_block, store_block

ENTRIES = 64  # of a program; each list is at most 2 / 64 as long as the one before
AT_ONCE = 8  # rows that a program asks for before it adds them up
COLUMNS = 512

Taken = tuple[Tensor, Tensor | None]  # int32 [n] rows of a table; int64 [n] places in the sum


def forward(
    tables: Sequence[Tensor],
    taken: Sequence[Taken],
    add: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """[rows, width]: `add` plus what is taken from each of the tables, summed in float32. All are
    contiguous."""
    num_rows, width = shape
    out = torch.empty(shape, dtype=dtype, device=tables[0].device)
    rows, places = taken[0]
    if len(taken) > 1 or places is not None:
        columns = rows.new_full((len(taken), num_rows), -1)
        for column, (rows, places) in zip(columns, taken, strict=True):
            if places is None:
                column.copy_(rows)
            else:
                column[places] = rows
    else:
        columns = rows.contiguous()
    if num_rows:
        block_rows, block, warps = block_shape(width)
        sum_rows_kernel[(cdiv(num_rows, block_rows),)](
            tuple(tables),
            columns,
            add,
            out,
            num_rows,
            WIDTH=width,
            ROWS=block_rows,
            COLUMNS=block,
            num_warps=warps,
        )
    return out


def add_gradients(grad: Tensor, taken: Sequence[Taken], dout: Tensor, fresh: bool) -> None:
    """To each row of grad, float32 [R, width], the sum of those of dout [rows, width] that took it.

    fresh: grad is all zeros.
    """
    dout = dout.contiguous()
    keys, places = taken[0]
    if len(taken) > 1:
        every = torch.arange(len(dout), device=dout.device)
        keys = torch.cat([rows for rows, _ in taken])
        places = torch.cat([every if places is None else places for _, places in taken])
    if len(keys):
        keys, order = keys.sort(stable=True)
        rows = order if places is None else places[order]
        _add_segments(grad, keys, rows, dout, fresh)


def _add_segments(grad: Tensor, keys: Tensor, rows: Tensor | None, x: Tensor, fresh: bool) -> None:
    """keys: int32 [n], sorted, of x's rows, or of x itself if None."""
    n, width = len(keys), grad.shape[1]
    columns = min(COLUMNS, next_power_of_2(width))
    chunks, strips = cdiv(n, ENTRIES), cdiv(width, columns)
    parts, part_keys = grad.new_empty(2 * chunks, width), keys.new_empty(2 * chunks)
    segment_sums_kernel[(chunks * strips,)](
        keys,
        rows,
        x,
        grad,
        part_keys,
        parts,
        n,
        WIDTH=width,
        STRIPS=strips,
        ENTRIES=ENTRIES,
        AT_ONCE=AT_ONCE,
        COLUMNS=columns,
        ADD=not fresh,
        num_warps=4,
    )
    if chunks > 1:  # else there are none: asked here, so that one kernel does for all
        _add_segments(grad, part_keys, None, parts, fresh=False)


@remembered
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["columns_ptr"])
def sum_rows_kernel(
    tables,
    columns_ptr,
    add_ptr,
    out_ptr,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, inside = block_at(tl.program_id(0), 0, num_rows, WIDTH, ROWS, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if add_ptr is not None:
        total += load_block(add_ptr, WIDTH, rows, columns, inside).to(tl.float32)
    for i in tl.static_range(len(tables)):
        at = columns_ptr + num_rows.to(tl.int64) * i + rows
        taken = tl.load(at, mask=rows < num_rows, other=-1).to(tl.int64)
        takes = inside & (taken >= 0)[:, None]
        total += load_block(tables[i], WIDTH, taken, columns, takes).to(tl.float32)
    store_block(out_ptr, WIDTH, total, rows, columns, inside)


@remembered
@triton.jit(do_not_specialize=["num_entries"], do_not_specialize_on_alignment=["keys_ptr"])
def segment_sums_kernel(
    keys_ptr,
    rows_ptr,
    x_ptr,
    sums_ptr,
    part_keys_ptr,
    parts_ptr,
    num_entries,
    WIDTH: tl.constexpr,
    STRIPS: tl.constexpr,
    ENTRIES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Adds to sums [., WIDTH], zeros unless ADD, those of equal keys.

    Of a program's first and last sum, if others have a part in it, what is found here goes to parts
    [2 x programs, WIDTH] instead.
    """
    chunk = tl.program_id(0) // STRIPS
    strip = tl.program_id(0) % STRIPS
    columns = strip * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < WIDTH
    first = chunk * ENTRIES
    last = tl.minimum(first + ENTRIES, num_entries) - 1
    first_key = tl.load(keys_ptr + first)
    last_key = tl.load(keys_ptr + last)
    begun = (first > 0) & (tl.load(keys_ptr + first - 1, mask=first > 0, other=-1) == first_key)
    more = last + 1 < num_entries
    unfinished = more & (tl.load(keys_ptr + last + 1, mask=more, other=-1) == last_key)
    parts = parts_ptr + chunk.to(tl.int64) * (2 * WIDTH) + columns
    # Those of whole sums stay zeros: the next list is sorted as it is.
    tl.store(parts, tl.zeros([COLUMNS], tl.float32), mask=within & ~begun)
    alone = begun & (first_key == last_key)
    zeros = within & (alone | ~unfinished)
    tl.store(parts + WIDTH, tl.zeros([COLUMNS], tl.float32), mask=zeros)
    if strip == 0:
        tl.store(part_keys_ptr + 2 * chunk, first_key)
        tl.store(part_keys_ptr + 2 * chunk + 1, last_key)

    total = tl.zeros([COLUMNS], tl.float32)
    for group in range(first, last + 1, AT_ONCE):
        found = ()
        for i in tl.static_range(AT_ONCE):  # nothing here waits for anything but keys and rows
            entry = group + i
            inside = entry <= last
            key = tl.load(keys_ptr + entry, mask=inside, other=-1)
            row = entry.to(tl.int64)
            if rows_ptr is not None:
                row = tl.load(rows_ptr + entry, mask=inside, other=0)
            x = tl.load(x_ptr + row * WIDTH + columns, mask=within & inside, other=0)
            following = tl.load(keys_ptr + entry + 1, mask=entry < last, other=-1)
            ends = inside & (key != following)
            shared = (begun & (key == first_key)) | (unfinished & (key == last_key))
            whole = within & ends & ~shared
            before = 0.0
            if ADD:
                before = tl.load(sums_ptr + key.to(tl.int64) * WIDTH + columns, mask=whole)
            found = found + ((x, before, key, ends, shared),)  # type: ignore[assignment] # noqa: RUF005
        for i in tl.static_range(AT_ONCE):
            x, before, key, ends, shared = found[i]
            total += x.to(tl.float32)
            to = sums_ptr + key.to(tl.int64) * WIDTH + columns
            tl.store(to, before + total, mask=within & ends & ~shared)
            is_first = begun & (key == first_key)
            to = parts + tl.where(is_first, 0, WIDTH)
            tl.store(to, total, mask=within & ends & shared)
            total = tl.where(ends, 0.0, total)
