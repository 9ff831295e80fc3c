"""Query tiles for programs that stay, forward and dq: handed out, fetched, and looked up."""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.triton.hopper.masked import find_masked, load_masked
from kernels.triton.hopper.pipeline import announce, fetch, leave_counters
from kernels.triton.hopper.rows import load_bounds, load_rows
from kernels.triton.runs import FULL_RUNS, find_block, load_runs, tile_at


@gluon.jit
def produce(of_tile, of_block, tiles, rings, HEADS: gl.constexpr):
    """One warp's: all tiles in turn, half of their rows into one ring and half into another; and
    their blocks, masked ones first. A tile that sees nothing has one block, which nobody sees.

    of_tile, of_block: descriptors, the latter of keys and of values.
    tiles: with counters_ptr, int32 [2], zero before and after a launch.
    """
    tiles_ptr, num_tiles_ptr, counters_ptr = tiles
    places, upper, lower, keys, values = rings
    k_desc, v_desc = of_block
    BLOCK: gl.constexpr = k_desc.block_type.shape[0]
    ROWS: gl.constexpr = of_tile[0].block_type.shape[0]
    count = gl.load(num_tiles_ptr) * HEADS
    # Counted from the first on: a program whose multiprocessor is busy elsewhere comes late.
    place = gl.atomic_add(counters_ptr, 1)
    i = 0  # tiles so far
    n = 0  # blocks
    while place < count:
        head, _part, record = tile_at(tiles_ptr, place, HEADS, PARTS=1, SOURCES=1)
        rows = load_rows(record)
        masked, second, of_masked = load_masked(record, 2, BLOCK)
        full, runs = load_runs(record, 0, FULL_RUNS, BLOCK)
        if rows[3] > 0:
            announce(places, i, place)
            fetch(of_tile, rows[0], head, upper, i)
            fetch(of_tile, rows[0] + ROWS, head, lower, i)
            blocks = gl.maximum(masked + full, 1)
            for block in range(blocks):
                if block == blocks - 1:  # who claims a tile long before its turn makes a tail
                    place = gl.atomic_add(counters_ptr, 1)
                row, _end = find_masked(of_masked, second, block, BLOCK)
                full_row, _end = find_block(runs, block - masked, BLOCK)
                row = gl.where(block < masked, row, full_row)
                fetch((k_desc,), row, head, keys, n)
                fetch((v_desc,), row, head, values, n)
                n += 1
            i += 1
        else:
            place = gl.atomic_add(counters_ptr, 1)
    announce(places, i, -1)
    leave_counters(counters_ptr)


@gluon.jit
def load_tile(
    tiles_ptr, place, HEADS: gl.constexpr, bounds_ptr, first, ROWS: gl.constexpr,
    BLOCK: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """What a warpgroup is to know of a tile; of any, behind the last."""
    head, _part, record = tile_at(tiles_ptr, gl.maximum(place, 0), HEADS, PARTS=1, SOURCES=1)
    rows = load_rows(record)
    bounds = load_bounds(bounds_ptr, rows, first, ROWS, layout)
    full, runs = load_runs(record, 0, FULL_RUNS, BLOCK)
    return head, rows, bounds, load_masked(record, 2, BLOCK), (full, runs)
