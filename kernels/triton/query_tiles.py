"""What the rows of each query tile see: the runs of key rows to visit, tile by tile."""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.launcher import remembered
from kernels.triton.runs import RECORD, RIDERS_AT, store_run, store_sequence
from kernels.triton.tiles import FAR, PIECES, count_at_most, locate

# What a part of a query tile sees, int32 each: for both intervals the hull [low, high) over its
# rows and what all of them share. Empty ones have low = FAR, high = 0.
HULLS = 8


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
def _store_hull_runs(record, interval: tl.constexpr, hull, PART: tl.constexpr):
    """A hull as a masked, a full and a masked run, cut at multiples of PART from its start."""
    start, end, low, high = hull
    parts = tl.cdiv(tl.maximum(end - start, 0), PART)
    before = tl.minimum(tl.cdiv(tl.maximum(low - start, 0), PART), parts)
    full_start = start + before * PART
    full_end = full_start + tl.maximum(tl.minimum(high, end) - full_start, 0) // PART * PART
    store_run(record, 1 + interval, 0, start, tl.minimum(full_start, end))
    store_run(record, 0, interval, full_start, full_end)
    store_run(record, 1 + interval, 1, full_end, end)
    return parts


@triton.jit
def _whole_parts(hull, first_key, PART: tl.constexpr):
    """A hull out to multiples of PART from the sequence's first key; empty ones stay empty."""
    start, end, _, _ = hull
    some = start < end
    first = tl.where(some, start - first_key, 0) // PART
    last = tl.cdiv(tl.where(some, end - first_key, 0), PART)
    return first_key + first * PART, first_key + last * PART


@triton.jit
def _store_whole_runs(record, a, b, first_key, PART: tl.constexpr):
    """All key parts that the hulls meet, each once: as if all rows saw all of their keys."""
    a_start, a_end = _whole_parts(a, first_key, PART)
    b_start, b_end = _whole_parts(b, first_key, PART)
    joined = (a_start < b_end) & (b_start < a_end)
    start, end = tl.minimum(a_start, b_start), tl.maximum(a_end, b_end)
    store_run(record, 0, 0, tl.where(joined, start, a_start), tl.where(joined, end, a_end))
    store_run(record, 0, 1, b_start, tl.where(joined, b_start, b_end))
    return (tl.where(joined, end - start, a_end - a_start + b_end - b_start)) // PART


@triton.jit
def _store_query_record(
    records_ptr,
    costs_ptr,
    tile,
    row0,
    row_end,
    rider0,
    rider_end,
    of,
    a,
    b,
    PART: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile or a vector of them, with the hulls of both intervals. of: the sequence, its first
    query and its first key."""
    record = records_ptr + tile.to(tl.int64) * RECORD
    tl.store(record, row0)
    tl.store(record + 1, row_end)
    tl.store(record + RIDERS_AT, rider0)
    tl.store(record + RIDERS_AT + 1, rider_end)
    sequence, first_query, first_key = of
    store_sequence(record, sequence, first_query)
    if ALIGNED:
        cost = _store_whole_runs(record, a, b, first_key, PART)
    else:
        cost = _store_hull_runs(record, 0, a, PART) + _store_hull_runs(record, 1, b, PART)
    tl.store(costs_ptr + tile, tl.maximum(cost, 1))


@triton.jit
def _store_hulls(at, stride, hulls, whole):
    low, high, full_low, full_high = hulls
    tl.store(at, low)
    tl.store(at + stride, high)
    tl.store(at + stride * 2, full_low)
    # Rows that are not whole are never full for a key tile: their block holds rows of others.
    tl.store(at + stride * 3, tl.where(whole, full_high, 0))


@remembered
@triton.jit(
    do_not_specialize=["num_pieces", "num_parts"],
    do_not_specialize_on_alignment=["k_offsets_ptr", "k_positions_ptr"],
)
def query_tiles_kernel(
    pieces_ptr,
    origins_ptr,
    tile_offsets_ptr,
    k_offsets_ptr,
    k_positions_ptr,
    intervals_ptr,
    bounds_ptr,
    hulls_ptr,
    tiles_ptr,
    tile_costs_ptr,
    parts_ptr,
    part_costs_ptr,
    num_pieces,
    num_parts,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """ALIGNED: of pieces that are whole sequences. Records then name all key parts that a tile
    meets, which are cut from the sequence's first key on."""
    PARTS: tl.constexpr = TILE // PART
    tile = tl.program_id(0)
    piece, begin, row0, row_end = locate(
        tile, pieces_ptr, origins_ptr, tile_offsets_ptr, num_pieces, TILE
    )
    if piece == num_pieces:
        return
    k_start = tl.load(k_offsets_ptr + piece // PIECES)
    k_length = tl.load(k_offsets_ptr + piece // PIECES + 1) - k_start

    # Contextual rows see about what the sequence's last rows see: where the last tile has room,
    # they ride along there, and their own tile stays empty.
    sequence = piece // PIECES * PIECES
    context = tl.load(pieces_ptr + sequence)
    riders = tl.load(pieces_ptr + sequence + 1) - context
    end = tl.load(pieces_ptr + sequence + PIECES)
    last_tile = tl.load(tile_offsets_ptr + sequence + PIECES) - 1
    _, last_begin, last_row0, _ = locate(
        last_tile, pieces_ptr, origins_ptr, tile_offsets_ptr, num_pieces, TILE
    )
    ride = (last_row0 > context) & (end - last_begin + riders <= TILE)
    riders = tl.where(ride & (tile == last_tile), riders, 0)

    # Lanes are the tile's places for rows, in parts: some in front may be empty, riders come last.
    used = row_end - begin
    lane = tl.arange(0, PARTS)[:, None] * PART + tl.arange(0, PART)[None, :]
    rows = tl.where(lane < used, begin, context - used) + lane
    own = (begin + lane >= row0) & (lane < used)
    valid = own | ((lane >= used) & (lane < used + riders))
    at = intervals_ptr + rows.to(tl.int64) * 4
    a0 = _key_row(k_positions_ptr, k_start, k_length, tl.load(at, mask=valid, other=0))
    a1 = _key_row(k_positions_ptr, k_start, k_length, tl.load(at + 1, mask=valid, other=0))
    b0 = _key_row(k_positions_ptr, k_start, k_length, tl.load(at + 2, mask=valid, other=0))
    b1 = _key_row(k_positions_ptr, k_start, k_length, tl.load(at + 3, mask=valid, other=0))
    at = bounds_ptr + rows.to(tl.int64) * 4
    tl.store(at, a0, mask=valid)
    tl.store(at + 1, a1, mask=valid)
    tl.store(at + 2, b0, mask=valid)
    tl.store(at + 3, b1, mask=valid)

    part0 = tl.arange(0, PARTS) * PART
    whole = (begin + part0 >= row0) & (part0 + PART <= used)
    at = hulls_ptr + tile * PARTS + tl.arange(0, PARTS)
    _store_hulls(at, num_parts, _hull(a0, a1, own), whole)
    _store_hulls(at + num_parts * 4, num_parts, _hull(b0, b1, own), whole)

    if not (ride & (piece == sequence)):
        of = piece // PIECES, context, k_start
        a = _hull(a0, a1, valid)
        b = _hull(b0, b1, valid)
        _store_query_record(
            tiles_ptr,
            tile_costs_ptr,
            tile,
            row0,
            row_end,
            context,
            context + riders,
            of,
            _join_hulls(a),
            _join_hulls(b),
            PART,
            ALIGNED,
        )
        _store_query_record(
            parts_ptr,
            part_costs_ptr,
            tile * PARTS + tl.arange(0, PARTS),
            tl.minimum(tl.maximum(begin + part0, row0), row_end),
            tl.minimum(tl.maximum(begin + part0 + PART, row0), row_end),
            context + tl.minimum(tl.maximum(part0 - used, 0), riders),
            context + tl.minimum(tl.maximum(part0 + PART - used, 0), riders),
            of,
            a,
            b,
            PART,
            ALIGNED,
        )


@triton.jit
def _key_row(k_positions_ptr, k_start, k_length, position):
    """The first key row whose position is at least this."""
    return count_at_most(k_positions_ptr, k_start, k_length, position - 1, False)
