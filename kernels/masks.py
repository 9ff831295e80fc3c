"""Every mask as at most two key intervals per query.

Query i sees the keys of its sequence whose positions lie in [a0, a1) or [b0, b1). A mask is a pure
function from query positions to int32 [T, 4] rows (a0, a1, b0, b1) with 0 <= a0 <= a1 <= b0 <= b1
whenever both are non-empty; the two never overlap, and may end behind the keys there are. To add a
mask, write another such function: no kernel changes. `interval_lengths` gives each query's cost,
hence FLOP counts and load balance.

The first and the last of consecutive queries tell what all of them see: their own positions, and
of [a0, a1) and of [b0, b1) everything from where it first starts to where it last ends. Whoever
asks for the keys of many queries (a halo) asks those two, so a mask must let the queries between
them see no more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jagged import Jagged


def hstu_intervals(
    queries: Jagged,
    lengths: Tensor,
    num_targets: Tensor,
    *,
    num_contextual: int = 0,
    window: int = 0,
    full_suffix: int = 0,
) -> Tensor:
    """HSTU's causal mask (arXiv 2402.17152 and its ranking variant): int32 [T, 4].

    queries: the rows to build the mask for, any subset of each sequence's positions.
    lengths, num_targets: int [B], of the *whole* sequences: n and t. H = n - t.
    num_contextual: c, tokens at the front that see the whole [0, H).
    window: w > 0 limits history and targets to keys at most w ids back; 0 means no limit.
    full_suffix: f > 0 exempts the last f history ids, and the targets, from the window.

    With id(p) = clamp(p - max(c - 1, 0), 0, H - max(c - 1, 0)), query p sees key j when
    id(p) > id(j) or p == j. All c contextual tokens share id 0 and all targets share the last id,
    so targets see the history and themselves but not each other. A sequence with fewer than c
    tokens before its targets has only contextual tokens there.
    """
    position, history, contextual, first_id = _per_query(
        queries, lengths, num_targets, num_contextual
    )
    last_id = history - first_id
    query_id = torch.minimum((position - first_id).clamp(min=0), last_id)
    is_target = position >= history
    is_contextual = position < contextual

    lowest = torch.zeros_like(position)
    if window > 0:
        # Ids at or below 0 are the contextual prefix (or nothing): the interval starts at 0 then.
        lowest_id = query_id - window
        lowest = torch.where(lowest_id > 0, lowest_id + first_id, lowest)
        if full_suffix > 0:
            lowest = lowest.masked_fill(query_id >= last_id - full_suffix, 0)
        lowest = lowest.masked_fill(is_contextual, 0)

    end = torch.where(is_contextual | is_target, history, position + 1)
    return _pack(lowest, end, position, torch.where(is_target, position + 1, position))


def semi_local_intervals(
    queries: Jagged,
    lengths: Tensor,
    num_targets: Tensor,
    *,
    num_contextual: int = 0,
    local: int,
    prefix: int,
) -> Tensor:
    """Semi-local attention (ULTRA-HSTU, arXiv 2602.16986): int32 [T, 4]. Arguments as above.

    A history query sees positions [0, max(prefix, c)) and the last `local` positions up to and
    including itself, causally. Contextual queries see [0, H); targets see [0, H) and themselves.
    """
    position, history, contextual, _ = _per_query(queries, lengths, num_targets, num_contextual)
    is_target = position >= history
    is_contextual = position < contextual

    whole = is_contextual | is_target
    prefix_end = torch.minimum(contextual.clamp(min=prefix), position + 1)
    a1 = torch.where(whole, history, prefix_end)
    b0 = torch.maximum(position - local + 1, prefix_end)
    b0 = torch.where(whole, position, b0)
    b1 = torch.where(is_contextual, position, position + 1)
    return _pack(torch.zeros_like(position), a1, b0, b1)


def interval_lengths(intervals: Tensor) -> Tensor:
    """Keys each query sees: int32 [T, 4] -> int64 [T]. Their sum is the cost of attention."""
    a0, a1, b0, b1 = intervals.long().unbind(-1)
    return (a1 - a0) + (b1 - b0)


def _per_query(
    queries: Jagged, lengths: Tensor, num_targets: Tensor, num_contextual: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """position, H, c and max(c - 1, 0) of every query row, int32 [T] each."""
    history = (lengths - num_targets).to(torch.int32)
    contextual = history.clamp(max=num_contextual)
    first_id = (contextual - 1).clamp(min=0)
    sequence = queries.sequence_ids()
    return queries.positions, history[sequence], contextual[sequence], first_id[sequence]


def _pack(a0: Tensor, a1: Tensor, b0: Tensor, b1: Tensor) -> Tensor:
    """Stack the bounds, writing empty intervals as (0, 0) so that bounds of blocks stay tight."""
    a_empty, b_empty = a1 <= a0, b1 <= b0
    columns = [
        a0.masked_fill(a_empty, 0),
        a1.masked_fill(a_empty, 0),
        b0.masked_fill(b_empty, 0),
        b1.masked_fill(b_empty, 0),
    ]
    return torch.stack(columns, -1).to(torch.int32)
