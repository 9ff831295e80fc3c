"""Kernels compiled before the first step, for whatever lengths a batch may have.

Which kernels are the fastest depends on how long sequences are, how many rows there are, and how
much memory may be taken: a batch like none before it may need others. In the midst of training, all
ranks would wait for the one that compiles them. Left for later are those of evaluations, without
dropout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.scratch import limit_scratch, scratch_limit
from parallel.attention import make_ready
from parallel.batch import JaggedBatch
from parallel.exchange.ring import MESSAGE_BYTES
from parallel.shard import Shard
from parallel.visibility import Mask, Visibility

# Rows of all heads, half of which at a time, perhaps: enough for `configs.FEW`, and for `MANY`; and
# so many as lie between these two.
ENOUGH, BETWEEN = 2 * 48 * 1024, 60 * 1024
PIECES = 3  # the first, any between, and the last
# That compile for one GPU, at most: there may be more cores than a container has time on.
COMPILERS = 16


@dataclass(frozen=True)
class Probe:
    """Lengths of a batch, int32 [sequences], and the bytes of scratch to run it with at most.

    pieces: as `Visibility.ring_pieces`.
    """

    lengths: Tensor
    scratch: int
    pieces: int | None = None


def probes(
    count: int, max_length: int, *, heads: int, scratch: int, message: int = 0
) -> list[Probe]:
    """Stand for all batches of up to `count` sequences of 1 to max_length tokens, with `scratch`
    bytes to spare; with no more rows than it takes, the longest first.

    Kinds of lengths begin at powers of two, and end before them: see `kernels.triton.configs`. And
    a small batch with little to spare is like a large one with much. message: bytes of one head's
    keys and values that a rank may send round a ring, which does it in pieces if they are many:
    sums then begin, go on and end in launches of their own.
    """
    powers = [1 << i for i in range(max_length.bit_length())]
    found = []
    for length in sorted({max_length, *powers, *(x - 1 for x in powers[1:])}, reverse=True):
        some = min(count, -(-ENOUGH // (heads * length)))
        share = _slopes(some, length) / _slopes(count, max_length)
        for few, least in ((some, scratch), (some, int(scratch * share) // 2), (1, scratch)):
            found.append(Probe(torch.full((few,), length, dtype=torch.int32), least))
        if message > MESSAGE_BYTES:  # one head's rows
            pieces = min(PIECES, -(-message // MESSAGE_BYTES))
            some = min(count, -(-PIECES * ENOUGH // length))
            found.append(Probe(torch.full((some,), length, dtype=torch.int32), scratch, pieces))
    few = -(-BETWEEN // (heads * max_length))
    if message and few <= count:  # powers of two may step over these
        length = max(1, BETWEEN // (few * heads))
        found.append(Probe(torch.full((few,), length, dtype=torch.int32), scratch))
    return found


def _slopes(count: int, length: int) -> int:
    """How many there are at most: in parts of 64 queries and of 64 keys."""
    return count * (length + 64) ** 2


def warm_up(
    layers: Iterable[nn.Module],
    width: int,
    batches: list[Probe],
    *,
    shards: Sequence[Callable[[JaggedBatch], Shard]],
    mask: Mask,
    num_contextual: int,
    num_targets: int,
    exchange: str,
    residual: torch.dtype,
    precision: torch.dtype | None,
    device: torch.device,
) -> None:
    """Each layer, forward and backward, on each of the batches; nothing of it stays but what was
    compiled. Collective over all processes.

    shards: ways to cut a batch. num_contextual, num_targets: tokens of a sequence, if it is long
    enough. residual, precision: of the model.
    """

    def run() -> None:
        for probe, shard in product(batches, shards):
            tokens = {"item": torch.zeros(int(probe.lengths.sum()), dtype=torch.int64)}
            targets = (probe.lengths // 2).clamp(max=num_targets)
            batch = JaggedBatch(probe.lengths, targets, tokens)
            seen = Visibility(shard(batch), mask, num_contextual, probe.pieces)
            make_ready(seen, exchange)
            rows = seen.shard.rows.num_rows
            x = torch.zeros(rows, width, dtype=residual, device=device, requires_grad=True)
            limit_scratch(probe.scratch)
            for layer in layers:
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    out = layer(x, seen)
                # Toward x alone: parameters get no gradients, and DDP does not hear of it.
                torch.autograd.grad(out, x, torch.zeros_like(out))

    scratch = scratch_limit()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if device.type == "cuda":
                _compile_side_by_side(run)
            run()
    finally:
        limit_scratch(scratch)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _compile_side_by_side(run: Callable[[], None]) -> None:
    """What `run` would launch, each process of this machine its share, on its share of the cores;
    the others find it in Triton's cache, if they have one in common."""
    from kernels.triton.ahead import compile_all
    from kernels.triton.launcher import not_compiled

    rank, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) // size
    compile_all(not_compiled(run)[rank % size :: size], min(max(cores, 1), COMPILERS))
    dist.barrier()
