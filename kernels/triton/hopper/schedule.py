"""Tiles handed out, and masks drawn, by a warp of its own: it waits for memory, so that those that
fetch and compute need not. What a tile is, and what is masked of it, they find in shared memory.
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.triton.hopper.masks import draw_masks
from kernels.triton.hopper.pipeline import begin_to_fill, fetch, fetch_piece, give, turn
from kernels.triton.hopper.records import (
    BLOCKS_AT,
    HEAD_AT,
    LIST_AT,
    nth_record,
    number_in,
    of_list,
)
from kernels.triton.masked import QUARTERS
from kernels.triton.runs import RECORD, RIDERS_AT, RUNS, RUNS_AT, load_rows

# Before so many blocks of a tile the next one is claimed. Who claims one long before its turn makes
# a tail; where all tiles are short, that is less than what is gained, even two tiles before (there
# is room for as many as a kernel has records).
AHEAD = gl.constexpr(4)
# Whoever asks for a tile waits for a division by the number of heads: a product instead, and for
# places less than 2**SHIFT one too many at most.
SHIFT = gl.constexpr(30)


@gluon.jit
def hand_out(lists, counters_ptr, of_schedule, of_masks, BLOCK: gl.constexpr, heads):
    """One warp's: all tiles that have rows, in turn; those of two lists by turns.

    lists: of each its records, where it is written how many, and how many more there are.
    counters_ptr: int32 [2], zero before and after a launch. of_schedule: of `schedule`, and
    whether tiles are claimed as soon as there is room for a record. of_masks: a plan's bounds, and
    where to draw those of the last list's tiles, which are of keys; or None. BLOCK: a block's rows.
    """
    records, claim, early = of_schedule
    # Counted from the first on: a program whose multiprocessor is busy elsewhere comes late. And in
    # no order with other accesses, which would have each claim wait for them and empty the cache.
    place = gl.atomic_add(counters_ptr, 1, sem="relaxed")
    inverse = gl.cdiv(1 << SHIFT, heads)
    counted = ()
    for each in gl.static_range(len(lists)):
        in_list = lists[each][0], gl.load(lists[each][1]) + lists[each][2]
        counted = counted + (in_list,)  # type: ignore[assignment] # noqa: RUF005
    count = counted[0][1] * heads
    if len(lists) == 2:
        count += counted[1][1] * heads
    i = 0  # tiles so far
    m = 0  # masks
    while place < count:
        which, head, record = _locate(place, counted, heads, inverse)
        if load_rows(record)[3] > 0:
            _announce(records, i, record, head, which, BLOCK)
            if of_masks is not None:  # noqa: SIM102 (known to the compiler)
                if which == len(lists) - 1:
                    m = draw_masks(records, i, of_masks, m, BLOCK)
            if early == 0:
                mbarrier.wait(claim.index(0), i & 1)  # few of its blocks are still to be fetched
            i += 1
        place = gl.atomic_add(counters_ptr, 1, sem="relaxed")
    _announce(records, i, lists[0][0], -1, 1, BLOCK)
    if gl.atomic_add(counters_ptr + 1, 1) == gl.num_programs(0) - 1:  # the last program
        gl.store(counters_ptr, 0)
        gl.store(counters_ptr + 1, 0)


@gluon.jit
def _locate(place, lists, heads, inverse):
    """The list of a place, the head, and the record."""
    tile = (place.to(gl.int64) * inverse >> SHIFT).to(gl.int32)
    head = place - tile * heads
    tile, head = gl.where(head < 0, tile - 1, tile), gl.where(head < 0, head + heads, head)
    if len(lists) == 1:
        return 0, head, _record_at(lists[0][0], tile)
    else:
        pairs = gl.minimum(lists[0][1], lists[1][1])
        paired = tile < 2 * pairs
        which = gl.where(paired, tile % 2, gl.where(lists[1][1] > pairs, 1, 0))
        at = gl.where(paired, tile // 2, tile - pairs)
        first, second = _record_at(lists[0][0], at), _record_at(lists[1][0], at)
        return which, head, gl.where(which == 0, first, second)


@gluon.jit
def _record_at(tiles_ptr, tile):
    return tiles_ptr + tile.to(gl.int64) * RECORD


@gluon.jit
def _announce(records, n, record, head, which, BLOCK: gl.constexpr):
    buffers, full, empty = records
    at = gl.arange(0, RECORD, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    starts = record + RUNS_AT + 2 * at
    lengths = gl.load(starts + 1, mask=at < RUNS, other=0) - gl.load(
        starts, mask=at < RUNS, other=0
    )
    blocks = gl.sum(gl.cdiv(gl.maximum(lengths, 0), BLOCK), 0)
    numbers = gl.load(record + at)
    numbers = gl.where(at == HEAD_AT, head, numbers)
    numbers = gl.where(at == BLOCKS_AT, blocks, numbers)
    numbers = gl.where(at == LIST_AT, 2 * numbers + which, numbers)
    RECORDS: gl.constexpr = buffers[0].shape[0]
    mbarrier.wait(empty.index(n % RECORDS), turn(n, RECORDS) ^ 1)
    buffers[0].index(n % RECORDS).store(numbers)
    mbarrier.arrive(full.index(n % RECORDS), count=1)


@gluon.jit
def fetch_tile(
    of_schedule, i, n, of_rows, of_blocks, ORDER: gl.constexpr = None, STEPS: gl.constexpr = RUNS,
    pieces=None,
):  # fmt: skip
    """By one warp: the rows of the i-th tile, then its blocks, run by run.

    of_rows: descriptors, and the rings for the first and second half of the rows, or one for all.
    of_blocks: descriptors and ring, as often as it takes. ORDER: of STEPS runs, a hexadecimal digit
    each, the first one last; as they are in the record if None. pieces: descriptors of
    pieces of blocks; without them no tile may have riders. n: how many blocks there were; returned
    for now.
    """
    records, claim, _ = of_schedule
    record = nth_record(records, i)
    head = number_in(record, HEAD_AT)
    row = number_in(record, 0)
    for part in gl.static_range(1, len(of_rows)):
        fetch(of_rows[0], row, head, of_rows[part], i)
        row += of_rows[0][0].block_type.shape[0]
    BLOCK: gl.constexpr = of_blocks[0][0][0].block_type.shape[0]
    late = n + gl.maximum(number_in(record, BLOCKS_AT) - AHEAD, 0)
    _list, carrier = of_list(number_in(record, LIST_AT))
    carrier += n
    for step in range(STEPS):
        run = step
        if ORDER is not None:
            run = ORDER >> 4 * step & 15
        row = number_in(record, RUNS_AT + 2 * run)
        end = number_in(record, RUNS_AT + 2 * run + 1)
        while row < end:
            if n == late:
                mbarrier.arrive(claim.index(0), count=1)
            if n == carrier:
                if pieces is not None:
                    ring = of_blocks[0][1]
                    begin_to_fill(pieces, ring, n)
                    for piece in gl.static_range(QUARTERS - 1):
                        at = row + piece * (BLOCK // QUARTERS)
                        fetch_piece(pieces, at, head, ring, n, piece)
                    fetch_piece(pieces, number_in(record, RIDERS_AT), head, ring, n, QUARTERS - 1)
            else:
                for each in gl.static_range(len(of_blocks)):
                    fetch(of_blocks[each][0], row, head, of_blocks[each][1], n)
            row += BLOCK
            n += 1
    if number_in(record, BLOCKS_AT) == 0:
        mbarrier.arrive(claim.index(0), count=1)
    give(records, i)
    return n
