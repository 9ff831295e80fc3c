"""Kernels compiled before the first step, for whatever lengths a batch may have.

Which kernels are the fastest depends on how long sequences are, how many rows there are, and how
much memory is left for them: a batch like none before it may need others. In the midst of
training, all ranks would wait for the one that compiles them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from kernels.scratch import limit_scratch, scratch_limit
from parallel.attention import make_ready
from parallel.batch import JaggedBatch
from parallel.shard import Shard
from parallel.visibility import Mask, Visibility

ENOUGH = 48 * 1024  # rows of all heads; more change nothing, see `kernels.triton.configs`


def probes(count: int, max_length: int, *, heads: int, scratch: int) -> list[tuple[int, Tensor]]:
    """Lengths of batches, int32 [up to count] each, and the limit of scratch to run each under.

    Stands for all batches of up to `count` sequences of 1 to max_length tokens under a limit of
    `scratch` bytes, with no more rows than it takes: kinds of lengths begin at powers of two, and
    end before them; and a small batch under a small limit is like a large one under a large.
    """
    powers = [1 << i for i in range(max_length.bit_length())]
    most, found = _scratch(count, max_length), []
    for length in sorted({max_length, *powers, *(x - 1 for x in powers[1:])}):
        few = min(count, -(-ENOUGH // (heads * length)))
        lengths = torch.full((few,), length, dtype=torch.int32)
        found += [(scratch, lengths), (scratch * _scratch(few, length) // most // 2, lengths)]
    return found


def _scratch(count: int, length: int) -> int:
    """What slopes take, in a unit of its own: of parts of 64 queries and of 64 keys."""
    return count * (length + 64) ** 2


def warm_up(
    layers: Iterable[nn.Module],
    width: int,
    *,
    batches: list[tuple[int, Tensor]],
    shards: Sequence[Callable[[JaggedBatch], Shard]],
    mask: Mask,
    exchange: str,
    residual: torch.dtype,
    precision: torch.dtype | None,
    device: torch.device,
) -> None:
    """Each layer, forward and backward, on each of the batches; nothing of it stays but what was
    compiled. Collective over the cp group.

    batches: of `probes`. shards: ways to cut them. residual, precision: of the model.
    """
    gpus, scratch = [device] if device.type == "cuda" else [], scratch_limit()
    with torch.random.fork_rng(gpus):
        for (limit, lengths), shard in product(batches, shards):
            tokens = {"item": torch.zeros(int(lengths.sum()), dtype=torch.int64)}
            batch = JaggedBatch(lengths, torch.zeros_like(lengths), tokens)
            seen = Visibility(shard(batch), mask)
            make_ready(seen, exchange)
            rows = seen.shard.rows.num_rows
            x = torch.zeros(rows, width, dtype=residual, device=device, requires_grad=True)
            limit_scratch(limit)
            for layer in layers:
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    out = layer(x, seen)
                torch.autograd.grad(
                    out, x, torch.zeros_like(out)
                )  # of x alone: parameters get none
    limit_scratch(scratch)
