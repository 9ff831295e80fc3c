"""Slopes, 2 silu'(s) dp of every pair, which one kernel of the backward keeps in memory for others.

dk and dq are products of the slopes with q and k. For large head dims the sums of dq, dk and dv do
not fit in one kernel's registers, and three kernels that each begin with the scores do eight matrix
products. Here the one for dv keeps the slopes, and the other two read them: five. For short
sequences, where dv's kernel finds dk as well, dq is spared reading q, v and dout.

They are kept in squares of SIDE keys and SIDE queries, a key part and a query part of an `aligned`
plan. Each square that dk's or dq's kernel reads has been written once; of pairs that do not see
each other, the slope is 0. In a square, numbers lie as four warps hold the result of a product in
their registers: four that compute it store it, and four that multiply it by q take it, without any
of it moving between threads. (Other numbers of warps would be right, but slower.)
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.forward import UNSPECIALIZED, store_rows
from kernels.triton.launcher import remembered
from kernels.triton.runs import FULL_RUNS, find_block, load_runs, load_sequence, query_rows, tile_at
from kernels.triton.through import through_silu

SIDE = tl.constexpr(64)
SQUARE = tl.constexpr(64 * 64)
THREADS = tl.constexpr(128)  # of four warps: each holds 8 numbers of every 16 queries
HELD = tl.constexpr(8)
ONCE = tl.constexpr("evict_first")  # a kernel reads each once: rows that others read too stay


@triton.jit
def square_at(slopes_ptr, query_parts, sequence, key_row, query):
    """Where a square is, given by its first key row and its first query of the sequence.

    slopes_ptr: of a head. query_parts: so many there is room for, of a sequence.
    """
    keys = key_row // SIDE + sequence  # no other part's, whatever the lengths
    return slopes_ptr + (keys.to(tl.int64) * query_parts + query // SIDE) * SQUARE


@triton.jit
def slopes_of_head(slopes_ptr, head, key_parts, query_parts):
    """slopes_ptr: [heads, key_parts, query_parts, SQUARE]."""
    return slopes_ptr + head.to(tl.int64) * key_parts * query_parts * SQUARE


@triton.jit
def _places(QUERIES: tl.constexpr):
    """Of numbers by thread, block of 16 queries, and order in the thread."""
    thread = tl.arange(0, THREADS)[:, None, None] * HELD
    block = tl.arange(0, QUERIES // 16)[None, :, None] * (THREADS * HELD)
    return thread + block + tl.arange(0, HELD)[None, None, :]


@triton.jit
def store_slopes(square, first, slopes):
    """Store slopes [SIDE keys, queries], of the queries from the square's `first` on."""
    QUERIES: tl.constexpr = slopes.shape[1]
    # A key is 16 * warp + 8 * j + lane // 4, a query 8 * i + 2 * (lane % 4) + k.
    x = tl.reshape(slopes, [4, 2, 8, QUERIES // 8, 4, 2])
    x = tl.reshape(tl.permute(x, [0, 2, 4, 3, 1, 5]), [THREADS, QUERIES // 16, HELD])
    tl.store(square + first * SIDE + _places(QUERIES), x, eviction_policy=ONCE)


@triton.jit
def load_slopes(square):
    """Slopes [SIDE keys, SIDE queries]."""
    x = tl.load(square + _places(SIDE), eviction_policy=ONCE)
    x = tl.reshape(x, [4, 8, 4, 8, 2, 2])
    return tl.reshape(tl.permute(x, [0, 4, 1, 3, 2, 5]), [SIDE, SIDE])


@triton.jit
def add_products(
    x, runs, blocks, of, first_query, fixed, desc, column, BY_KEYS: tl.constexpr, PRECISION
):
    """x, plus slopes times the rows of all blocks: sums for the keys from row `fixed` on if
    BY_KEYS, else for the queries from the sequence's `fixed` on. of: see `square_at`.

    Slopes are loaded a block ahead into registers: through shared memory, as the compiler has it
    otherwise, is 1.2 to 1.4 times as slow.
    """
    if blocks > 0:
        row, _end = find_block(runs, 0, SIDE)
        following = load_slopes(_square_of(of, first_query, fixed, row, BY_KEYS))
        for block in tl.range(blocks):
            slopes = following
            row, _end = find_block(runs, tl.minimum(block + 1, blocks - 1), SIDE)
            following = load_slopes(_square_of(of, first_query, fixed, row, BY_KEYS))
            row, _end = find_block(runs, block, SIDE)
            y = desc.load([row, column])
            if BY_KEYS:
                x = tl.dot(slopes, y, x, input_precision=PRECISION)
            else:
                x = tl.dot(slopes.T, y, x, input_precision=PRECISION)
    return x


@triton.jit
def _square_of(of, first_query, fixed, row, BY_KEYS: tl.constexpr):
    slopes_ptr, query_parts, sequence = of
    key_row = fixed if BY_KEYS else row
    query = row - first_query if BY_KEYS else fixed
    return square_at(slopes_ptr, query_parts, sequence, key_row, query)


@remembered
@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_slopes_kernel(
    dq_ptr,
    dq_stride,
    before_ptr,
    before_stride,
    bias_ptr,
    bias_sums_ptr,
    tiles_ptr,
    heads,
    half_alpha,
    scale,
    slopes_ptr,
    key_parts,
    query_parts,
    k_desc,
    QK_DIM: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq = scale * alpha / 2 * sum slopes k, taken back through SiLU unless before_ptr is None.
    Grid: query parts x heads."""
    head, _, record = tile_at(tiles_ptr, tl.program_id(0), heads, 1, 1)
    queries, inside, some = query_rows(record, 0, SIDE)
    if not some:
        return
    sequence, first_query = load_sequence(record)
    query = tl.load(record) - first_query
    of = slopes_of_head(slopes_ptr, head, key_parts, query_parts), query_parts, sequence
    dq = tl.zeros([SIDE, QK_DIM], dtype=tl.float32)
    blocks, runs = load_runs(record, 0, FULL_RUNS, SIDE)
    column = head * QK_DIM
    dq = add_products(dq, runs, blocks, of, 0, query, k_desc, column, False, PRECISION)
    dq *= scale * half_alpha
    of_q = before_ptr, before_stride, bias_ptr, bias_sums_ptr
    here = tl.program_id(0) // heads
    dq = through_silu(dq, of_q, queries, inside, here, head, heads, FAST)
    store_rows(dq_ptr, dq_stride, None, 0, dq, queries, inside, column)
