"""Masks of key tiles' blocks, as bits: drawn by the warp that hands out tiles. Those that compute
need not read each query's interval and compare keys with it: they find which pairs see each other.
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.triton.hopper.pipeline import CONSUMERS, barriers, take, turn
from kernels.triton.hopper.records import LIST_AT, nth_record, number_in, of_list
from kernels.triton.masked import queries_of
from kernels.triton.runs import MASKED_RUNS, RIDERS_AT, RUNS_AT
from kernels.triton.silu import UNSEEN

BITS = gl.constexpr(16)  # of a number: of as many keys, and one query
LANES = gl.constexpr(32)


@gluon.jit
def masks_for(TILE: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    """A ring of masks, as `ring_of` makes them of other things."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    buffers = gl.allocate_shared_memory(gl.int16, [STAGES, TILE // BITS, BLOCK], layout)
    return (buffers,), barriers(STAGES, 1), barriers(STAGES, CONSUMERS)


@gluon.jit
def draw_masks(records, i, of_masks, m, BLOCK: gl.constexpr):
    """By one warp: those of the masked blocks of the i-th tile, which is announced. of_masks: a
    plan's bounds, and the ring. m: how many masks there were; returned for now."""
    bounds_ptr, ring = of_masks
    buffers, full, empty = ring
    STAGES: gl.constexpr = buffers[0].shape[0]
    record = nth_record(records, i)
    key_row = number_in(record, 0)
    _list, carrier = of_list(number_in(record, LIST_AT))
    carrier += m
    layout: gl.constexpr = gl.BlockedLayout([1, BLOCK // LANES], [1, LANES], [1, 1], [1, 0])
    columns = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))[None, :]
    for run in range(2 * MASKED_RUNS):
        row = number_in(record, RUNS_AT + 2 * run)
        end = number_in(record, RUNS_AT + 2 * run + 1)
        of_interval = bounds_ptr + gl.where(run < MASKED_RUNS, 2, 0)
        while row < end:
            queries, inside = row + columns, row + columns < end
            if m == carrier:
                riders = number_in(record, RIDERS_AT), number_in(record, RIDERS_AT + 1)
                queries, inside = queries_of(row, end, columns, riders, True, BLOCK)
            at = of_interval + queries.to(gl.int64) * 4
            low = gl.load(at, mask=inside, other=0)
            high = gl.load(at + 1, mask=inside, other=0)
            mbarrier.wait(empty.index(m % STAGES), turn(m, STAGES) ^ 1)
            _draw(buffers[0].index(m % STAGES), low - key_row, high - key_row)
            mbarrier.arrive(full.index(m % STAGES), count=1)
            row += BLOCK
            m += 1
    return m


@gluon.jit
def _draw(mask, low, high):
    """mask [groups of keys, queries]: where the keys, counted from 0, lie in [low, high)."""
    GROUPS: gl.constexpr = mask.shape[0]
    for group in gl.static_range(GROUPS):
        mask.slice(group, 1).store(_bits(low - group * BITS, high - group * BITS))


@gluon.jit
def _bits(low, high):
    """A bit for each number from 0 on: whether it lies in [low, high)."""
    low, high = gl.maximum(low, 0), gl.maximum(high, 0)
    ones = (1 << gl.minimum(high, BITS)) - (1 << gl.minimum(low, BITS))
    return gl.maximum(ones, 0).to(gl.int16)


@gluon.jit
def look(ring, n, HALF: gl.constexpr, like):
    """What the n-th mask says of a half of a tile's keys, for `hide_keys`. like: a block of scores.
    (Long before they are there: then little is left to be done.)"""
    mask = take(ring, n)[0]
    GROUPS: gl.constexpr = like.shape[0] // BITS
    in_order: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    layout: gl.constexpr = _split(like).type.layout
    of_pairs = mask._reinterpret(gl.int32, [2 * GROUPS, like.shape[1] // 2], in_order)
    of_half = of_pairs.slice(HALF * GROUPS, GROUPS)
    return of_half.load(gl.SliceLayout(1, gl.SliceLayout(3, layout)))


@gluon.jit
def hide_keys(half_scores, numbers):
    """half_scores [keys, queries] where a query sees a key."""
    x = _split(half_scores)
    layout: gl.constexpr = x.type.layout
    of_keys: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    of_two: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    keys = gl.arange(0, BITS, of_keys)[None, :, None, None]
    bits = 1 << keys + BITS * gl.arange(0, 2, of_two)[None, None, None, :]
    x = gl.where((numbers[:, None, :, None] & bits) != 0, x, UNSEEN)
    x = x.reshape([half_scores.shape[0], half_scores.shape[1]])
    return gl.convert_layout(x, half_scores.type.layout, assert_trivial=True)


@gluon.jit
def _split(scores):
    """Keys by groups whose bits are a number, queries by the two whose numbers are read at once."""
    return scores.reshape([scores.shape[0] // BITS, BITS, scores.shape[1] // 2, 2])
