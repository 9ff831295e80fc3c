"""Records of tiles as they are handed out, in shared memory: what `kernels.triton.runs` says of a
tile, and for which head.
"""

# ruff: noqa: N803 (Triton's constants are written in capitals)
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.triton.hopper.pipeline import CONSUMERS, barriers, give, take
from kernels.triton.runs import CARRIER_AT, RECORD, SEQUENCE_AT

# Of a record as it is handed out: the head, or -1 behind the last tile; how many blocks are to be
# fetched; which of two lists the tile is of, in the last bit of which block carries riders.
HEAD_AT = gl.constexpr(SEQUENCE_AT.value)
BLOCKS_AT = gl.constexpr(SEQUENCE_AT.value + 1)
LIST_AT = gl.constexpr(CARRIER_AT.value)


@gluon.jit
def schedule(RECORDS: gl.constexpr = 1):
    """A ring of records, and the barrier that has the next one claimed."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    buffers = gl.allocate_shared_memory(gl.int32, [RECORDS, RECORD], layout)
    readers: gl.constexpr = CONSUMERS + 1  # and who fetches
    return ((buffers,), barriers(RECORDS, 1), barriers(RECORDS, readers)), barriers(1, 1)


@gluon.jit
def next_record(records, n):
    """The n-th record, as a tuple."""
    record = take(records, n)[0]
    numbers = ()
    for i in gl.static_range(RECORD):
        numbers = numbers + (number_in(record, i),)  # type: ignore[assignment] # noqa: RUF005
    give(records, n)
    return numbers


@gluon.jit
def nth_record(records, n):
    """For who knows that it is there."""
    return records[0][0].index(n % records[0][0].shape[0])


@gluon.jit
def number_in(record, i):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.max(record._reinterpret(gl.int32, [RECORD, 1], layout).index(i).load(one), 0)


@gluon.jit
def look_up(records, n, at):
    """One of the n-th record's numbers, once it is there."""
    return number_in(take(records, n)[0], at)


@gluon.jit
def of_list(number):
    """What the number at LIST_AT says: which list a tile is of; which of its blocks carries riders,
    or -1."""
    return number % 2, number // 2 - 1
