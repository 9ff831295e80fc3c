"""How a kernel walks the rows its tile has to visit: the record that a plan has for it.

A record is int32: the tile's first row, the row after its last one, the same of other rows that
ride along behind these (of a key tile, of queries that do in its last masked block, see
`halves.py`); the number of the tile's sequence and its first query row; then runs of rows to visit
as (start, end); what is unused is empty. There are three kinds of runs: full ones, where every
query sees every key, and those where the queries' first interval is to be tested, or their second
(but see `plan.py` for aligned plans). A full run is a multiple of every block. Then, of a key tile,
which of how many segments of its blocks these runs are, and where in a buffer the sums of the
tile's segments begin. Last, for kernels that ask, see `halves.py`: what halves of the tile do not
see, and which block carries a key tile's riders, counted from 1. A kernel that visits the rows of
several sources has a record for each, one behind the other, which differ in their runs.
"""

from __future__ import annotations

# ruff: noqa: N803 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
import triton
import triton.language as tl

KINDS = tl.constexpr(3)
FULL_RUNS = tl.constexpr(2)
MASKED_RUNS = tl.constexpr(4)  # per interval
RIDERS_AT = tl.constexpr(2)
SEQUENCE_AT = tl.constexpr(4)
RUNS_AT = tl.constexpr(6)
RUNS = tl.constexpr(FULL_RUNS + 2 * MASKED_RUNS)
SEGMENT_AT = tl.constexpr(RUNS_AT + 2 * RUNS)
HALVES_AT = tl.constexpr(SEGMENT_AT + 3)
CARRIER_AT = tl.constexpr(HALVES_AT + 2)
RECORD = tl.constexpr(32)


@triton.constexpr_function
def runs_at(kind):
    """Where in a record runs of a kind begin: those for the second interval, for the first, full
    ones."""
    return RUNS_AT + 2 * (2 - kind) * MASKED_RUNS


@triton.jit
def run_at(kind: tl.constexpr, run):
    """Where in a record a run is."""
    return runs_at(kind) + 2 * run


@triton.jit
def number_at(record, i: tl.constexpr):
    """Of a record in memory, or of one that is a tuple of its numbers."""
    if isinstance(record, tl.tuple):
        number = record[i]
    else:
        number = tl.load(record + i)
    return number


@triton.jit
def store_run(record, kind: tl.constexpr, run, start, end):
    at = record + run_at(kind, run)
    tl.store(at, start)
    tl.store(at + 1, end)


@triton.jit
def store_sequence(record, sequence, first_query):
    tl.store(record + SEQUENCE_AT, sequence)
    tl.store(record + SEQUENCE_AT + 1, first_query)


@triton.jit
def load_sequence(record):
    """Which sequence a tile is of, and its first query row."""
    return tl.load(record + SEQUENCE_AT), tl.load(record + SEQUENCE_AT + 1)


@triton.jit
def load_rows(record):
    """The first row, how many there are, the first of others that ride along behind these, and how
    many there are with these."""
    row0 = number_at(record, 0)
    own = number_at(record, 1) - row0
    rider0 = number_at(record, RIDERS_AT)
    return row0, own, rider0, own + number_at(record, RIDERS_AT + 1) - rider0


@triton.jit
def query_rows(record, part, BLOCK: tl.constexpr):
    """The rows of a part of a tile, which of them there are, and whether there are any."""
    row0, own, rider0, all = load_rows(record)
    at = part * BLOCK + tl.arange(0, BLOCK)
    return tl.where(at < own, row0, rider0 - own) + at, at < all, part * BLOCK < all


@triton.jit
def tile_at(tiles_ptr, place, heads, PARTS: tl.constexpr, SOURCES: tl.constexpr):
    """Of a place among all tiles' parts and heads: the head, the part, and the tile's record."""
    record = tiles_ptr + (place // (heads * PARTS)).to(tl.int64) * (SOURCES * RECORD)
    return place % heads, place // heads % PARTS, record


@triton.jit
def query_tile_at(
    tiles_ptr,
    counter_ptr,
    count,
    left_ptr,
    again_from,
    agains,
    heads,
    PARTS: tl.constexpr,
    SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program's place, see `turn_of`; what `tile_at` and `query_rows` say of it; and whether it
    has anything to do. left_ptr: None if no tile can be left.
    """
    place, again = tl.program_id(0), False
    if left_ptr is not None:
        place, again = turn_of(again_from, agains)
    head, part, record = tile_at(tiles_ptr, place, heads, PARTS, SOURCES)
    queries, inside, some = query_rows(record, part, BLOCK)
    if left_ptr is not None:  # noqa: SIM102 (known to the compiler)
        if again:
            some = some & take_over(counter_ptr, count, left_ptr, place)
    return (place, again), (head, part, record), (queries, inside), some


@triton.jit
def turn_of(again_from, agains):
    """The place among all tiles that a program works at, and whether it is there again: for what
    was left. So are `agains` programs from a certain one on, at as many places from the first."""
    program = tl.program_id(0)
    again = (program >= again_from) & (program < again_from + agains)
    return program - tl.where(program < again_from, 0, tl.where(again, again_from, agains)), again


@triton.jit
def is_here(counter_ptr, count):
    """Whether rows have come, and can be read: once another device has counted that far."""
    return tl.atomic_add(counter_ptr, 0, sem="acquire", scope="sys") - count >= 0


@triton.jit
def goes_on(counter_ptr, count, again):
    """Whether the second source is here for a program that has done with the first."""
    here = again
    if not again:
        here = is_here(counter_ptr, count)
    return here


@triton.jit
def leave(left_ptr, place):
    """Have another program take this one's tile over, whose sums are stored."""
    tl.debug_barrier()  # by all threads
    tl.atomic_xchg(left_ptr + place, 1)


@triton.jit
def take_over(counter_ptr, count, left_ptr, place):
    """Whether a tile was left, and what it was left for is here now."""
    left = tl.atomic_xchg(left_ptr + place, 0)  # one access, for all warps: they must agree
    if left > 0:  # noqa: SIM102 (both would be asked for)
        if not is_here(counter_ptr, count):
            tl.atomic_xchg(left_ptr + place, 1)
            left = 0
    return left > 0


@triton.jit
def load_runs(
    record, kind: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, TIMES: tl.constexpr = 1
):
    """How many blocks the first COUNT runs of a kind have, each a multiple of TIMES, and what
    `find_block` needs."""
    blocks = 0
    runs = ()
    for run in tl.static_range(COUNT):
        start = number_at(record, runs_at(kind) + 2 * run)
        end = number_at(record, runs_at(kind) + 2 * run + 1)
        runs = runs + ((blocks, start - blocks * BLOCK, end),)  # type: ignore[assignment] # noqa: RUF005
        blocks += tl.cdiv(tl.maximum(end - start, 0), BLOCK * TIMES) * TIMES
    return blocks, runs


@triton.jit
def copy_runs(record, into, here, kind: tl.constexpr, segment, segments, PART: tl.constexpr):
    """Of the runs of a kind, what one segment walks. Vectors of records."""
    parts, runs = load_runs(record, kind, MASKED_RUNS if kind > 0 else FULL_RUNS, PART)
    first = parts * segment // segments
    last = parts * (segment + 1) // segments
    for run in tl.static_range(len(runs)):
        before, origin, end = runs[run]
        at = into + run_at(kind, run)
        tl.store(at, origin + tl.maximum(first, before) * PART, mask=here)
        tl.store(at + 1, tl.minimum(origin + last * PART, end), mask=here)


@triton.jit
def store_segment(record, here, segment, segments, slot):
    at = record + SEGMENT_AT
    tl.store(at, segment, mask=here)
    tl.store(at + 1, segments, mask=here)
    tl.store(at + 2, slot, mask=here)


@triton.jit
def load_segment(record):
    """Which segment of its tile a record is, of how many, and where their sums begin."""
    segment = number_at(record, SEGMENT_AT)
    return segment, number_at(record, SEGMENT_AT + 1), number_at(record, SEGMENT_AT + 2)


@triton.jit
def find_block(runs, block, BLOCK: tl.constexpr):
    """The first row of a block and the end of its run, which a masked run's block may overrun."""
    row = runs[0][1]
    end = runs[0][2]
    for run in tl.static_range(1, len(runs)):
        row = tl.where(block >= runs[run][0], runs[run][1], row)
        end = tl.where(block >= runs[run][0], runs[run][2], end)
    return row + block * BLOCK, end
