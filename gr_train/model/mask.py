"""The mask a config names, the sharding that suits it, the work it makes of each sequence."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gr_train.config import Config, MaskConfig, ModelConfig
from kernels.jagged import Jagged
from kernels.masks import hstu_intervals, interval_lengths, semi_local_intervals
from parallel.batch import JaggedBatch
from parallel.layout import ContiguousLayout

Number = TypeVar("Number", float, Tensor)


def mask_intervals(
    mask: MaskConfig, num_contextual: int, queries: Jagged, lengths: Tensor, num_targets: Tensor
) -> Tensor:
    """int32 [rows, 4]: which keys each query row sees; see `kernels.masks`."""
    whole = (queries, lengths, num_targets)
    if mask.local:
        return semi_local_intervals(
            *whole, num_contextual=num_contextual, local=mask.local, prefix=mask.prefix
        )
    return hstu_intervals(
        *whole, num_contextual=num_contextual, window=mask.window, full_suffix=mask.full_suffix
    )


class Sharding(NamedTuple):
    layout: str
    exchange: str
    why: str


def choose_sharding(config: Config) -> Sharding:
    """What "auto" means for this mask, and why; see ParallelConfig."""
    mask, layout, exchange = config.model.mask, config.parallel.layout, config.parallel.exchange
    windowed = bool(mask.window or mask.local)
    if layout != "auto":
        why = "layout as configured"
    elif not windowed:
        layout, why = "zigzag", "stripes make causal work equal"
    elif exchange not in ("auto", "halo"):
        layout, why = "zigzag", "only a halo gains from contiguous chunks"
    elif _chunks_are_equal_work(config):
        layout, why = "contiguous", "chunks are equal work"
    else:
        layout, why = "zigzag", "contiguous chunks would be unequal work"
    if exchange != "auto":
        both = config.parallel.layout != "auto"
        why = "as configured" if both else f"exchange as configured; {why}"
        return Sharding(layout, exchange, why)
    if not windowed:
        why = "queries see much of a sequence, whose way hides behind attention"
        return Sharding(layout, "ring", why)
    if layout == "contiguous":
        return Sharding(layout, "halo", "queries see a window, so only that is sent")
    return Sharding(layout, "ring", why)


def _chunks_are_equal_work(config: Config) -> bool:
    """Whether a rank that holds one chunk of a sequence has at most a tenth more work than the
    mean: the first rows see less than a window, a full suffix more.

    Of a sequence half as long as they may be, as many are.
    """
    layout = ContiguousLayout(config.parallel.cp)
    lengths = torch.tensor([config.data.max_length // 2], dtype=torch.int32)
    work = []
    for rows in layout.parts(lengths):
        seen = mask_intervals(config.model.mask, 0, rows, lengths, torch.zeros_like(lengths))
        work.append(float(interval_lengths(seen).sum()))
    return max(work) <= 1.1 * sum(work) / len(work)


def sequence_flops(config: ModelConfig, num_contextual: int, batch: JaggedBatch) -> Tensor:
    """Of one HSTU layer's forward, float64 [B], per sequence: what balances dp groups."""
    queries = Jagged.whole(batch.lengths)
    intervals = mask_intervals(
        config.mask, num_contextual, queries, batch.lengths, batch.num_targets
    )
    pairs = torch.zeros(batch.lengths.numel(), dtype=torch.float64)
    pairs.index_add_(0, queries.sequence_ids(), interval_lengths(intervals).double())
    attention, projections = layer_flops(config, pairs, batch.lengths.double())
    return attention + projections


def layer_flops(config: ModelConfig, pairs: Number, tokens: Number) -> tuple[Number, Number]:
    """Floating point operations of one HSTU layer's forward: of attention, of the projections.

    2 (Dqk + Dv) per head and visible pair; 2 per weight and token. A backward takes 2.5 times the
    one and twice the other.
    """
    heads, width = config.num_heads, config.width
    per_pair = 2 * heads * (config.qk_dim + config.v_dim)
    per_token = 2 * width * heads * (2 * config.qk_dim + 3 * config.v_dim)
    return per_pair * pairs, per_token * tokens
