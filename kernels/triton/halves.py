"""What halves of tiles do not see: kernels that compute tiles by halves need not look at it.

Next to an edge of the mask are blocks that one half of a tile has nothing to do with, such as, at
the diagonal of a causal mask, the last block of the keys for the first half of a query tile.
"""

# ruff: noqa: N803 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launcher import remembered
from kernels.triton.masked import QUARTERS, find_masked, load_masked, queries_of
from kernels.triton.runs import (
    CARRIER_AT,
    HALVES_AT,
    MASKED_RUNS,
    RECORD,
    RIDERS_AT,
    load_rows,
    number_at,
    query_rows,
    runs_at,
)

TOLD = tl.constexpr(31)  # masked blocks that are told of; any after them may be seen


def mark_halves(records: Tensor, bounds: Tensor, tile: int, block: int, of_keys: bool) -> Tensor:
    """Records of one source, int32 [tiles, 1, RECORD], in which it is written. bounds: a plan's.

    Of key tiles, that few queries ride along in the last masked block is written there as well.
    """
    _mark_kernel[(len(records),)](
        records, bounds, TILE=tile, BLOCK=block, OF_KEYS=of_keys, num_warps=4
    )
    return records


@triton.jit
def unseen_by(record, half: tl.constexpr):
    """For `is_unseen`."""
    return number_at(record, HALVES_AT + half)


@triton.jit
def is_unseen(unseen, block):
    """Whether a half has nothing to do with a masked block, one of those of `load_masked`."""
    return (unseen >> tl.minimum(block, TOLD)) & 1 == 1


@remembered
@triton.jit
def _mark_kernel(
    records_ptr, bounds_ptr, TILE: tl.constexpr, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr
):
    record = records_ptr + tl.program_id(0).to(tl.int64) * RECORD
    if OF_KEYS:
        riders = _have_ride(record, BLOCK)
    else:
        tl.store(record + CARRIER_AT, 0)
    masked, second, runs = load_masked(record, MASKED_RUNS, BLOCK)
    row0, own, _rider0, _count = load_rows(record)
    tile_rows, tile_inside, _some = query_rows(record, 0, TILE)
    of_first_half = tl.arange(0, TILE) < TILE // 2
    first_unseen, second_unseen = 0, 0
    for block in range(tl.minimum(masked, TOLD)):
        row, end = find_masked(runs, second, block, BLOCK)
        queries, inside = tile_rows, tile_inside
        if OF_KEYS:
            carries = (block == masked - 1) & (riders[0] < riders[1])
            queries, inside = queries_of(row, end, tl.arange(0, BLOCK), riders, carries, BLOCK)
        at = bounds_ptr + queries.to(tl.int64) * 4 + tl.where(block < second, 2, 0)
        low = tl.load(at, mask=inside, other=0)
        high = tl.load(at + 1, mask=inside, other=0)
        some = inside & (low < high)
        if OF_KEYS:
            end_row = row0 + own
            middle = tl.minimum(row0 + TILE // 2, end_row)
            in_first = some & (low < middle) & (high > row0)
            in_second = some & (low < end_row) & (high > middle) & (middle < end_row)
        else:
            some = some & (low < row + BLOCK) & (high > row)
            in_first, in_second = some & of_first_half, some & ~of_first_half
        first_unseen |= (1 - tl.max(in_first.to(tl.int32))) << block
        second_unseen |= (1 - tl.max(in_second.to(tl.int32))) << block
    tl.store(record + HALVES_AT, first_unseen)
    tl.store(record + HALVES_AT + 1, second_unseen)


@triton.jit
def _have_ride(record, BLOCK: tl.constexpr):
    """Of a key tile: if the first masked run of the first interval is of few queries, such as
    contextual tokens, and the last masked block has room for them, they ride along in that one,
    instead of being a block of their own. Returns them."""
    at: tl.constexpr = runs_at(1)
    room: tl.constexpr = BLOCK // QUARTERS
    first, end = tl.load(record + at), tl.load(record + at + 1)
    left = 0  # rows of the last masked block, if the first run is not its own
    for run in tl.static_range(1, MASKED_RUNS):
        rows = tl.load(record + at + 2 * run + 1) - tl.load(record + at + 2 * run)
        left = tl.where(rows > 0, (rows - 1) % BLOCK + 1, left)
    ride = (first < end) & (end - first <= room) & (left > 0) & (left <= BLOCK - room)
    masked, _second, _runs = load_masked(record, MASKED_RUNS, BLOCK)
    first, end = tl.where(ride, first, 0), tl.where(ride, end, 0)
    tl.debug_barrier()  # all threads have read
    tl.store(record + RIDERS_AT, first)
    tl.store(record + RIDERS_AT + 1, end)
    tl.store(record + CARRIER_AT, tl.where(ride, masked - 1, 0))  # they were a block before
    if ride:
        tl.store(record + at, 0)
        tl.store(record + at + 1, 0)
    tl.debug_barrier()
    return first, end
