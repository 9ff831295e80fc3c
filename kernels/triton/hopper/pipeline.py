"""Rings of buffers in shared memory: one warp fills them, warpgroups that compute empty them.

Barriers say which buffers are full, and which may be filled again. Who fills and who empties count
the buffers they have had, on and on; the n-th is that of stage n % STAGES.
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.triton.halves import is_unseen

CONSUMERS = gl.constexpr(2)  # warpgroups that compute: each does half of a tile's rows
# Of a thread: 2 x 240 + 24 = 3 x 168, what as many threads are launched with. The third warpgroup
# is one warp that fetches and one that hands out tiles.
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def ring_of(descs, STAGES: gl.constexpr, EMPTIERS: gl.constexpr = CONSUMERS):
    """A ring of buffers, each for a block of every descriptor. EMPTIERS: how many warpgroups empty
    it."""
    buffers = ()
    for i in gl.static_range(len(descs)):
        buffers = buffers + (room_for(descs[i], STAGES),)  # type: ignore[assignment] # noqa: RUF005
    return buffers, barriers(STAGES, len(descs)), barriers(STAGES, EMPTIERS)


@gluon.jit
def room_for(desc, COUNT: gl.constexpr):
    """Shared memory for so many blocks of a descriptor."""
    SHAPE: gl.constexpr = [COUNT] + desc.block_type.shape  # noqa: RUF005
    return gl.allocate_shared_memory(desc.dtype, SHAPE, desc.layout)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def fetch(descs, row, head, ring, n):
    """Begin to fill the n-th buffer with blocks of one head's rows, once it is empty."""
    begin_to_fill(descs, ring, n)
    buffers, full, _empty = ring
    stage = n % buffers[0].shape[0]
    for i in gl.static_range(len(descs)):
        at = [row, head * descs[i].block_type.shape[1]]
        into = buffers[i].index(stage)
        tma.async_copy_global_to_shared(descs[i], at, full.index(stage), into)


@gluon.jit
def begin_to_fill(descs, ring, n):
    """Once the n-th buffer is empty, have it expect as many blocks of descriptors as it holds."""
    buffers, full, empty = ring
    STAGES: gl.constexpr = buffers[0].shape[0]
    stage = n % STAGES
    mbarrier.wait(empty.index(stage), turn(n, STAGES) ^ 1)
    for i in gl.static_range(len(descs)):
        mbarrier.expect(
            full.index(stage),
            (buffers[i].shape[1] // descs[i].block_type.shape[0])
            * (buffers[i].shape[2] // descs[i].block_type.shape[1])
            * descs[i].block_type.nbytes,
        )


@gluon.jit
def fetch_piece(descs, row, head, ring, n, piece):
    """Fill a part of the n-th buffer: so many rows as a descriptor's block has."""
    buffers, full, _empty = ring
    stage = n % buffers[0].shape[0]
    for i in gl.static_range(len(descs)):
        for part in gl.static_range(buffers[i].shape[2] // descs[i].block_type.shape[1]):
            at = [row, head * buffers[i].shape[2] + part * descs[i].block_type.shape[1]]
            into = piece_of(buffers[i].index(stage), descs[i], piece, part)
            tma.async_copy_global_to_shared(descs[i], at, full.index(stage), into)


@gluon.jit
def piece_of(block, desc, piece, part: gl.constexpr):
    """Some rows and columns of a block. As it is swizzled, it lies in memory by such columns, and
    these by such rows. (The tests' interpreter has this otherwise: of memory without a swizzle.)"""
    ROWS: gl.constexpr = desc.block_type.shape[0]
    WIDTH: gl.constexpr = desc.block_type.shape[1]
    PIECES: gl.constexpr = block.shape[0] // ROWS
    PARTS: gl.constexpr = block.shape[1] // WIDTH
    pieces = block._reinterpret(desc.dtype, [PARTS * PIECES, ROWS, WIDTH], desc.layout)
    return pieces.index(part * PIECES + piece)


@gluon.jit
def take(ring, n):
    """The n-th buffer's blocks, once it is full."""
    buffers, full, _empty = ring
    STAGES: gl.constexpr = buffers[0].shape[0]
    mbarrier.wait(full.index(n % STAGES), turn(n, STAGES))
    blocks = ()
    for i in gl.static_range(len(buffers)):
        blocks = blocks + (buffers[i].index(n % STAGES),)  # type: ignore[assignment] # noqa: RUF005
    return blocks


@gluon.jit
def give(ring, n, pred=True):
    """This warpgroup has done with the n-th buffer. (Triton has its threads meet before one arrives
    for all.)"""
    buffers, _full, empty = ring
    STAGES: gl.constexpr = buffers[0].shape[0]
    mbarrier.arrive(empty.index(n % STAGES), count=1, pred=pred)


@gluon.jit
def skip(unseen, start, rings):
    """The first of a tile's masked blocks from `start` on that this warpgroup's half has to do
    with. rings: each with how many buffers it had before this tile."""
    block = start
    while is_unseen(unseen, block):
        for i in gl.static_range(len(rings)):
            ring, before = rings[i]
            take(ring, before + block)
            give(ring, before + block)
        block += 1
    return block


@gluon.jit
def turn(n, STAGES: gl.constexpr):
    """The parity of how often the n-th buffer has been used before: what barriers wait for."""
    return n // STAGES & 1
