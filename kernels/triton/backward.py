"""Attention backward without atomic sums: dk and dv per key tile, dq per query tile.

With s = alpha q . k, p = silu(s) and dp = dout . v, all sums over the visible pairs:
dv = scale sum p dout, dk = scale alpha sum silu'(s) dp q, dq = scale alpha sum silu'(s) dp k.
Each launch finds what it needs of s and dp again: seven matrix products with dk and dv in one
launch, eight with one for each, where one kernel with unordered sums into dq does five; but the
same bits in every run. Where it pays, dv's launch keeps silu'(s) dp for the others: `slopes.py`.
"""

# ruff: noqa: N803, N806 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.forward import UNSPECIALIZED, load_bounds, load_rows, store_rows
from kernels.triton.launcher import remembered
from kernels.triton.runs import (
    FULL_RUNS,
    KINDS,
    MASKED_RUNS,
    RECORD,
    find_block,
    goes_on,
    leave,
    load_runs,
    load_segment,
    load_sequence,
    query_rows,
    query_tile_at,
    tile_at,
)
from kernels.triton.silu import UNSEEN, silu_and_twice_slope
from kernels.triton.slopes import SIDE, add_products, slopes_of_head, square_at, store_slopes
from kernels.triton.through import through_silu


@remembered
@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_value_kernel(
    k_desc,
    v_desc,
    add_k_ptr,
    add_k_stride,
    add_v_ptr,
    add_v_stride,
    dk_ptr,
    dk_stride,
    dv_ptr,
    dv_stride,
    before_k_ptr,
    before_k_stride,
    bias_k_ptr,
    bias_sums_k_ptr,
    before_v_ptr,
    before_v_stride,
    bias_v_ptr,
    bias_sums_v_ptr,
    sums_k_ptr,
    sums_v_ptr,
    done_ptr,
    tiles_ptr,
    heads,
    half_alpha,
    scale,
    slopes_ptr,
    key_parts,
    query_parts,
    q_desc,
    dout_desc,
    bounds_ptr,
    next_q_desc,
    next_dout_desc,
    next_bounds_ptr,
    QK_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SOURCES: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    SLOPES: tl.constexpr,
):
    """dk if KEY, dv if VALUE. Scores are transposed: [keys, queries].

    Both at once share the scores; for large head dims their sums do not fit in the registers, and
    two launches are faster. SLOPES: whoever finds dv keeps those of an aligned plan; a launch for
    dk alone takes them instead of the scores, see `slopes.py`.

    before_k_ptr, before_v_ptr: None, or what dk and dv are taken back through, see
    `through.py`.

    Grid: segments of key tiles x (TILE / BLOCK_N) x heads. Segments leave their sums in float32
    buffers [segments * TILE, heads, dim]; the last of a tile to be done, by int32 counters
    [segments * TILE / BLOCK_N * heads], adds them up in order. Counters are zero before and after.
    """
    PARTS: tl.constexpr = TILE // BLOCK_N
    head, part, record = tile_at(tiles_ptr, tl.program_id(0), heads, PARTS, SOURCES)
    row0 = tl.load(record) + part * BLOCK_N
    row_end = tl.load(record + 1)
    if row0 >= row_end:
        return

    k = k_desc.load([row0, head * QK_DIM])
    v = v_desc.load([row0, head * V_DIM])
    dk = tl.zeros([BLOCK_N, QK_DIM], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, V_DIM], dtype=tl.float32)
    keys = (row0 + tl.arange(0, BLOCK_N))[:, None]
    if SLOPES:
        sequence, first_query = load_sequence(record)
        of = slopes_of_head(slopes_ptr, head, key_parts, query_parts), query_parts, sequence
        tl.static_assert(BLOCK_N == SIDE and SIDE % BLOCK_M == 0 and (VALUE or BLOCK_M == SIDE))
    TIMES: tl.constexpr = SIDE // BLOCK_M if SLOPES else 1

    for source in tl.static_range(SOURCES):
        if source > 0:
            q_desc, dout_desc, bounds_ptr = next_q_desc, next_dout_desc, next_bounds_ptr
        for kind in tl.static_range(2 if SLOPES else KINDS):
            at = record + source * RECORD
            blocks, runs = load_runs(
                at, kind, MASKED_RUNS if kind > 0 else FULL_RUNS, BLOCK_M, TIMES
            )
            if SLOPES and not VALUE:
                column = head * QK_DIM
                dk = add_products(
                    dk, runs, blocks, of, first_query, row0, q_desc, column, True, PRECISION
                )
            else:
                for block in tl.range(blocks):
                    row, end = find_block(runs, block, BLOCK_M)
                    q = q_desc.load([row, head * QK_DIM])
                    half_scores = tl.dot(k, q.T, input_precision=PRECISION) * half_alpha
                    dout = dout_desc.load([row, head * V_DIM])
                    if KEY or SLOPES:
                        dweights = tl.dot(v, dout.T, input_precision=PRECISION)
                    if kind > 0:
                        queries = row + tl.arange(0, BLOCK_M)
                        seen = queries < end
                        low, high = load_bounds(bounds_ptr, kind - 1, queries, seen, 0)
                        visible = (keys >= low) & (keys < high)
                        if SLOPES:  # both intervals at once
                            low, high = load_bounds(bounds_ptr, 1, queries, seen, 0)
                            visible = visible | (keys >= low) & (keys < high)
                        half_scores = tl.where(visible, half_scores, UNSEEN)
                    weights, slope = silu_and_twice_slope(half_scores, FAST)
                    if KEY or SLOPES:
                        slopes = (dweights * slope).to(q.dtype)
                    if SLOPES:
                        query = row - first_query
                        store_slopes(square_at(*of, row0, query), query % SIDE, slopes)
                    if VALUE:
                        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
                    if KEY:
                        dk = tl.dot(slopes, q, dk, input_precision=PRECISION)

    # The rows again: registers are dear.
    rows = tl.load(record) + part * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < tl.load(record + 1)
    dk *= scale * half_alpha
    dv *= scale
    k_at, v_at = head * QK_DIM, head * V_DIM
    segment, segments, slot = load_segment(record)
    # Whichever of a tile's segments is done last.
    here = tl.program_id(0) // heads - segment * PARTS
    of_k = before_k_ptr, before_k_stride, bias_k_ptr, bias_sums_k_ptr
    of_v = before_v_ptr, before_v_stride, bias_v_ptr, bias_sums_v_ptr
    # Both branches store: joined before that, they would hold dk and dv beside the new sums.
    if segments == 1:
        if KEY:
            dk = through_silu(dk, of_k, rows, inside, here, head, heads, FAST)
            store_rows(dk_ptr, dk_stride, add_k_ptr, add_k_stride, dk, rows, inside, k_at)
        if VALUE:
            dv = through_silu(dv, of_v, rows, inside, here, head, heads, FAST)
            store_rows(dv_ptr, dv_stride, add_v_ptr, add_v_stride, dv, rows, inside, v_at)
    else:
        sums = slot * TILE + part * BLOCK_N + tl.arange(0, BLOCK_N)
        if KEY:
            _store_sums(sums_k_ptr, dk, sums + segment * TILE, head, heads)
        if VALUE:
            _store_sums(sums_v_ptr, dv, sums + segment * TILE, head, heads)
        tl.debug_barrier()  # all threads have stored
        done_at = done_ptr + (slot * PARTS + part) * heads + head
        done = tl.atomic_add(done_at, 1)
        if done == segments - 1:
            tl.store(done_at, 0)  # as the next launch wants it
            if KEY:
                dk = _add_sums(sums_k_ptr, sums, segments, TILE, head, heads, BLOCK_N, QK_DIM)
                dk = through_silu(dk, of_k, rows, inside, here, head, heads, FAST)
                store_rows(dk_ptr, dk_stride, add_k_ptr, add_k_stride, dk, rows, inside, k_at)
            if VALUE:
                dv = _add_sums(sums_v_ptr, sums, segments, TILE, head, heads, BLOCK_N, V_DIM)
                dv = through_silu(dv, of_v, rows, inside, here, head, heads, FAST)
                store_rows(dv_ptr, dv_stride, add_v_ptr, add_v_stride, dv, rows, inside, v_at)


@triton.jit
def _store_sums(ptr, x, rows, head, heads):
    DIM: tl.constexpr = x.shape[1]
    store_rows(ptr, heads * DIM, None, 0, x, rows, rows >= 0, head * DIM)


@triton.jit
def _add_sums(
    ptr,
    rows,
    segments,
    TILE: tl.constexpr,
    head,
    heads,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """The sum over a tile's segments, always in the same order."""
    total = tl.zeros([ROWS, DIM], tl.float32)
    for segment in range(segments):
        total += load_rows(ptr, rows + segment * TILE, rows >= 0, heads * DIM, head * DIM, DIM)
    return total


@remembered
@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_kernel(
    dout_ptr,
    q_ptr,
    dout_stride,
    q_stride,
    add_ptr,
    add_stride,
    dq_ptr,
    dq_stride,
    tiles_ptr,
    heads,
    half_alpha,
    scale,
    counter_ptr,
    count,
    left_ptr,
    again_from,
    agains,
    sums_ptr,
    k_desc,
    v_desc,
    bounds_ptr,
    next_k_desc,
    next_v_desc,
    next_bounds_ptr,
    QK_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """dq = scale * alpha (add / (scale * alpha) + sum silu'(s) dp k), s and dp as above.

    Grid: query tiles x (TILE / BLOCK_M) x heads, and `agains`. Tiles are left as in the forward."""
    PARTS: tl.constexpr = TILE // BLOCK_M
    left = counter_ptr, count, left_ptr, again_from, agains
    turn, tile, found, some = query_tile_at(tiles_ptr, *left, heads, PARTS, SOURCES, BLOCK_M)
    if not some:
        return
    place, again = turn
    head, part, record = tile
    queries, inside = found

    q = load_rows(q_ptr, queries, inside, q_stride, head * QK_DIM, QK_DIM)
    dout = load_rows(dout_ptr, queries, inside, dout_stride, head * V_DIM, V_DIM)
    if add_ptr is None:
        dq = tl.zeros([BLOCK_M, QK_DIM], dtype=tl.float32)
    else:
        dq = load_rows(add_ptr, queries, inside, add_stride, head * QK_DIM, QK_DIM)
        dq /= scale * half_alpha
    if left_ptr is not None:  # noqa: SIM102 (known to the compiler)
        if again:
            dq = load_rows(sums_ptr, queries, inside, heads * QK_DIM, head * QK_DIM, QK_DIM)
    of_q = q, dout
    blocks: tl.constexpr = (BLOCK_N, FAST, PRECISION)
    mask = queries, inside, bounds_ptr
    dq = _differentiate(dq, of_q, k_desc, v_desc, record, mask, head, half_alpha, again, blocks)
    if SOURCES == 2:
        if left_ptr is not None:  # noqa: SIM102 (known to the compiler)
            if not goes_on(counter_ptr, count, again):
                rows, real, _ = query_rows(record, part, BLOCK_M)
                store_rows(sums_ptr, heads * QK_DIM, None, 0, dq, rows, real, head * QK_DIM)
                leave(left_ptr, place)
                return
        mask = queries, inside, next_bounds_ptr
        keys = next_k_desc, next_v_desc
        record += RECORD
        dq = _differentiate(dq, of_q, *keys, record, mask, head, half_alpha, False, blocks)

    queries, inside, _ = query_rows(record, part, BLOCK_M)  # again: registers are dear
    dq *= scale * half_alpha
    store_rows(dq_ptr, dq_stride, None, 0, dq, queries, inside, head * QK_DIM)


@triton.jit
def _differentiate(
    dq, of_q, k_desc, v_desc, record, mask, head, half_alpha, done, BLOCKS: tl.constexpr
):
    """dq plus the sum over one source, unless it has been done already."""
    q, dout = of_q
    queries, inside, bounds_ptr = mask
    BLOCK_N: tl.constexpr = BLOCKS[0]
    FAST: tl.constexpr = BLOCKS[1]
    PRECISION: tl.constexpr = BLOCKS[2]
    for kind in tl.static_range(KINDS):
        blocks, runs = load_runs(record, kind, 2, BLOCK_N)
        blocks = tl.where(done, 0, blocks)
        # Few tiles have all kinds. (Forward and dk/dv are a fifth slower for this question.)
        if kind == 0 or blocks > 0:
            if kind > 0:
                low, high = load_bounds(bounds_ptr, kind - 1, queries, inside, 1)
            for block in tl.range(blocks):
                row, _end = find_block(runs, block, BLOCK_N)
                k = k_desc.load([row, head * q.shape[1]])
                half_scores = tl.dot(q, k.T, input_precision=PRECISION) * half_alpha
                v = v_desc.load([row, head * dout.shape[1]])
                dweights = tl.dot(dout, v.T, input_precision=PRECISION)
                if kind > 0:
                    keys = (row + tl.arange(0, BLOCK_N))[None, :]
                    half_scores = tl.where((keys >= low) & (keys < high), half_scores, UNSEEN)
                _weights, slope = silu_and_twice_slope(half_scores, FAST)
                dq = tl.dot((dweights * slope).to(k.dtype), k, dq, input_precision=PRECISION)
    return dq
