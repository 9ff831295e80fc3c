"""How a kernel walks the rows its tile has to visit: the record that `plan.py` writes, read back.

A record is int32: the tile's first row, the row after its last one (of its sequence, so it may lie
beyond the tile), then the runs of rows to visit as (start, end), the full ones before the masked.
Runs that are not the last of their kind are whole multiples of the plan's tile, or end where rows
begin that no block may overrun: at the two splits, of key tiles. Unused runs are empty.
"""

from __future__ import annotations

# ruff: noqa: N803 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
import triton
import triton.language as tl

FULL_RUNS = tl.constexpr(2)
MASKED_RUNS = tl.constexpr(4)
FULL_AT = tl.constexpr(2)
MASKED_AT = tl.constexpr(6)
SPLITS_AT = tl.constexpr(14)
RECORD = tl.constexpr(16)


@triton.jit
def load_runs(record, BLOCK: tl.constexpr):
    """How many blocks the runs have, how many of them are full, and what `find_block` needs."""
    blocks = 0
    full_blocks = 0
    runs = ()
    for run in tl.static_range(FULL_RUNS + MASKED_RUNS):
        start = tl.load(record + FULL_AT + 2 * run)
        end = tl.load(record + FULL_AT + 2 * run + 1)
        runs = runs + ((blocks, start - blocks * BLOCK),)  # type: ignore[assignment] # noqa: RUF005
        blocks += tl.cdiv(tl.maximum(end - start, 0), BLOCK)
        if run < FULL_RUNS:
            full_blocks = blocks
    return blocks, full_blocks, runs


@triton.jit
def find_block(runs, block, BLOCK: tl.constexpr):
    """The first row of a block. Each run knows its first block and, as it were, block 0's row."""
    row = runs[0][1]
    for run in tl.static_range(1, len(runs)):
        row = tl.where(block >= runs[run][0], runs[run][1], row)
    return row + block * BLOCK
