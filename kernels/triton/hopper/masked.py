"""Blocks of a tile for which an interval is to be tested: first those for the second one."""

# ruff: noqa: N803 (Triton's constants are written in capitals)
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.triton.runs import find_block, load_runs


@gluon.jit
def load_masked(record, RUNS: gl.constexpr, BLOCK: gl.constexpr):
    """How many there are, how many for the second interval, and the runs of both, so many each."""
    second, runs2 = load_runs(record, 2, RUNS, BLOCK)
    first, runs1 = load_runs(record, 1, RUNS, BLOCK)
    return second + first, second, (runs2, runs1)


@gluon.jit
def find_masked(runs, second, block, BLOCK: gl.constexpr):
    """The first row of a masked block and the end of its run."""
    row2, end2 = find_block(runs[0], block, BLOCK)
    row1, end1 = find_block(runs[1], block - second, BLOCK)
    return gl.where(block < second, row2, row1), gl.where(block < second, end2, end1)


@gluon.jit
def find_row(of_masked, full_runs, block, BLOCK: gl.constexpr):
    """The first row of any block: masked ones, as `load_masked` says of them, come first."""
    masked, second, runs = of_masked
    masked_row, _end = find_masked(runs, second, block, BLOCK)
    full_row, _end = find_block(full_runs, block - masked, BLOCK)
    return gl.where(block < masked, masked_row, full_row)
