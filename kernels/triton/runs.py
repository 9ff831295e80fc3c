"""How a kernel walks the rows its tile has to visit: the record that `plan.py` writes, read back.

A record is int32: the tile's first row, the row after its last one (of its sequence, so it may lie
beyond the tile), then the runs of rows to visit as (start, end), the full ones before the masked.
Full runs are whole multiples of the plan's tile; unused runs are (0, 0).
"""

from __future__ import annotations

import triton
import triton.language as tl

FULL_RUNS = tl.constexpr(3)
MASKED_RUNS = tl.constexpr(5)
FULL_AT = tl.constexpr(2)
MASKED_AT = tl.constexpr(8)
RECORD = tl.constexpr(32)  # 18 used; 128 bytes is one cache line


@triton.jit
def load_runs(record, AT: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """How many blocks the runs have, and (first block, row of block 0 as it were, end) of each."""
    blocks = 0
    runs = ()
    for run in tl.static_range(RUNS):
        start = tl.load(record + AT + 2 * run)
        end = tl.load(record + AT + 2 * run + 1)
        runs = runs + ((blocks, start - blocks * BLOCK, end),)  # noqa: RUF005
        blocks += tl.cdiv(tl.maximum(end - start, 0), BLOCK)
    return blocks, runs


@triton.jit
def find_block(runs, block, BLOCK: tl.constexpr):
    """First row of this block, and the row where its run ends."""
    row = runs[0][1]
    end = runs[0][2]
    for run in tl.static_range(1, len(runs)):
        here = block >= runs[run][0]
        row = tl.where(here, runs[run][1], row)
        end = tl.where(here, runs[run][2], end)
    return row + block * BLOCK, end
