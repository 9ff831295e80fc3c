"""Which blocks of keys and queries meet: computed on the device, once per batch, for all layers.

Kernels work on tiles: up to `tile` consecutive rows of one sequence. For every query tile the plan
lists the runs of key rows to visit, and for every key tile the runs of query rows; a run is
either full (every row sees every key, so nothing is masked) or masked. Rows that no run names cost
nothing. Key positions appear only here: the plan turns the position intervals of `kernels.masks`
into intervals of key *rows*, so the kernels never load a position and need not know where a
sequence or a context-parallel shard ends. Tiles come heaviest first. The host learns no length: the
number of tiles is bounded by shapes, and surplus tiles are empty.
"""

# ruff: noqa: N803 (Triton's constants are written in capitals)
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
from kernels.triton.runs import FULL_AT, FULL_RUNS, MASKED_AT, MASKED_RUNS, RECORD, SPLITS_AT

# What a query tile sees, int32 each: for both intervals the hull [low, high) over its rows and the
# part that all its rows share. Empty ones have low = FAR, high = 0.
HULLS = 8
FAR = tl.constexpr(1 << 30)
PIECES = tl.constexpr(3)  # a sequence is cut into so many pieces, empty ones included
LIGHT = 3  # tiles that meet fewer than 2 ** LIGHT others need no order: none of them makes a tail


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
        pieces = torch.empty(num_pieces + 1, dtype=torch.int32, device=rows.offsets.device)
        _cut_kernel[(rows.num_sequences,)](
            rows.offsets, rows.positions, intervals, pieces, rows.num_sequences, TILE=tile
        )
        offsets = torch.zeros_like(pieces)
        counts = (pieces.diff() + (tile - 1)) // tile
        torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[1:])
        return Tiles(pieces, offsets, rows.num_rows // tile + num_pieces)


@dataclass(frozen=True)
class Plan:
    """See the module's docstring. `tile` is a multiple of every kernel's block sizes."""

    tile: int
    queries: Jagged
    keys: Jagged
    bounds: (
        Tensor  # int32 [4, Tq]: key rows [low, high) each query sees, but for a hole [low, high)
    )
    query_cut: Tiles
    hulls: Tensor  # int32 [HULLS, query tiles], in the order of the rows
    query_tiles: Tensor  # int32 [query tiles, RECORD], heaviest first

    @staticmethod
    def build(queries: Jagged, keys: Jagged, intervals: Tensor, tile: int) -> Plan:
        device = intervals.device
        intervals = intervals.contiguous()
        cut = Tiles.cut(queries, intervals, tile)
        bounds = torch.empty(4, queries.num_rows, dtype=torch.int32, device=device)
        hulls = torch.empty(HULLS, cut.bound, dtype=torch.int32, device=device)
        records = torch.zeros(cut.bound, RECORD.value, dtype=torch.int32, device=device)
        cost = torch.zeros(cut.bound, dtype=torch.int32, device=device)
        _query_tiles_kernel[(cut.bound,)](
            cut.pieces,
            cut.offsets,
            keys.offsets,
            keys.positions,
            intervals,
            bounds,
            hulls,
            records,
            cost,
            PIECES.value * queries.num_sequences,
            queries.num_rows,
            cut.bound,
            TILE=tile,
            num_warps=4,
        )
        return Plan(tile, queries, keys, bounds, cut, hulls, _heaviest_first(records, cost))

    @cached_property
    def key_tiles(self) -> Tensor:
        """int32 [key tiles, RECORD], heaviest first. Only the backward needs it."""
        cut = Tiles.cut(self.keys, None, self.tile)
        records = torch.zeros(cut.bound, RECORD.value, dtype=torch.int32, device=cut.offsets.device)
        cost = torch.zeros(cut.bound, dtype=torch.int32, device=cut.offsets.device)
        _key_tiles_kernel[(cut.bound,)](
            cut.pieces,
            cut.offsets,
            self.query_cut.pieces,
            self.query_cut.offsets,
            self.hulls,
            records,
            cost,
            PIECES.value * self.keys.num_sequences,
            self.query_cut.bound,
            TILE=self.tile,
            CHUNK=256,
            num_warps=4,
        )
        return _heaviest_first(records, cost)


# One batch's plans, found again by every layer, forward and backward, and freed with its intervals.
_plans = WeakIdKeyDictionary()


def plan_for(queries: Jagged, keys: Jagged, intervals: Tensor, tile: int) -> Plan:
    """The plan of these very tensors, built on first sight.

    Tensors are told apart by identity and version, so writing into them in place is noticed.
    """
    if intervals.is_cuda and torch.cuda.is_current_stream_capturing():
        return Plan.build(queries, keys, intervals, tile)  # a graph must plan at every replay
    parts = (queries.offsets, queries.positions, keys.offsets, keys.positions)
    key = (tile, _version(intervals), *((id(part), _version(part)) for part in parts))
    known = _plans.setdefault(intervals, {})
    if key not in known:
        known[key] = Plan.build(queries, keys, intervals, tile)
    return known[key]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _heaviest_first(records: Tensor, cost: Tensor) -> Tensor:
    """By the power of two of the cost only, and all of the lightest alike: tiles of one sequence
    then run side by side and find their shared rows in the cache."""
    octave = cost.float().frexp().exponent.clamp(min=LIGHT)
    return records[torch.argsort(octave, descending=True, stable=True)]


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


@triton.jit(do_not_specialize=["num_sequences"])
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


@triton.jit
def _hull(low, high, valid):
    """Hull and common part of the intervals [low, high) of a tile's valid rows."""
    some = valid & (low < high)
    hull_low = tl.min(tl.where(some, low, FAR))
    hull_high = tl.max(tl.where(some, high, 0))
    full_low = tl.max(tl.where(valid, low, 0))
    full_high = tl.min(tl.where(valid, high, FAR))
    return hull_low, hull_high, full_low, full_high


@triton.jit
def _store_run(record, at: tl.constexpr, start, end):
    tl.store(record + at, start)
    tl.store(record + at + 1, end)


@triton.jit
def _store_hull_runs(record, index: tl.constexpr, start, end, low, high, TILE: tl.constexpr):
    """One hull as a masked, a full and a masked run, cut at multiples of TILE from its start."""
    tiles = tl.cdiv(tl.maximum(end - start, 0), TILE)
    before = tl.minimum(tl.cdiv(tl.maximum(low - start, 0), TILE), tiles)
    full_start = start + before * TILE
    full_end = full_start + tl.maximum(tl.minimum(high, end) - full_start, 0) // TILE * TILE
    _store_run(record, MASKED_AT + 4 * index, start, tl.minimum(full_start, end))
    _store_run(record, FULL_AT + 2 * index, full_start, full_end)
    _store_run(record, MASKED_AT + 4 * index + 2, full_end, end)
    return tiles


@triton.jit(do_not_specialize=["num_pieces", "num_rows", "num_tiles"])
def _query_tiles_kernel(
    pieces_ptr,
    tile_offsets_ptr,
    k_offsets_ptr,
    k_positions_ptr,
    intervals_ptr,
    bounds_ptr,
    hulls_ptr,
    records_ptr,
    cost_ptr,
    num_pieces,
    num_rows,
    num_tiles,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0)
    piece = _count_at_most(tile_offsets_ptr, 0, num_pieces + 1, tile, False) - 1
    if piece == num_pieces:
        return
    row0 = tl.load(pieces_ptr + piece) + (tile - tl.load(tile_offsets_ptr + piece)) * TILE
    row_end = tl.load(pieces_ptr + piece + 1)
    k_start = tl.load(k_offsets_ptr + piece // PIECES)
    k_length = tl.load(k_offsets_ptr + piece // PIECES + 1) - k_start

    rows = row0 + tl.arange(0, TILE)
    valid = rows < row_end
    at = intervals_ptr + rows.to(tl.int64) * 4
    a0 = _key_row(k_positions_ptr, k_start, k_length, tl.load(at, mask=valid, other=0))
    a1 = _key_row(k_positions_ptr, k_start, k_length, tl.load(at + 1, mask=valid, other=0))
    b0 = _key_row(k_positions_ptr, k_start, k_length, tl.load(at + 2, mask=valid, other=0))
    b1 = _key_row(k_positions_ptr, k_start, k_length, tl.load(at + 3, mask=valid, other=0))
    # Kernels test one interval and one hole in it: the first's start to the second's end, but for
    # what lies between.
    at = bounds_ptr + rows
    one_is_empty = (a0 == a1) | (b0 == b1)
    tl.store(at, tl.where(a0 == a1, b0, a0), mask=valid)
    tl.store(at + num_rows.to(tl.int64), tl.where(b0 == b1, a1, b1), mask=valid)
    tl.store(at + num_rows.to(tl.int64) * 2, tl.where(one_is_empty, 0, a1), mask=valid)
    tl.store(at + num_rows.to(tl.int64) * 3, tl.where(one_is_empty, 0, b0), mask=valid)

    a_low, a_high, a_full_low, a_full_high = _hull(a0, a1, valid)
    b_low, b_high, b_full_low, b_full_high = _hull(b0, b1, valid)
    # A tile that is not whole is never full for a key tile: its block holds rows of others.
    whole = row0 + TILE <= row_end
    at = hulls_ptr + tile
    tl.store(at, a_low)
    tl.store(at + num_tiles, a_high)
    tl.store(at + num_tiles * 2, a_full_low)
    tl.store(at + num_tiles * 3, tl.where(whole, a_full_high, 0))
    tl.store(at + num_tiles * 4, b_low)
    tl.store(at + num_tiles * 5, b_high)
    tl.store(at + num_tiles * 6, b_full_low)
    tl.store(at + num_tiles * 7, tl.where(whole, b_full_high, 0))

    # The hull that starts first, then what the other one adds: no key row may be visited twice, so
    # where the first's last tile reaches into the other hull, the other starts after it.
    a_first = a_low <= b_low
    low = tl.where(a_first, a_low, b_low)
    high = tl.where(a_first, a_high, b_high)
    other_low = tl.where(a_first, b_low, a_low)
    reach = low + tl.cdiv(tl.maximum(high - low, 0), TILE) * TILE
    high = tl.where(other_low < reach, reach, high)
    record = records_ptr + tile.to(tl.int64) * RECORD
    _store_run(record, 0, row0, row_end)
    cost = _store_hull_runs(
        record,
        0,
        low,
        high,
        tl.where(a_first, a_full_low, b_full_low),
        tl.where(a_first, a_full_high, b_full_high),
        TILE,
    )
    cost += _store_hull_runs(
        record,
        1,
        tl.maximum(other_low, high),
        tl.where(a_first, b_high, a_high),
        tl.where(a_first, b_full_low, a_full_low),
        tl.where(a_first, b_full_high, a_full_high),
        TILE,
    )
    tl.store(cost_ptr + tile, cost)


@triton.jit
def _key_row(k_positions_ptr, k_start, k_length, position):
    """The first key row whose position is at least this."""
    return _count_at_most(k_positions_ptr, k_start, k_length, position - 1, False)


@triton.jit
def _meets(hulls_ptr, num_tiles, tile, first, last, key0, key_end):
    """How query tiles see the keys [key0, key_end): 0 not at all, 1 in part, 2 in full."""
    inside = (tile >= first) & (tile < last)
    at = hulls_ptr + tile
    a_low = tl.load(at, mask=inside, other=FAR)
    a_high = tl.load(at + num_tiles, mask=inside, other=0)
    a_full_low = tl.load(at + num_tiles * 2, mask=inside, other=FAR)
    a_full_high = tl.load(at + num_tiles * 3, mask=inside, other=0)
    b_low = tl.load(at + num_tiles * 4, mask=inside, other=FAR)
    b_high = tl.load(at + num_tiles * 5, mask=inside, other=0)
    b_full_low = tl.load(at + num_tiles * 6, mask=inside, other=FAR)
    b_full_high = tl.load(at + num_tiles * 7, mask=inside, other=0)
    touched = ((a_low < key_end) & (a_high > key0)) | ((b_low < key_end) & (b_high > key0))
    full = (a_full_low <= key0) & (a_full_high >= key_end)
    full = full | ((b_full_low <= key0) & (b_full_high >= key_end))
    return tl.where(full, 2, tl.where(touched, 1, 0))


@triton.jit(do_not_specialize=["num_pieces", "num_query_tiles"])
def _key_tiles_kernel(
    pieces_ptr,
    tile_offsets_ptr,
    q_pieces_ptr,
    q_tile_offsets_ptr,
    hulls_ptr,
    records_ptr,
    cost_ptr,
    num_pieces,
    num_query_tiles,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Run-length codes, for each key tile, of how its sequence's query tiles see it.

    Runs beyond a record's room share the last masked run.
    """
    key_tile = tl.program_id(0)
    piece = _count_at_most(tile_offsets_ptr, 0, num_pieces + 1, key_tile, False) - 1
    if piece == num_pieces:
        return
    key0 = tl.load(pieces_ptr + piece) + (key_tile - tl.load(tile_offsets_ptr + piece)) * TILE
    piece_end = tl.load(pieces_ptr + piece + 1)
    key_end = tl.minimum(key0 + TILE, piece_end)
    record = records_ptr + key_tile.to(tl.int64) * RECORD
    _store_run(record, 0, key0, piece_end)

    # The query tiles of this sequence, piece by piece.
    q_piece = piece // PIECES * PIECES
    first = tl.load(q_tile_offsets_ptr + q_piece)
    second = tl.load(q_tile_offsets_ptr + q_piece + 1)
    third = tl.load(q_tile_offsets_ptr + q_piece + 2)
    last = tl.load(q_tile_offsets_ptr + q_piece + 3)
    row_first = tl.load(q_pieces_ptr + q_piece)
    row_second = tl.load(q_pieces_ptr + q_piece + 1)
    row_third = tl.load(q_pieces_ptr + q_piece + 2)
    row_last = tl.load(q_pieces_ptr + q_piece + 3)
    _store_run(record, SPLITS_AT, row_second, row_third)

    masked_runs = 0
    full_runs = 0
    cost = 0
    overflow = FAR  # the row where runs that have no room begin
    touched_end = 0
    for chunk in range(first, last, CHUNK):
        tile = chunk + tl.arange(0, CHUNK)
        meets = _meets(hulls_ptr, num_query_tiles, tile, first, last, key0, key_end)
        before = _meets(hulls_ptr, num_query_tiles, tile - 1, first, last, key0, key_end)
        after = _meets(hulls_ptr, num_query_tiles, tile + 1, first, last, key0, key_end)
        row = row_first + (tile - first) * TILE
        row = tl.where(tile >= second, row_second + (tile - second) * TILE, row)
        row = tl.where(tile >= third, row_third + (tile - third) * TILE, row)
        row_end = tl.where(tile >= second, row_third, row_second)
        row_end = tl.minimum(row + TILE, tl.where(tile >= third, row_last, row_end))
        # A new piece starts a new run: its first row need not follow a whole tile.
        starts = (meets != before) | (tile == second) | (tile == third)
        ends = (meets != after) | (tile + 1 == second) | (tile + 1 == third)

        masked = meets == 1
        masked_index = masked_runs + tl.cumsum((masked & starts).to(tl.int32)) - 1
        full = meets == 2
        full_index = full_runs + tl.cumsum((full & starts).to(tl.int32)) - 1
        no_room = (masked & starts & (masked_index >= MASKED_RUNS - 1)) | (
            full & starts & (full_index >= FULL_RUNS)
        )
        overflow = tl.minimum(overflow, tl.min(tl.where(no_room, row, FAR)))
        masked_at = record + MASKED_AT + 2 * masked_index
        full_at = record + FULL_AT + 2 * full_index
        tl.store(masked_at, row, mask=masked & starts & (row < overflow))
        tl.store(masked_at + 1, row_end, mask=masked & ends & (row < overflow))
        tl.store(full_at, row, mask=full & starts & (row < overflow))
        tl.store(full_at + 1, row_end, mask=full & ends & (row < overflow))

        masked_runs += tl.sum((masked & starts).to(tl.int32))
        full_runs += tl.sum((full & starts).to(tl.int32))
        cost += tl.sum((meets > 0).to(tl.int32))
        touched_end = tl.maximum(touched_end, tl.max(tl.where(meets > 0, row_end, 0)))
    if overflow < FAR:
        _store_run(record, MASKED_AT + 2 * (MASKED_RUNS - 1), overflow, touched_end)
    tl.store(cost_ptr + key_tile, cost)
