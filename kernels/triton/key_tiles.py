"""Which rows see each key tile: the runs of query rows to visit, by the hulls of query tiles."""

# ruff: noqa: N803 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.launcher import remembered
from kernels.triton.runs import FULL_RUNS, MASKED_RUNS, RECORD, run_at, store_run, store_sequence
from kernels.triton.tiles import FAR, PIECES, locate


@triton.jit
def _meets(
    hulls_ptr, num_tiles, tile, inside, key0, key_end, TILE: tl.constexpr, ALIGNED: tl.constexpr
):
    """How query tiles see the keys [key0, key_end): all of them, some by the first interval, or
    some by the second. ALIGNED: all of TILE, or some by either, which counts as the first."""
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
    a = (a_low < key_end) & (a_high > key0)
    b = (b_low < key_end) & (b_high > key0)
    if ALIGNED:
        full = full & (key_end - key0 == TILE)
        a = a | b
        b = b & False
    return full, a & ~full, b & ~full


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


@remembered
@triton.jit(do_not_specialize=["num_pieces", "num_query_tiles"])
def key_tiles_kernel(
    pieces_ptr,
    origins_ptr,
    tile_offsets_ptr,
    q_pieces_ptr,
    q_origins_ptr,
    q_tile_offsets_ptr,
    hulls_ptr,
    records_ptr,
    costs_ptr,
    num_pieces,
    num_query_tiles,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Run-length codes, for each key tile, of how its sequence's query tiles see it.

    TILE: rows of a key tile. Query tiles are of PART rows here: parts of the plan's. From the first
    run on that has no room in the record, all tiles share the last run of either interval. ALIGNED:
    of the first, which stands for both, see `_meets`.
    """
    key_tile = tl.program_id(0)
    piece, _, key0, key_end = locate(
        key_tile, pieces_ptr, origins_ptr, tile_offsets_ptr, num_pieces, TILE
    )
    if piece == num_pieces:
        return
    record = records_ptr + key_tile.to(tl.int64) * RECORD
    tl.store(record, key0)
    tl.store(record + 1, key_end)

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
    store_sequence(record, piece // PIECES, row_first)
    origin_second = tl.load(q_origins_ptr + q_piece + 1)
    origin_third = tl.load(q_origins_ptr + q_piece + 2)

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
            meets = _meets(
                hulls_ptr, num_query_tiles, tile, tile < last, key0, key_end, TILE, ALIGNED
            )
            inside = (tile > first) & (tile <= last)
            before = _meets(
                hulls_ptr, num_query_tiles, tile - 1, inside, key0, key_end, TILE, ALIGNED
            )
            after = _meets(
                hulls_ptr, num_query_tiles, tile + 1, tile + 1 < last, key0, key_end, TILE, ALIGNED
            )
            begin = row_first + (tile - first) * PART
            begin = tl.where(tile >= second, origin_second + (tile - second) * PART, begin)
            begin = tl.where(tile >= third, origin_third + (tile - third) * PART, begin)
            start = tl.where(tile >= second, row_second, row_first)
            row = tl.maximum(begin, tl.where(tile >= third, row_third, start))
            end = tl.where(tile >= second, row_third, row_second)
            row_end = tl.minimum(begin + PART, tl.where(tile >= third, row_last, end))
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
        store_run(record, 1, MASKED_RUNS - 1, overflow, a_end)
        if not ALIGNED:
            store_run(record, 2, MASKED_RUNS - 1, overflow, b_end)
    tl.store(costs_ptr + key_tile, tl.maximum(cost, 1))
