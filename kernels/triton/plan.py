"""Which blocks of keys and queries meet: computed on the device, once per batch, for all layers.

Kernels work on tiles: consecutive rows of one sequence. For every query tile the plan lists the
runs of key rows to visit, and for every key tile the runs of query rows; in a run either every row
sees every key, so nothing is masked, or one of the rows' two intervals is tested. Rows that no run
names cost nothing. Key positions appear only here: the plan turns the position intervals of
`kernels.masks` into intervals of key *rows*, so the kernels never load a position and need not know
where a sequence or a context-parallel shard ends. Tiles come heaviest first. The host learns no
length: the number of tiles is bounded by shapes, and surplus tiles are empty.
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kernels.jagged import Jagged
from kernels.triton.integers import cdiv
from kernels.triton.runs import FULL_RUNS, MASKED_RUNS, RECORD, RIDERS_AT, run_at

# What a part of a query tile sees, int32 each: for both intervals the hull [low, high) over its
# rows and what all of them share. Empty ones have low = FAR, high = 0.
HULLS = 8
FAR = tl.constexpr(1 << 30)
PIECES = tl.constexpr(3)  # a sequence is cut into so many pieces, empty ones included
LIGHT = tl.constexpr(8)  # tiles that meet fewer others need no order: none of them makes a tail


@dataclass(frozen=True)
class Tiles:
    """Rows of a jagged buffer cut into tiles."""

    pieces: Tensor  # int32 [PIECES * B + 1]: row offsets of the pieces of the sequences
    offsets: Tensor  # int32 [PIECES * B + 1]: tile offsets of the pieces
    bound: int  # at most this many tiles, known to the host

    @staticmethod
    def cut(rows: Jagged, intervals: Tensor | None, tile: int) -> Tiles:
        """intervals: of these rows, if they are queries."""
        num_pieces = PIECES.value * rows.num_sequences
        pieces, offsets = (rows.offsets.new_empty(num_pieces + 1) for _ in range(2))
        _cut_kernel[(rows.num_sequences,)](
            rows.offsets, rows.positions, intervals, pieces, rows.num_sequences, TILE=tile
        )
        _count_kernel[(1,)](pieces, offsets, num_pieces, TILE=tile, CHUNK=1024)
        return Tiles(pieces, offsets, rows.num_rows // tile + num_pieces)


@dataclass(frozen=True)
class Records:
    """Tiles as `runs.py` reads them, and what they weigh: int32 [tiles, RECORD] and [tiles]."""

    records: Tensor
    weights: Tensor

    @staticmethod
    def empty(count: int, like: Tensor) -> Records:
        zeros = like.new_zeros(RECORD.value + 1, count)
        return Records(zeros[:-1].view(count, -1), zeros[-1])

    def heaviest_first(self) -> Tensor:
        ordered = torch.empty_like(self.records)
        count = len(self.weights)
        _order_kernel[(cdiv(count, 32),)](
            self.records, self.weights, ordered, count, BLOCK=32, CHUNK=256
        )
        return ordered


@dataclass(frozen=True)
class Plan:
    """See the module's docstring.

    The forward's tiles have `tile` rows; the backward's, of queries and of keys, only `part`, which
    divides it: fewer rows next to a mask's edge work for nothing. Both are multiples of the blocks.
    """

    tile: int
    part: int
    queries: Jagged
    keys: Jagged
    bounds: Tensor  # int32 [4, Tq]: the key rows each query sees, in [low, high) and [low, high)
    query_cut: Tiles
    hulls: Tensor  # int32 [HULLS, query parts], in the order of the rows
    tile_records: Records
    part_records: Records

    @staticmethod
    def build(queries: Jagged, keys: Jagged, intervals: Tensor, tile: int, part: int) -> Plan:
        intervals = intervals.contiguous()
        cut = Tiles.cut(queries, intervals, tile)
        bounds = intervals.new_empty(4, queries.num_rows)
        hulls = intervals.new_empty(HULLS, cut.bound * (tile // part))
        tiles, parts = Records.empty(cut.bound, bounds), Records.empty(hulls.shape[1], bounds)
        _query_tiles_kernel[(cut.bound,)](
            cut.pieces,
            cut.offsets,
            keys.offsets,
            keys.positions,
            intervals,
            bounds,
            hulls,
            tiles.records,
            tiles.weights,
            parts.records,
            parts.weights,
            PIECES.value * queries.num_sequences,
            queries.num_rows,
            hulls.shape[1],
            TILE=tile,
            PART=part,
            num_warps=4,
        )
        return Plan(tile, part, queries, keys, bounds, cut, hulls, tiles, parts)

    @cached_property
    def query_tiles(self) -> Tensor:
        """int32 [query tiles, RECORD], heaviest first, as the next two. For the forward."""
        return self.tile_records.heaviest_first()

    @cached_property
    def query_parts(self) -> Tensor:
        """int32 [query parts, RECORD]. For the backward."""
        return self.part_records.heaviest_first()

    @cached_property
    def key_parts(self) -> Tensor:
        """int32 [key parts, RECORD]. For the backward."""
        cut = Tiles.cut(self.keys, None, self.part)
        parts = Records.empty(cut.bound, self.bounds)
        _key_tiles_kernel[(cut.bound,)](
            cut.pieces,
            cut.offsets,
            self.query_cut.pieces,
            self.query_cut.offsets,
            self.hulls,
            parts.records,
            parts.weights,
            PIECES.value * self.keys.num_sequences,
            self.hulls.shape[1],
            TILE=self.part,
            PARTS=self.tile // self.part,
            CHUNK=256,
            num_warps=4,
        )
        return parts.heaviest_first()


# One batch's plans, found again by every layer, forward and backward, and freed with its intervals.
_plans = WeakIdKeyDictionary()


def plan_for(queries: Jagged, keys: Jagged, intervals: Tensor, tile: int, part: int) -> Plan:
    """The plan of these very tensors, built on first sight.

    Tensors are told apart by identity and version, so writing into them in place is noticed.
    """
    if intervals.is_cuda and torch.cuda.is_current_stream_capturing():
        return Plan.build(queries, keys, intervals, tile, part)  # a graph must plan at every replay
    parts = (queries.offsets, queries.positions, keys.offsets, keys.positions)
    key = (tile, part, _version(intervals), *((id(part), _version(part)) for part in parts))
    known = _plans.setdefault(intervals, {})
    if key not in known:
        known[key] = Plan.build(queries, keys, intervals, tile, part)
    return known[key]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@triton.jit
def _count_at_most(sorted_ptr, start, length, value, minus_row: tl.constexpr):
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
@triton.jit(
    do_not_specialize=["num_sequences"],
    do_not_specialize_on_alignment=["offsets_ptr", "positions_ptr"],
)
def _cut_kernel(
    offsets_ptr, positions_ptr, intervals_ptr, pieces_ptr, num_sequences, TILE: tl.constexpr
):
    """Cut each sequence where neighbours see too different keys to share a tile.

    Once where positions first jump, as in a zigzag shard: positions - row never falls and rises at
    a jump, hence the search. And, of queries, once within the first tile where the next sees less
    far than the last: there contextual tokens end.
    """
    sequence = tl.program_id(0)
    start = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    drop = start
    jump = start
    if end > start:
        first = tl.load(positions_ptr + start) - start
        jump = _count_at_most(positions_ptr, start, end - start, first, True)
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


@triton.jit(do_not_specialize=["num_pieces"])
def _count_kernel(pieces_ptr, offsets_ptr, num_pieces, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """Tile offsets of pieces. One program: there are few."""
    tl.store(offsets_ptr, 0)
    before = 0
    for chunk in range(0, num_pieces, CHUNK):
        piece = chunk + tl.arange(0, CHUNK)
        inside = piece < num_pieces
        start = tl.load(pieces_ptr + piece, mask=inside, other=0)
        end = tl.load(pieces_ptr + piece + 1, mask=inside, other=0)
        tiles = tl.cdiv(end - start, TILE)
        tl.store(offsets_ptr + piece + 1, before + tl.cumsum(tiles), mask=inside)
        before += tl.sum(tiles)


@triton.jit(do_not_specialize=["num_tiles"])
def _order_kernel(
    records_ptr, weights_ptr, ordered_ptr, num_tiles, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Copy each record behind those of heavier tiles, and of equal ones that come before it."""
    mine = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    inside = mine < num_tiles
    weight = tl.load(weights_ptr + mine, mask=inside, other=0)
    place = tl.zeros([BLOCK, 1], tl.int32)
    for chunk in range(0, num_tiles, CHUNK):
        other = (chunk + tl.arange(0, CHUNK))[None, :]
        other_weight = tl.load(weights_ptr + other, mask=other < num_tiles, other=-1)
        ahead = (other_weight > weight) | ((other_weight == weight) & (other < mine))
        place += tl.sum(ahead.to(tl.int32), 1, keep_dims=True)
    column = tl.arange(0, RECORD)[None, :]
    record = tl.load(records_ptr + mine.to(tl.int64) * RECORD + column, mask=inside)
    tl.store(ordered_ptr + place.to(tl.int64) * RECORD + column, record, mask=inside)


@triton.jit
def _weight(cost):
    """The binary exponent of the cost only, and all of the lightest alike: tiles of one sequence
    then run side by side and find their shared rows in the cache."""
    return tl.maximum(cost, LIGHT // 2).to(tl.float32).to(tl.int32, bitcast=True) >> 23


@triton.jit
def _hull(low, high, valid):
    """Hull and common part of the intervals [low, high) of valid rows: of each row of a matrix."""
    some = valid & (low < high)
    hull_low = tl.min(tl.where(some, low, FAR), 1)
    hull_high = tl.max(tl.where(some, high, 0), 1)
    full_low = tl.max(tl.where(valid, low, 0), 1)
    full_high = tl.min(tl.where(valid, high, FAR), 1)
    return hull_low, hull_high, full_low, full_high


@triton.jit
def _join_hulls(hulls):
    low, high, full_low, full_high = hulls
    return tl.min(low), tl.max(high), tl.max(full_low), tl.min(full_high)


@triton.jit
def _store_run(record, kind: tl.constexpr, run, start, end):
    at = record + run_at(kind, run)
    tl.store(at, start)
    tl.store(at + 1, end)


@triton.jit
def _store_hull_runs(record, interval: tl.constexpr, hull, TILE: tl.constexpr):
    """A hull as a masked, a full and a masked run, cut at multiples of TILE from its start."""
    start, end, low, high = hull
    tiles = tl.cdiv(tl.maximum(end - start, 0), TILE)
    before = tl.minimum(tl.cdiv(tl.maximum(low - start, 0), TILE), tiles)
    full_start = start + before * TILE
    full_end = full_start + tl.maximum(tl.minimum(high, end) - full_start, 0) // TILE * TILE
    _store_run(record, 1 + interval, 0, start, tl.minimum(full_start, end))
    _store_run(record, 0, interval, full_start, full_end)
    _store_run(record, 1 + interval, 1, full_end, end)
    return tiles


@triton.jit
def _store_query_record(
    records_ptr, weights_ptr, tile, row0, row_end, rider0, rider_end, a, b, TILE: tl.constexpr
):
    """One tile or a vector of them, with the hulls of both intervals."""
    record = records_ptr + tile.to(tl.int64) * RECORD
    tl.store(record, row0)
    tl.store(record + 1, row_end)
    tl.store(record + RIDERS_AT, rider0)
    tl.store(record + RIDERS_AT + 1, rider_end)
    cost = _store_hull_runs(record, 0, a, TILE) + _store_hull_runs(record, 1, b, TILE)
    tl.store(weights_ptr + tile, _weight(cost))


@triton.jit
def _store_hulls(at, stride, hulls, whole):
    low, high, full_low, full_high = hulls
    tl.store(at, low)
    tl.store(at + stride, high)
    tl.store(at + stride * 2, full_low)
    # Rows that are not whole are never full for a key tile: their block holds rows of others.
    tl.store(at + stride * 3, tl.where(whole, full_high, 0))


@triton.jit(
    do_not_specialize=["num_pieces", "num_rows", "num_parts"],
    do_not_specialize_on_alignment=["k_offsets_ptr", "k_positions_ptr"],
)
def _query_tiles_kernel(
    pieces_ptr,
    tile_offsets_ptr,
    k_offsets_ptr,
    k_positions_ptr,
    intervals_ptr,
    bounds_ptr,
    hulls_ptr,
    tiles_ptr,
    tile_weights_ptr,
    parts_ptr,
    part_weights_ptr,
    num_pieces,
    num_rows,
    num_parts,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    PARTS: tl.constexpr = TILE // PART
    tile = tl.program_id(0)
    piece = _count_at_most(tile_offsets_ptr, 0, num_pieces + 1, tile, False) - 1
    if piece == num_pieces:
        return
    row0 = tl.load(pieces_ptr + piece) + (tile - tl.load(tile_offsets_ptr + piece)) * TILE
    row_end = tl.load(pieces_ptr + piece + 1)
    k_start = tl.load(k_offsets_ptr + piece // PIECES)
    k_length = tl.load(k_offsets_ptr + piece // PIECES + 1) - k_start

    # Contextual rows see about what the sequence's last rows see: where the last tile has room,
    # they ride along there, and their own tile stays empty.
    sequence = piece // PIECES * PIECES
    context = tl.load(pieces_ptr + sequence)
    riders = tl.load(pieces_ptr + sequence + 1) - context
    end = tl.load(pieces_ptr + sequence + PIECES)
    last_piece = tl.load(pieces_ptr + sequence + 2)
    last_piece = tl.where(last_piece < end, last_piece, context + riders)
    ride = (last_piece < end) & ((end - last_piece - 1) % TILE + 1 + riders <= TILE)

    own = tl.minimum(row_end - row0, TILE)
    rows_here = own + tl.where(ride & (row0 + own == end), riders, 0)
    lane = tl.arange(0, PARTS)[:, None] * PART + tl.arange(0, PART)[None, :]
    rows = tl.where(lane < own, row0, context - own) + lane
    valid = lane < rows_here
    at = intervals_ptr + rows.to(tl.int64) * 4
    a0 = _key_row(k_positions_ptr, k_start, k_length, tl.load(at, mask=valid, other=0))
    a1 = _key_row(k_positions_ptr, k_start, k_length, tl.load(at + 1, mask=valid, other=0))
    b0 = _key_row(k_positions_ptr, k_start, k_length, tl.load(at + 2, mask=valid, other=0))
    b1 = _key_row(k_positions_ptr, k_start, k_length, tl.load(at + 3, mask=valid, other=0))
    at = bounds_ptr + rows
    tl.store(at, a0, mask=valid)
    tl.store(at + num_rows.to(tl.int64), a1, mask=valid)
    tl.store(at + num_rows.to(tl.int64) * 2, b0, mask=valid)
    tl.store(at + num_rows.to(tl.int64) * 3, b1, mask=valid)

    part = tl.arange(0, PARTS)
    whole = (part + 1) * PART <= own
    at = hulls_ptr + tile * PARTS + part
    _store_hulls(at, num_parts, _hull(a0, a1, lane < own), whole)
    _store_hulls(at + num_parts * 4, num_parts, _hull(b0, b1, lane < own), whole)

    if not (ride & (piece == sequence)):
        a = _hull(a0, a1, valid)
        b = _hull(b0, b1, valid)
        rider_end = context + rows_here - own
        _store_query_record(
            tiles_ptr,
            tile_weights_ptr,
            tile,
            row0,
            row_end,
            context,
            rider_end,
            _join_hulls(a),
            _join_hulls(b),
            TILE,
        )
        # A part has the next so many of the rows, then of the riders.
        part_row0 = row0 + tl.minimum(part * PART, own)
        part_rider0 = tl.minimum(context + tl.maximum(part * PART - own, 0), rider_end)
        part_own = tl.minimum(row0 + own - part_row0, PART)
        _store_query_record(
            parts_ptr,
            part_weights_ptr,
            tile * PARTS + part,
            part_row0,
            row0 + own,
            part_rider0,
            tl.minimum(part_rider0 + PART - part_own, rider_end),
            a,
            b,
            PART,
        )


@triton.jit
def _key_row(k_positions_ptr, k_start, k_length, position):
    """The first key row whose position is at least this."""
    return _count_at_most(k_positions_ptr, k_start, k_length, position - 1, False)


@triton.jit
def _meets(hulls_ptr, num_tiles, tile, inside, key0, key_end):
    """How query tiles see the keys [key0, key_end): all of them, some by the first interval, or
    some by the second."""
    at = hulls_ptr + tile
    a_low = tl.load(at, mask=inside, other=FAR)
    a_high = tl.load(at + num_tiles, mask=inside, other=0)
    a_full_low = tl.load(at + num_tiles * 2, mask=inside, other=FAR)
    a_full_high = tl.load(at + num_tiles * 3, mask=inside, other=0)
    b_low = tl.load(at + num_tiles * 4, mask=inside, other=FAR)
    b_high = tl.load(at + num_tiles * 5, mask=inside, other=0)
    b_full_low = tl.load(at + num_tiles * 6, mask=inside, other=FAR)
    b_full_high = tl.load(at + num_tiles * 7, mask=inside, other=0)
    full = (a_full_low <= key0) & (a_full_high >= key_end)
    full = full | ((b_full_low <= key0) & (b_full_high >= key_end))
    a = (a_low < key_end) & (a_high > key0) & ~full
    b = (b_low < key_end) & (b_high > key0) & ~full
    return full, a, b


@triton.jit
def _codes(here, before, after, starts, ends, runs):
    """Which tiles start a run, which end one, and which run each is in, after so many earlier."""
    starts = here & (starts | ~before)
    ends = here & (ends | ~after)
    return starts, ends, runs + tl.cumsum(starts.to(tl.int32)) - 1


@triton.jit
def _store_codes(record, kind: tl.constexpr, codes, row, row_end, overflow):
    starts, ends, run = codes
    at = record + run_at(kind, run)
    tl.store(at, row, mask=starts & (row < overflow))
    tl.store(at + 1, row_end, mask=ends & (row < overflow))


@triton.jit(do_not_specialize=["num_pieces", "num_query_tiles"])
def _key_tiles_kernel(
    pieces_ptr,
    tile_offsets_ptr,
    q_pieces_ptr,
    q_tile_offsets_ptr,
    hulls_ptr,
    records_ptr,
    weights_ptr,
    num_pieces,
    num_query_tiles,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Run-length codes, for each key tile, of how its sequence's query tiles see it.

    Query tiles of TILE rows here, that is, parts of the plan's. From the first run on that has no
    room in the record, all tiles share the last run of either interval.
    """
    key_tile = tl.program_id(0)
    piece = _count_at_most(tile_offsets_ptr, 0, num_pieces + 1, key_tile, False) - 1
    if piece == num_pieces:
        return
    key0 = tl.load(pieces_ptr + piece) + (key_tile - tl.load(tile_offsets_ptr + piece)) * TILE
    piece_end = tl.load(pieces_ptr + piece + 1)
    key_end = tl.minimum(key0 + TILE, piece_end)
    record = records_ptr + key_tile.to(tl.int64) * RECORD
    tl.store(record, key0)
    tl.store(record + 1, piece_end)

    # The query tiles of this sequence, piece by piece.
    q_piece = piece // PIECES * PIECES
    first = tl.load(q_tile_offsets_ptr + q_piece) * PARTS
    second = tl.load(q_tile_offsets_ptr + q_piece + 1) * PARTS
    third = tl.load(q_tile_offsets_ptr + q_piece + 2) * PARTS
    last = tl.load(q_tile_offsets_ptr + q_piece + 3) * PARTS
    row_first = tl.load(q_pieces_ptr + q_piece)
    row_second = tl.load(q_pieces_ptr + q_piece + 1)
    row_third = tl.load(q_pieces_ptr + q_piece + 2)
    row_last = tl.load(q_pieces_ptr + q_piece + 3)

    overflow = FAR  # the row where runs that have no room begin
    for storing in tl.static_range(2):  # first find that row
        full_runs = 0
        a_runs = 0
        b_runs = 0
        a_end = 0  # of the rows that see keys by the first interval
        b_end = 0
        cost = 0
        for chunk in range(first, last, CHUNK):
            tile = chunk + tl.arange(0, CHUNK)
            meets = _meets(hulls_ptr, num_query_tiles, tile, tile < last, key0, key_end)
            inside = (tile > first) & (tile <= last)
            before = _meets(hulls_ptr, num_query_tiles, tile - 1, inside, key0, key_end)
            after = _meets(hulls_ptr, num_query_tiles, tile + 1, tile + 1 < last, key0, key_end)
            row = row_first + (tile - first) * TILE
            row = tl.where(tile >= second, row_second + (tile - second) * TILE, row)
            row = tl.where(tile >= third, row_third + (tile - third) * TILE, row)
            row_end = tl.where(tile >= second, row_third, row_second)
            row_end = tl.minimum(row + TILE, tl.where(tile >= third, row_last, row_end))
            # A new piece starts a new run: its first row need not follow a whole tile.
            starts = (tile == second) | (tile == third)
            ends = (tile + 1 == second) | (tile + 1 == third) | (row_end == overflow)

            full = _codes(meets[0], before[0], after[0], starts, ends, full_runs)
            a = _codes(meets[1], before[1], after[1], starts, ends, a_runs)
            b = _codes(meets[2], before[2], after[2], starts, ends, b_runs)
            if storing:
                _store_codes(record, 0, full, row, row_end, overflow)
                _store_codes(record, 1, a, row, row_end, overflow)
                _store_codes(record, 2, b, row, row_end, overflow)
            else:
                no_room = full[0] & (full[2] >= FULL_RUNS)
                no_room = no_room | (a[0] & (a[2] >= MASKED_RUNS - 1))
                no_room = no_room | (b[0] & (b[2] >= MASKED_RUNS - 1))
                overflow = tl.minimum(overflow, tl.min(tl.where(no_room, row, FAR)))

            full_runs += tl.sum(full[0].to(tl.int32))
            a_runs += tl.sum(a[0].to(tl.int32))
            b_runs += tl.sum(b[0].to(tl.int32))
            a_end = tl.maximum(a_end, tl.max(tl.where(meets[0] | meets[1], row_end, 0)))
            b_end = tl.maximum(b_end, tl.max(tl.where(meets[0] | meets[2], row_end, 0)))
            cost += tl.sum(meets[0].to(tl.int32) + meets[1].to(tl.int32) + meets[2].to(tl.int32))
    if overflow < FAR:
        _store_run(record, 1, MASKED_RUNS - 1, overflow, a_end)
        _store_run(record, 2, MASKED_RUNS - 1, overflow, b_end)
    tl.store(weights_ptr + key_tile, _weight(cost))
