"""What a second GPU is worth: attention or whole training steps, the same work at cp = 1, 2, ...

    python -m benchmarks.context_parallel attention --cp 1 2 --lengths 1638-16384
    python -m benchmarks.context_parallel attention --cp 1 2 --exchange ring halo \
        --lengths 65536 --tokens 262144 --mask semi-local --layout contiguous
    python -m benchmarks.context_parallel step --cp 1 2 --config configs/long_sequence.yaml \
        data.max_length=16384 data.batch_size=8
    python -m benchmarks.context_parallel step --cp 1 --dp 2 --zipf 1.2 --config ... model...=...
    python -m benchmarks.context_parallel longest --cp 1 2 --memory 24 --config ...

One process a GPU, started anew for every cp; one table. At cp = 1 each of the GPUs works alone, all
side by side, and the mean counts: no two GPUs are equally fast, and a group goes with the slowest.
`efficiency` is time at cp = 1 over cp times the time here. `idle` is the share of the time in which
the GPU computes nothing, from a profiler's trace: it copies, waits for another GPU or, at cp=1 too,
for the host. `exposed` is what of it others are to blame for: the next kernel has been enqueued,
and the gap is longer than those between any two kernels. `sent` is what a rank sends, the messages'
own bytes; `host` the time until a call has been enqueued. Times are medians of the slowest rank;
FLOPs count as in `benchmarks.attention` (backward 2.5 times forward), of matrix products 6 a weight
and token; MFU is their share of the GPU's dense bf16 peak, where that is known. `longest` is the
length at which data.batch_size equal sequences use 92 % of --memory GiB a GPU: tried, with no more
memory than that, along the line through the peaks of shorter ones. There and in `attention` (but
with --keep-whole) all sequences are cut; in `step` those that parallel.keep_whole leaves to be.

--simulate 4 8 adds rank 0 of groups of that size, alone on one GPU, whose messages go nowhere: what
it computes. `link ms` is what a ring's messages take one after another on an idle link, by the
bandwidth measured at the first real cp over 1; they have `ms` to hide in.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.attention import Work, milliseconds
from benchmarks.balance import zipf_events
from benchmarks.communication import Traffic, idle_shares, link_curve
from benchmarks.processes import measured
from gr_train.ahead import Ahead
from gr_train.config import load_config
from gr_train.data.synthetic import SyntheticSource
from gr_train.model.mask import layer_flops, mask_intervals
from gr_train.model.recommender import Prepared
from gr_train.trainer import Trainer, freeze_objects
from kernels.masks import interval_lengths
from parallel.attention import EXCHANGES, context_parallel_attention
from parallel.batch import JaggedBatch
from parallel.layout import LAYOUTS, Layout
from parallel.links import Links
from parallel.mesh import build_mesh, local_device
from parallel.send_receive import SendReceive
from parallel.shard import Shard, shard_batch
from parallel.visibility import Visibility
from parallel.watchdog import Watchdog

COLUMNS = {  # of the table: title and format
    "cp": "d",
    "exchange": "s",
    "ms": ".2f",
    "host ms": ".2f",
    "tokens/s": ",.0f",
    "TFLOP/s a GPU": ".0f",
    "MFU %": ".1f",
    "efficiency": ".3f",
    "longest L": ",d",
    "longer": ".2f",
    "sent MB": ".1f",
    "link ms": ".2f",
    "idle %": ".1f",
    "exposed %": ".1f",
    "peak GiB": ".2f",
}
PEAK_TFLOPS = {  # dense bf16, as published
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
}
WARMUP = {"attention": 300}  # two seconds: a GPU that is still cool runs faster than in training


def measure(
    call: Callable[[], object], args: argparse.Namespace, name: str, links: Links | None
) -> dict[str, Any]:
    """ms, bytes sent, idle and exposed shares and peak memory of one call on this rank."""
    for _ in range(WARMUP.get(args.what, 5) if args.warmup is None else args.warmup):
        call()
    freeze_objects()  # as the trainer does
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    traffic = Traffic()
    with traffic.counted():
        call()
    ms = statistics.median(milliseconds(call, args.repeats))
    start = time.perf_counter()
    for _ in range(args.repeats):
        call()
    enqueued = time.perf_counter() - start
    torch.cuda.synchronize()
    mean = (time.perf_counter() - start) * 1000 / args.repeats
    peak = torch.cuda.max_memory_allocated() + (links.within.nbytes if links else 0)
    trace = f"{args.trace}-{name}-cp{args.worker}.json.gz" if args.trace else None
    idle, exposed = idle_shares(call, 3, trace)
    return {
        "ms": max(ms, mean) if args.what == "step" else ms,
        "host ms": enqueued * 1000 / args.repeats,
        "sent MB": traffic.bytes / 1e6,
        "messages": traffic.messages,
        "peak GiB": peak / 2**30,
        "idle %": 100 * idle,
        "exposed %": 100 * exposed,
    }


def simulated_shard(lengths: Tensor, layout: Layout, device: torch.device) -> Shard:
    """Rank 0's of a group whose other ranks do not exist: messages go nowhere."""
    size = layout.cp_size
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    parts = layout.parts(lengths)
    transport = SendReceive(group, device, Watchdog(0, timedelta(hours=1), device))
    targets = torch.zeros_like(lengths)
    return Shard(lengths, targets, parts, {}, group, 0, device, Links(transport))


def attention(args: argparse.Namespace) -> list[dict]:
    """The rows of one cp: every exchange on the same sequences."""
    device, world = local_device(), int(args.worker)
    work = Work("", args.lengths, args.tokens, args.mask, local=args.local, prefix=args.prefix)
    lengths = torch.tensor(work.draw_lengths(), dtype=torch.int32)
    layout = LAYOUTS[args.layout](world)
    if args.simulated:
        shard = simulated_shard(lengths, layout, device)
    else:
        mesh = build_mesh(dp=1, cp=world, device=device)
        mine = lengths[mesh.rank :: world]
        ids = {"id": torch.zeros(int(mine.sum()), dtype=torch.int64)}
        batch = JaggedBatch(mine, torch.zeros_like(mine), ids)
        shard = shard_batch(batch, layout, mesh, keep_whole=args.keep_whole)
    seen = Visibility(shard, work.intervals)
    torch.manual_seed(shard.rank)
    shape = (shard.rows.num_rows, args.heads, args.dim)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    tensors = [x.requires_grad_() for x in (q, k, v)]
    pairs = interval_lengths(seen.intervals).sum().double()
    flops = 3.5 * 4 * args.heads * args.dim * float(pairs)

    rows = []
    for exchange in args.exchange if world > 1 else args.exchange[:1]:

        def call(exchange: str = exchange) -> None:
            out = context_parallel_attention(
                q,
                k,
                v,
                seen=seen,
                alpha=args.dim**-0.5,
                scale=1 / int(lengths.max()),
                exchange=exchange,
            )
            torch.autograd.grad(out, tensors, dout)

        row = measure(call, args, exchange, shard.links)
        name = exchange if world > 1 else "-"
        link = EXCHANGES[exchange].by(shard.links) if shard.links else ""
        if world > 1 and link:
            name += ", simulated" if args.simulated else f", {link}"
        row |= {"exchange": name}
        row |= {"flops": flops, "tokens": int(lengths.sum())}
        rows.append(row)
    if world > 1 and not args.simulated and shard.links is not None:
        rows[0]["link"] = link_curve(shard.links.within)
    return rows


def step(args: argparse.Namespace) -> list[dict]:
    """The row of one cp: training steps of a config."""
    cp = int(args.worker)
    overrides = [*args.overrides, f"parallel.cp={cp}"]
    config = load_config(args.config, overrides, world_size=cp * args.dp)
    if args.zipf:
        draw_zipf_lengths(args.zipf)
    trainer = Trainer(config)
    trainer.dense.train()
    batches = list(islice(trainer.loader, args.batches))
    made = itertools.count(1)

    def make() -> Prepared:
        torch.cuda.set_device(trainer.device)
        number = next(made)
        return trainer.prepare(number, batches[number % len(batches)])

    ahead = Ahead(make, 10**9, threaded=True)
    prepared = iter(ahead)
    steps = 0

    def call() -> None:
        nonlocal steps
        steps += 1
        trainer.step(steps, next(prepared), ahead.begin)

    row = measure(call, args, "step", trainer.mesh.links)
    ahead.settle()  # its messages must not meet those that follow
    row |= {"exchange": trainer.sharding.exchange if cp > 1 else "-"}
    flops, tokens = 0.0, 0
    for batch in batches:
        shard = trainer.shard(batch)
        model, rows = config.model, shard.rows.num_rows
        mask = partial(mask_intervals, model.mask, len(trainer.info.contextual))
        seen = Visibility(shard, mask)
        pairs = float(interval_lengths(seen.intervals).sum().double())
        of_attention, of_projections = layer_flops(model, pairs, rows)
        flops += model.num_layers * (3.5 * of_attention + 3 * of_projections)
        tokens += rows
    totals = torch.tensor([flops, tokens], dtype=torch.float64)
    dist.all_reduce(totals)
    flops, tokens = (totals / len(batches)).tolist()
    return [row | {"flops": flops / dist.get_world_size(), "tokens": tokens}]


def draw_zipf_lengths(exponent: float) -> None:
    """Have synthetic users' numbers of events follow Zipf's law, those above data.synthetic's
    max_events cut to it; the event that is only a label comes on top."""

    def num_events(source: SyntheticSource, rng: np.random.Generator) -> int:
        return int(zipf_events(rng, exponent, source.config.max_events - 1)) + 1

    SyntheticSource._num_events = num_events  # type: ignore[assignment, method-assign]


def longest(args: argparse.Namespace) -> list[dict]:
    """The row of one cp: the longest sequences whose training step fits."""
    world = int(args.worker)
    overrides = [*args.overrides, f"parallel.cp={world}", "parallel.keep_whole=false"]
    config = load_config(args.config, overrides, world_size=world)
    trainer = Trainer(config)
    trainer.dense.train()
    sequences, device = config.data.batch_size, trainer.device

    def peak(length: int) -> float:
        """Bytes of the fullest rank, in a step on whole sequences of `length` tokens."""
        mine = range(trainer.mesh.rank, sequences, world)
        lengths = torch.full((len(mine),), length, dtype=torch.int32)
        random = {"id": trainer.info.num_items, "action": 2, "gap": 1000}
        random["label"] = trainer.info.num_items
        tokens = {n: torch.randint(high, (len(mine) * length,)) for n, high in random.items()}
        tokens["id"].view(-1, length)[:, : len(trainer.info.contextual)] = 0
        batch = JaggedBatch(lengths, torch.zeros_like(lengths), tokens)
        torch.cuda.reset_peak_memory_stats()
        trainer.step(1, trainer.prepare(1, batch))
        torch.cuda.synchronize()
        bytes_now = torch.tensor(
            torch.cuda.max_memory_allocated() + trainer.mesh.links.within.nbytes
        )
        dist.all_reduce(bytes_now, dist.ReduceOp.MAX)
        return float(bytes_now)

    budget = args.memory * 2**30
    aim = 0.92 * budget  # in use: the allocator needs room between
    total = torch.cuda.get_device_properties(device).total_memory
    peak(1024 * world)  # makes what stays, such as the optimizer's state
    used: dict[int, float] = {}
    length = 2048 * world
    for _ in range(10):  # along the line through the two longest, until it leads no further
        start = time.perf_counter()
        used[length] = peak(length)
        took = time.perf_counter() - start
        if trainer.mesh.rank == 0:
            print(f"cp={world}: {length} tokens take {used[length] / 2**30:.2f} GiB", flush=True)
        before, most = [0, *sorted(used)][-2:]
        per_token = (used[most] - used.get(before, 0)) / (most - before)
        # Not far beyond what was tried: what takes most there need not do so here.
        more = (aim - used[most]) / per_token if per_token > 0 else most
        unit = 128 * world
        length = int(most + min(most, more)) // unit * unit
        if length <= most:
            break
        if length > config.data.max_length:
            raise ValueError(
                f"data.max_length: {config.data.max_length}; {length} would fit, ask for more"
            )
        # Message buffers are not the allocator's, and grow with the length until they are full.
        torch.cuda.empty_cache()
        buffers = trainer.mesh.links.within.nbytes * length / most
        torch.cuda.set_per_process_memory_fraction((budget - buffers) / total)
    return [
        {
            "exchange": "-" if world == 1 else trainer.sharding.exchange,
            "longest L": most,
            "ms": took * 1e3,
            "peak GiB": used[most] / 2**30,
            "bytes a token": per_token / sequences * world,
            "tokens": sequences * most,
        }
    ]


def work_as_rank(args: argparse.Namespace) -> None:
    """One process of a group; rank 0 writes what the slowest rank took."""
    rows = {"attention": attention, "step": step, "longest": longest}[args.what](args)
    if args.simulated:
        with open(args.out, "w") as file:
            json.dump(rows, file)
        return
    gathered: list[list[dict]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, rows)
    if dist.get_rank() == 0:
        slowest = [
            {key: max(row[key] for row in ranks) for key in ranks[0]}
            for ranks in zip(*gathered, strict=True)
        ]
        with open(args.out, "w") as file:
            json.dump(slowest, file)
    dist.barrier()
    dist.destroy_process_group()


def launch(args: argparse.Namespace) -> list[dict]:
    """The rows of all cp, each from processes of its own."""
    rows: list[dict] = []
    for cp in args.cp:
        rows += measured(args, cp)
    for cp in args.simulate:
        rows += measured(args, cp, simulated=True)
    curve = next((row["link"] for row in rows if "link" in row), None)
    peak = PEAK_TFLOPS.get(torch.cuda.get_device_name())
    for row in rows:
        seconds = row["ms"] / 1e3
        row["tokens/s"] = row["tokens"] / seconds
        if args.what == "longest":
            row["longer"] = row["longest L"] / rows[0]["longest L"]
            continue
        row["TFLOP/s a GPU"] = row["flops"] / seconds / 1e12
        if peak:
            row["MFU %"] = 100 * row["TFLOP/s a GPU"] / peak
        if curve and row["messages"]:
            sizes, times = (list(x) for x in zip(*curve, strict=True))
            row["link ms"] = float(np.interp(row["messages"], sizes, times).sum())
        if rows[0]["cp"] == 1:
            row["efficiency"] = rows[0]["ms"] / (row["cp"] * row["ms"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["attention", "step", "longest"])
    parser.add_argument("--cp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--warmup", type=int, help="calls: 300 of attention, 5 steps if not given")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", help="file for all numbers")
    parser.add_argument("--trace", help="start of the names of files for the profiler's traces")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--simulated", action="store_true", help=argparse.SUPPRESS)
    group = parser.add_argument_group("attention")
    group.add_argument("--simulate", type=int, nargs="*", default=[], help="more cp, of one rank")
    group.add_argument("--exchange", nargs="+", choices=EXCHANGES, default=["ring"])
    group.add_argument("--layout", choices=LAYOUTS, default="zigzag")
    group.add_argument("--keep-whole", action="store_true", help="cut only what must be")
    group.add_argument("--lengths", default="1638-16384", help="16384, or 1638-16384 for uniform")
    group.add_argument("--tokens", type=int, default=65536)
    group.add_argument("--mask", choices=["causal", "semi-local"], default="causal")
    group.add_argument("--local", type=int, default=1024)
    group.add_argument("--prefix", type=int, default=128)
    group.add_argument("--heads", type=int, default=4)
    group.add_argument("--dim", type=int, default=128)
    group = parser.add_argument_group("step and longest")
    group.add_argument("--config", help="as of gr-train train")
    group.add_argument("--batches", type=int, default=4, help="made beforehand, used in turn")
    group.add_argument("--dp", type=int, default=1, help="so many times cp GPUs, for step")
    group.add_argument("--zipf", type=float, help="exponent of the numbers of events, for step")
    group = parser.add_argument_group("longest")
    group.add_argument("--memory", type=float, default=24, help="GiB a GPU")
    args, rest = parser.parse_known_args()
    args.overrides = rest
    unknown = [x for x in rest if "=" not in x or x.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.worker:
        work_as_rank(args)
        return

    if (args.dp > 1 or args.zipf) and args.what != "step":
        parser.error("--dp, --zipf: for step alone")
    if args.simulate and args.what != "attention":
        parser.error("--simulate: for attention alone")
    gpus = max(args.cp) * args.dp
    if torch.cuda.device_count() < gpus:
        parser.error(f"{gpus} GPUs wanted, this machine has {torch.cuda.device_count()}")
    rows = launch(args)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {' '.join(sys.argv[1:])}")
    cells = [
        [format(row[name], form) if name in row else "" for name, form in COLUMNS.items()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    for line in (list(COLUMNS), *cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(args=sys.argv[1:], rows=rows), file, indent=1)


if __name__ == "__main__":
    main()
