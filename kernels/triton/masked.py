"""Blocks of a tile for which an interval is to be tested: first those for the second one."""

# ruff: noqa: N803 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.runs import find_block, load_runs, number_at, runs_at

QUARTERS = tl.constexpr(4)  # of a block: so many can be fetched from different rows


@triton.jit
def load_masked(record, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """How many there are, how many for the second interval, and the runs of both, so many each."""
    second, runs2 = load_runs(record, 2, RUNS, BLOCK)
    first, runs1 = load_runs(record, 1, RUNS, BLOCK)
    return second + first, second, (runs2, runs1)


@triton.jit
def find_masked(runs, second, block, BLOCK: tl.constexpr):
    """The first row of a masked block and the end of its run."""
    row2, end2 = find_block(runs[0], block, BLOCK)
    row1, end1 = find_block(runs[1], block - second, BLOCK)
    return tl.where(block < second, row2, row1), tl.where(block < second, end2, end1)


@triton.jit
def queries_of(row, end, columns, riders, carries, BLOCK: tl.constexpr):
    """Of a key tile's masked block, from `row` on: which queries its columns are, and which of them
    there are. riders: the first and the end of those that take the last piece of a block that
    carries them."""
    rider, riders_end = riders
    place = columns - (BLOCK - BLOCK // QUARTERS)
    rides = (place >= 0) & carries
    queries = tl.where(rides, rider + place, row + columns)
    return queries, queries < tl.where(rides, riders_end, end)


@triton.jit
def load_edge(record, run: tl.constexpr, BLOCK: tl.constexpr):
    """Of query tiles, whose intervals' first runs lie before what all rows see, and second runs
    behind: how many blocks one has, for the first interval and for the second; and the first rows
    of both."""
    row1, row2 = number_at(record, runs_at(1) + 2 * run), number_at(record, runs_at(2) + 2 * run)
    end1 = number_at(record, runs_at(1) + 2 * run + 1)
    end2 = number_at(record, runs_at(2) + 2 * run + 1)
    first = tl.cdiv(tl.maximum(end1 - row1, 0), BLOCK)
    return first, tl.cdiv(tl.maximum(end2 - row2, 0), BLOCK), row1, row2
