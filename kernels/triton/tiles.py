"""Rows of a jagged buffer cut into tiles, and tiles put in order: heavy ones first.

The host learns no length: the number of tiles is bounded by shapes, and surplus tiles are empty.
"""

# ruff: noqa: N803 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged import Jagged
from kernels.triton.integers import cdiv
from kernels.triton.launcher import remembered
from kernels.triton.runs import KINDS, RECORD, RUNS_AT, copy_runs, store_segment

FAR = tl.constexpr(1 << 30)
PIECES = tl.constexpr(3)  # a sequence is cut into so many pieces, empty ones included


@dataclass(frozen=True)
class Tiles:
    """Rows of a jagged buffer cut into tiles."""

    pieces: Tensor  # int32 [PIECES * B + 1]: row offsets of the pieces of the sequences
    origins: Tensor  # int32 [PIECES * B + 1]: where the first tiles of the pieces begin
    offsets: Tensor  # int32 [PIECES * B + 1]: tile offsets of the pieces
    bound: int  # at most this many tiles, known to the host

    @staticmethod
    def cut(
        rows: Jagged, intervals: Tensor | None, tile: int, part: int, aligned: bool = False
    ) -> Tiles:
        """intervals: of these rows, if they are queries; part: a divisor of the tile.

        aligned: sequences stay in one piece, so that tiles begin at multiples of their rows.
        """
        num_pieces = PIECES.value * rows.num_sequences
        pieces, origins, offsets = (rows.offsets.new_empty(num_pieces + 1) for _ in range(3))
        _cut_kernel[(rows.num_sequences,)](
            rows.offsets,
            rows.positions,
            intervals,
            pieces,
            rows.num_sequences,
            TILE=tile,
            ALIGNED=aligned,
        )
        _count_kernel[(1,)](pieces, origins, offsets, num_pieces, TILE=tile, PART=part, CHUNK=1024)
        return Tiles(pieces, origins, offsets, rows.num_rows // tile + num_pieces)


# Of a tile that meets more than one in SHARES of what all tiles meet, a GPU would still be walking
# the blocks when it has done all the others.
SHARES = 64
LEAST = 64  # tiles that meet fewer others are not worth it


def most_segments(num_query_tiles: int) -> int:
    """Of key tiles that have several, if so many query tiles can meet one: at most as many."""
    return 2 * SHARES if KINDS.value * num_query_tiles > LEAST else 0


@dataclass(frozen=True)
class Records:
    """Tiles as `runs.py` reads them, and how many others they meet: int32 [sources, tiles, RECORD]
    and [sources, tiles]."""

    records: Tensor
    costs: Tensor

    @staticmethod
    def empty(count: int, like: Tensor) -> Records:
        """Of one source."""
        zeros = like.new_zeros(RECORD.value + 1, count)
        return Records(zeros[:-1].view(1, count, -1), zeros[-1:])

    @staticmethod
    def of_sources(records: Sequence[Records]) -> Records:
        """The same tiles, as they meet others in several sources."""
        if len(records) == 1:
            return records[0]
        each = zip(*((x.records, x.costs) for x in records), strict=True)
        return Records(*(torch.cat(x) for x in each))

    def heavy_first(self, part: int, bits: int) -> Tensor:
        """int32 [tiles, sources, RECORD].

        part: what full runs are a multiple of; bits: how finely weights are told apart.
        """
        sources, count = self.costs.shape
        room = self.records.new_empty(count, sources, RECORD.value)
        return self._ordered(room, part, bits, 0, last_first=True)

    def in_segments(self, part: int, bits: int, last_first: bool = True) -> Tensor:
        """The same, and one record for each segment: at most SHARES more than tiles."""
        sources, count = self.costs.shape
        room = self.records.new_zeros(count + SHARES, sources, RECORD.value)
        return self._ordered(room, part, bits, SHARES, last_first)

    def _ordered(
        self, ordered: Tensor, part: int, bits: int, shares: int, last_first: bool
    ) -> Tensor:
        sources, count = self.costs.shape
        _order_kernel[(cdiv(count, 32),)](
            self.records,
            self.costs,
            ordered,
            count,
            bits,
            shares,
            LEAST,
            SOURCES=sources,
            PART=part,
            LAST_FIRST=last_first,
            BLOCK=32,
            CHUNK=256,
        )
        return ordered


# Tiles of one sequence find the rows they share in the cache if they run side by side: all those of
# at least a quarter of the heaviest's weight come sequence by sequence, and only the light ones, a
# few of a hundred of all there is to do, by powers of two: they fill what would be a tail. Counted:
# caches miss 0.5 to 0.75 times as often as if powers of two were told apart from the heaviest on,
# and the last program ends 0.5 % after the mean one, not 2 %. Those of equal weight come last rows
# first, unless it is said otherwise: under a causal mask the order of the queries' weights. But
# where there are few tiles for a GPU, all are ordered, and by quarters of a power of two.
HEAVY = tl.constexpr(4)  # the heaviest weighs so many times as much, or less
FEW_ROWS = 48 * 1024


def order_bits(num_rows: int) -> int:
    """Of a weight's binary fraction: how finely to order the tiles of so many rows."""
    return 2 if num_rows < FEW_ROWS else 0


@triton.jit
def count_at_most(sorted_ptr, start, length, value, minus_row: tl.constexpr):
    """start + how many of sorted_ptr[start : start + length] are <= value (scalar or block).

    minus_row: compare each entry less its own index instead.
    """
    low = value * 0 + start
    remaining = length
    while remaining > 0:
        half = (remaining + 1) // 2
        middle = low + (half - 1)
        entry = tl.load(sorted_ptr + middle)
        if minus_row:
            entry -= middle
        low = tl.where(entry <= value, low + half, low)
        remaining -= half
    return low


# Offsets and positions may start anywhere in a buffer: kernels compiled for aligned ones would have
# to be compiled again in the middle of training.
@remembered
@triton.jit(
    do_not_specialize=["num_sequences"],
    do_not_specialize_on_alignment=["offsets_ptr", "positions_ptr"],
)
def _cut_kernel(
    offsets_ptr,
    positions_ptr,
    intervals_ptr,
    pieces_ptr,
    num_sequences,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Cut each sequence where neighbours see too different keys to share a tile.

    Once where positions first jump, as in a zigzag shard: positions - row never falls and rises at
    a jump, hence the search. And, of queries, once within the first tile where the next sees less
    far than the last: there contextual tokens end. ALIGNED: nowhere.
    """
    sequence = tl.program_id(0)
    start = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    drop = start
    jump = start
    if end > start and not ALIGNED:
        first = tl.load(positions_ptr + start) - start
        jump = count_at_most(positions_ptr, start, end - start, first, True)
        if intervals_ptr is not None:
            rows = start + 1 + tl.arange(0, TILE)
            inside = rows < jump
            at = intervals_ptr + rows.to(tl.int64) * 4
            a1 = tl.load(at + 1, mask=inside, other=FAR)
            b1 = tl.load(at + 3, mask=inside, other=FAR)
            a1_before = tl.load(at - 3, mask=inside, other=0)
            b1_before = tl.load(at - 1, mask=inside, other=0)
            drops = tl.maximum(a1, b1) < tl.maximum(a1_before, b1_before)
            row = tl.min(tl.where(drops, rows, FAR))
            drop = tl.where(row < FAR, row, start)
    tl.store(pieces_ptr + PIECES * sequence, start)
    tl.store(pieces_ptr + PIECES * sequence + 1, drop)
    tl.store(pieces_ptr + PIECES * sequence + 2, jump)
    if sequence == num_sequences - 1:
        tl.store(pieces_ptr + PIECES * num_sequences, end)


@remembered
@triton.jit(do_not_specialize=["num_pieces"])
def _count_kernel(
    pieces_ptr,
    origins_ptr,
    offsets_ptr,
    num_pieces,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Origins and tile offsets of pieces. One program: there are few.

    A piece's first tile may be short in front, which costs little: under most masks it sees the
    fewest keys. Tiles after contextual tokens begin with the sequence: their rows then end where a
    block of the keys they see ends. And parts of the last tile that would be empty, but for riders,
    are missing in the first.
    """
    tl.store(offsets_ptr, 0)
    tl.store(origins_ptr + num_pieces, 0)
    before = 0
    for chunk in range(0, num_pieces, CHUNK):
        piece = chunk + tl.arange(0, CHUNK)
        inside = piece < num_pieces
        start = tl.load(pieces_ptr + piece, mask=inside, other=0)
        end = tl.load(pieces_ptr + piece + 1, mask=inside, other=0)
        nth = piece % PIECES
        context = tl.load(pieces_ptr + piece - nth, mask=inside, other=0)
        riders = tl.load(pieces_ptr + piece - nth + 1, mask=inside, other=0) - context
        skipped = tl.where(nth == 1, riders, 0)
        room = (TILE - (end - start + skipped) % TILE) % TILE
        skipped += tl.where(nth > 0, tl.maximum(room - riders, 0) // PART * PART, 0)
        origin = start - skipped % TILE
        tl.store(origins_ptr + piece, origin, mask=inside)
        tiles = tl.where(start < end, tl.cdiv(end - origin, TILE), 0)
        tl.store(offsets_ptr + piece + 1, before + tl.cumsum(tiles), mask=inside)
        before += tl.sum(tiles)


@remembered
@triton.jit(do_not_specialize=["num_tiles", "bits", "shares", "least"])
def _order_kernel(
    records_ptr,
    costs_ptr,
    ordered_ptr,
    num_tiles,
    bits,
    shares,
    least,
    SOURCES: tl.constexpr,
    PART: tl.constexpr,
    LAST_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Copy each record behind those of heavier tiles, and of equal ones that come first.

    shares: if not 0, a record for each segment, none of more than a share of all costs, or `least`.
    Tiles that there are cost something, and come before those there are not.
    """
    total = tl.zeros([CHUNK], tl.int64)
    heaviest = tl.zeros([CHUNK], tl.int32)
    for chunk in range(0, num_tiles, CHUNK):
        cost = _load_costs(costs_ptr, chunk + tl.arange(0, CHUNK), num_tiles, SOURCES)
        total += cost
        heaviest = tl.maximum(heaviest, cost)
    most = FAR
    if shares > 0:
        most = tl.maximum(tl.cdiv(tl.sum(total), shares), least).to(tl.int32)
    heavy = tl.cdiv(tl.minimum(tl.max(heaviest), most), HEAVY)
    heavy = tl.where(bits > 0, FAR, heavy)
    mine = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    inside = mine < num_tiles
    segments, weight = _segments(
        _load_costs(costs_ptr, mine, num_tiles, SOURCES), most, heavy, bits
    )
    place = tl.zeros([BLOCK, 1], tl.int32)
    slot = tl.zeros([BLOCK, 1], tl.int32)
    for chunk in range(0, num_tiles, CHUNK):
        other = (chunk + tl.arange(0, CHUNK))[None, :]
        cost = _load_costs(costs_ptr, other, num_tiles, SOURCES)
        count, other_weight = _segments(cost, most, heavy, bits)
        count = tl.where(other < num_tiles, count, 0)
        comes_first = other > mine if LAST_FIRST else other < mine
        ahead = (other_weight > weight) | ((other_weight == weight) & comes_first)
        place += tl.sum(tl.where(ahead, count, 0), 1, keep_dims=True)
        slot += tl.sum(tl.where((other < mine) & (count > 1), count, 0), 1, keep_dims=True)
    first_record = records_ptr + tl.minimum(mine, num_tiles - 1).to(tl.int64) * RECORD
    for segment in range(tl.max(segments)):
        here = inside & (segment < segments)
        for source in tl.static_range(SOURCES):
            record = first_record + num_tiles.to(tl.int64) * (source * RECORD)
            into = ordered_ptr + ((place + segment).to(tl.int64) * SOURCES + source) * RECORD
            for i in tl.static_range(RUNS_AT):
                tl.store(into + i, tl.load(record + i), mask=here)
            for kind in tl.static_range(KINDS):
                copy_runs(record, into, here, kind, segment, segments, PART)
            store_segment(into, here, segment, segments, slot)


@triton.jit
def _load_costs(costs_ptr, tiles, num_tiles, SOURCES: tl.constexpr):
    """Of tiles, in all sources; 0 for those there are not."""
    inside = tiles < num_tiles
    cost = tl.load(costs_ptr + tiles, mask=inside, other=0)
    for source in tl.static_range(1, SOURCES):
        cost += tl.load(costs_ptr + num_tiles * source + tiles, mask=inside, other=0)
    return cost


@triton.jit
def _segments(cost, most, heavy, bits):
    """How many segments a tile has, and the weight of each: its cost's binary exponent and so many
    bits of its fraction, but of all heavy ones alike."""
    segments = tl.maximum(tl.cdiv(cost, most), 1)
    each = tl.minimum(cost // segments, heavy)
    return segments, each.to(tl.float32).to(tl.int32, bitcast=True) >> (23 - bits)


@triton.jit
def locate(tile, pieces_ptr, origins_ptr, offsets_ptr, num_pieces, TILE: tl.constexpr):
    """The piece that a tile is of (num_pieces: a surplus tile's), where the tile begins, its first
    row, which is not there if the tile is short in front, and the one after its last."""
    piece = count_at_most(offsets_ptr, 0, num_pieces + 1, tile, False) - 1
    start = tl.load(pieces_ptr + piece)
    end = tl.load(pieces_ptr + tl.minimum(piece + 1, num_pieces))
    begin = tl.load(origins_ptr + piece) + (tile - tl.load(offsets_ptr + piece)) * TILE
    return piece, begin, tl.maximum(begin, start), tl.minimum(begin + TILE, end)
