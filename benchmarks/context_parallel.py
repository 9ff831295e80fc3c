"""What a second GPU is worth: attention or whole training steps, the same work at cp = 1, 2, ...

    python -m benchmarks.context_parallel attention --cp 1 2 --lengths 1638-16384
    python -m benchmarks.context_parallel attention --cp 1 2 --exchange ring halo \
        --lengths 65536 --mask semi-local
    python -m benchmarks.context_parallel step --cp 1 2 --config configs/long_sequence.yaml \
        data.max_length=16384 data.batch_size=8
    python -m benchmarks.context_parallel longest --cp 1 2 --memory 24 --config ...

One process a GPU, started anew for every cp; one table. `efficiency` is time at cp = 1 over cp
times the time here. `exposed` is the share of the time in which the GPU communicates, or waits for
another, and computes nothing, from a profiler's trace; `sent` is what a rank sends, the messages'
own bytes; `host` the time until a call has been enqueued. Times are medians of the slowest rank;
FLOPs count as in `benchmarks.attention` (backward 2.5 times forward), of matrix products 6 a weight
and token. `longest` is the length at which data.batch_size equal sequences take --memory GiB a GPU:
from the peak memory of steps at two lengths, then tried with no more memory than that.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.attention import Work, milliseconds
from gr_train.ahead import Ahead
from gr_train.config import load_config
from gr_train.model.mask import mask_intervals
from gr_train.model.recommender import Prepared
from gr_train.trainer import Trainer
from kernels.masks import hstu_intervals, interval_lengths, semi_local_intervals
from parallel.attention import EXCHANGES, context_parallel_attention
from parallel.batch import JaggedBatch
from parallel.layout import LAYOUTS
from parallel.mesh import build_mesh, local_device
from parallel.shard import shard_batch
from parallel.transport import Transport
from parallel.visibility import Mask, Visibility

COMMUNICATION = re.compile("nccl|Memcpy PtoP|_signal|barrier", re.IGNORECASE)
COLUMNS = {  # of the table: title and format
    "cp": "d",
    "exchange": "s",
    "ms": ".2f",
    "host ms": ".2f",
    "tokens/s": ",.0f",
    "TFLOP/s a GPU": ".0f",
    "efficiency": ".3f",
    "longest L": ",d",
    "longer": ".2f",
    "sent MB": ".1f",
    "exposed %": ".1f",
    "peak GiB": ".2f",
}


class Traffic:
    """Bytes that this rank sends to others, counted where messages leave."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        swap = Transport.swap
        names = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
        collectives = {name: getattr(dist, name) for name in names}

        def counting_swap(
            transport: Transport, name: str, message: Tensor, to: int | None, *rest: Any
        ) -> Any:
            self.bytes += message.nbytes if to is not None else 0
            return swap(transport, name, message, to, *rest)

        def counting(name: str) -> Callable[..., Any]:
            signature = inspect.signature(collectives[name])

            def call(*args: Any, **kwargs: Any) -> Any:
                given = signature.bind(*args, **kwargs).arguments
                self.bytes += _leaving(name, given, given.get("group") or dist.group.WORLD)
                return collectives[name](*args, **kwargs)

            return call

        Transport.swap = counting_swap  # type: ignore[assignment, method-assign]
        for name in names:
            setattr(dist, name, counting(name))
        yield
        Transport.swap = swap  # type: ignore[method-assign]
        for name, function in collectives.items():
            setattr(dist, name, function)


def _leaving(name: str, given: dict[str, Any], group: Any) -> int:
    """What of a collective's input goes to other GPUs."""
    send = given["input_tensor" if name == "all_gather_into_tensor" else "input"]
    if not send.is_cuda:
        return 0
    others = group.size() - 1
    if name == "all_gather_into_tensor":
        return send.nbytes * others
    splits = given.get("input_split_sizes")
    if splits is None:
        return send.nbytes // group.size() * others
    return send.nbytes - splits[group.rank()] * send[:1].nbytes


def exposed_share(call: Callable[[], object], calls: int, trace: str | None) -> float:
    """Of the time from the first kernel to the last, how much only communicates.

    trace: file to keep what the profiler saw in.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    if trace and dist.get_rank() == 0:
        profiler.export_chrome_trace(trace)
    spans: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            communicates = COMMUNICATION.search(event.name) is not None
            spans[communicates].append((event.time_range.start, event.time_range.end))
    both = _union(spans[False] + spans[True])
    whole = both[-1][1] - both[0][0]
    return (_length(both) - _length(_union(spans[False]))) / whole


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _length(spans: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def measure(call: Callable[[], object], args: argparse.Namespace, name: str) -> dict[str, Any]:
    """ms, bytes sent, exposed share and peak memory of one call on this rank."""
    for _ in range(args.warmup):
        call()
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
    peak = torch.cuda.max_memory_allocated()
    trace = f"{args.trace}-{name}-cp{args.worker}.json.gz" if args.trace else None
    return {
        "ms": max(ms, mean) if args.what == "step" else ms,
        "host ms": enqueued * 1000 / args.repeats,
        "sent MB": traffic.bytes / 1e6,
        "peak GiB": peak / 2**30,
        "exposed %": 100 * exposed_share(call, 3, trace),
    }


def attention(args: argparse.Namespace) -> list[dict]:
    """The rows of one cp: every exchange on the same sequences."""
    device, world = local_device(), int(args.worker)
    mesh = build_mesh(dp=1, cp=world, device=device)
    work = Work("", args.lengths, args.tokens, args.mask, heads=args.heads, dim=args.dim)
    lengths = torch.tensor(work.draw_lengths(), dtype=torch.int32)
    mine = lengths[mesh.rank :: world]
    ids = {"id": torch.zeros(int(mine.sum()), dtype=torch.int64)}
    shard = shard_batch(
        JaggedBatch(mine, torch.zeros_like(mine), ids), LAYOUTS[args.layout](world), mesh
    )
    mask: Mask = hstu_intervals
    if args.mask == "semi-local":
        mask = partial(semi_local_intervals, local=args.local, prefix=args.prefix)
    seen = Visibility(shard, mask)
    torch.manual_seed(mesh.rank)
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

        row = measure(call, args, exchange)
        name = f"ring, {mesh.transport.name}" if exchange == "ring" else exchange
        row |= {"exchange": name if world > 1 else "-"}
        row |= {"flops": flops, "tokens": int(lengths.sum())}
        rows.append(row)
    return rows


def step(args: argparse.Namespace) -> list[dict]:
    """The row of one cp: training steps of a config."""
    world = int(args.worker)
    overrides = [*args.overrides, f"parallel.cp={world}"]
    config = load_config(args.config, overrides, world_size=world)
    trainer = Trainer(config)
    trainer.dense.train()
    batches = list(islice(trainer.loader, args.batches))
    made = itertools.count(1)

    def make() -> Prepared:
        torch.cuda.set_device(trainer.device)
        number = next(made)
        return trainer.prepare(number, batches[number % len(batches)])

    prepared = iter(Ahead(make, 10**9, threaded=True))
    steps = 0

    def call() -> None:
        nonlocal steps
        steps += 1
        trainer.step(steps, next(prepared))

    row = measure(call, args, "step")
    row |= {"exchange": config.parallel.exchange if world > 1 else "-"}
    flops, tokens = 0.0, 0
    for batch in batches:
        shard = trainer.shard(batch)
        model, rows = config.model, shard.rows.num_rows
        mask = partial(mask_intervals, model.mask, len(trainer.info.contextual))
        seen = Visibility(shard, mask)
        heads = model.num_heads * (model.qk_dim + model.v_dim)
        pairs = float(interval_lengths(seen.intervals).sum().double())
        weights = model.width * 2 * heads + model.num_heads * model.v_dim * model.width
        flops += model.num_layers * (3.5 * 2 * heads * pairs + 6 * weights * rows)
        tokens += rows
    row |= {"flops": flops / len(batches)}
    total = torch.tensor([float(tokens)])
    dist.all_reduce(total)
    return [row | {"tokens": float(total) / len(batches)}]


def longest(args: argparse.Namespace) -> list[dict]:
    """The row of one cp: the longest sequences whose training step fits."""
    world = int(args.worker)
    config = load_config(args.config, [*args.overrides, f"parallel.cp={world}"], world_size=world)
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
        trainer.step(1, trainer.prepare(1, batch))
        torch.cuda.synchronize()
        bytes_now = torch.tensor(torch.cuda.max_memory_allocated() + trainer.mesh.transport.nbytes)
        dist.all_reduce(bytes_now, dist.ReduceOp.MAX)
        return float(bytes_now)

    budget = args.memory * 2**30
    short, middle = 1024 * world, 4096 * world
    low, high = peak(short), peak(middle)
    per_token = (high - low) / (middle - short)
    length = int(middle + (budget - high) / per_token)
    length = min(length, config.data.max_length) // (128 * world) * 128 * world
    torch.cuda.empty_cache()
    # Message buffers are not the allocator's; what they will take is known from what they take.
    buffers = trainer.mesh.transport.nbytes * length / middle
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((budget - buffers) / total)
    start = time.perf_counter()
    used = peak(length)
    return [
        {
            "exchange": "-" if world == 1 else config.parallel.exchange,
            "longest L": length,
            "ms": (time.perf_counter() - start) * 1e3,
            "peak GiB": used / 2**30,
            "bytes a token": per_token / sequences * world,
            "tokens": sequences * length,
        }
    ]


def work_as_rank(args: argparse.Namespace) -> None:
    """One process of a group; rank 0 writes what the slowest rank took."""
    rows = {"attention": attention, "step": step, "longest": longest}[args.what](args)
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
        with tempfile.NamedTemporaryFile() as file:
            torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={cp}"]
            module = ["-m", "benchmarks.context_parallel", *sys.argv[1:]]
            command = [sys.executable, "-m", *torchrun, *module]
            subprocess.run([*command, "--worker", str(cp), "--out", file.name], check=True)
            rows += [{"cp": cp} | row for row in json.load(file)]
    for row in rows:
        seconds = row["ms"] / 1e3
        row["tokens/s"] = row["tokens"] / seconds
        if args.what == "longest":
            row["longer"] = row["longest L"] / rows[0]["longest L"]
            continue
        row["TFLOP/s a GPU"] = row["flops"] / seconds / 1e12
        if rows[0]["cp"] == 1:
            row["efficiency"] = rows[0]["ms"] / (row["cp"] * row["ms"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["attention", "step", "longest"])
    parser.add_argument("--cp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", help="file for all numbers")
    parser.add_argument("--trace", help="start of the names of files for the profiler's traces")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    group = parser.add_argument_group("attention")
    group.add_argument("--exchange", nargs="+", choices=EXCHANGES, default=["ring"])
    group.add_argument("--layout", choices=LAYOUTS, default="zigzag")
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
