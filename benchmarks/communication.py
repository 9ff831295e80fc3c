"""What a GPU sends, how long its messages take, and when it only waits for them: measured.

For `benchmarks.context_parallel`.
"""

from __future__ import annotations

import gzip
import inspect
import json
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.attention import milliseconds
from parallel.transport import Message, Transport

BEGIN = "spin_kernel"
REST = 400_000_000  # cycles, some 0.2 s
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
COMMUNICATION = re.compile("nccl|Memcpy", re.IGNORECASE)
ORDINARY_GAP = 8  # us between two kernels: at cp = 1 hardly any is longer


class Traffic:
    """Bytes that this rank sends to others, counted where messages leave."""

    def __init__(self) -> None:
        self.bytes = 0
        self.messages: list[int] = []  # by a link, bytes each

    @contextmanager
    def counted(self) -> Iterator[None]:
        swap = Transport.swap
        names = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
        collectives = {name: getattr(dist, name) for name in names}

        def counting_swap(
            transport: Transport, name: str, message: Message, to: int | None, *rest: Any
        ) -> Any:
            size = sum(part.nbytes for part in message)
            if to is not None and size:
                self.messages.append(size)
                self.bytes += size
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


def idle_shares(call: Callable[[], object], calls: int, trace: str | None) -> tuple[float, float]:
    """Of the time that so many calls take: in how much the GPU does not compute, and in how much
    only because others let it wait.

    It may copy, run NCCL's kernels, wait for another rank or for the host. Where the next kernel
    had been enqueued, and the gap is longer than those between any two kernels, it is neither the
    host nor the GPU itself. A rest and two calls come before them: when profilers have started,
    ranks are not in step, and their hosts not ahead. trace: file to keep what the profiler saw in.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        torch.cuda._sleep(REST)
        call()
        call()
        torch.cuda._sleep(1)  # a kernel that is told from the others: here it begins
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:  # a profiler saves once
        file = trace if trace and dist.get_rank() == 0 else f"{folder}/trace.json.gz"
        profiler.export_chrome_trace(file)
        with gzip.open(file) as saved:
            return shares_of_trace(json.load(saved)["traceEvents"])


def shares_of_trace(events: list[dict[str, Any]]) -> tuple[float, float]:
    """See `idle_shares`; from a profiler's trace, of what comes after its last `BEGIN`.

    What others make a rank wait after its last kernel that computes counts as idle, not as
    exposed: no later kernel tells it from the messages' own time.
    """
    events = [event for event in events if event.get("ph") == "X"]
    enqueued = {
        event["args"]["correlation"]: event["ts"] + event["dur"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]
    }
    on_gpu = [event for event in events if event.get("cat") in ON_GPU]
    first = max(event["ts"] + event["dur"] for event in on_gpu if BEGIN in event["name"])
    on_gpu = [event for event in on_gpu if event["ts"] >= first]
    last = max(event["ts"] + event["dur"] for event in on_gpu)
    idle, exposed, until = 0.0, 0.0, first
    for event in sorted(on_gpu, key=lambda event: event["ts"]):
        if COMMUNICATION.search(event["name"]):
            continue
        start = event["ts"]
        idle += max(0.0, start - until)
        waited = start - max(until, enqueued.get(event["args"].get("correlation"), first))
        exposed += waited if waited > ORDINARY_GAP else 0.0
        until = max(until, start + event["dur"])
    return (idle + last - until) / (last - first), exposed / (last - first)


def link_curve(transport: Transport) -> list[tuple[int, float]]:
    """Bytes of a message and the milliseconds it takes, both ways at once and nothing beside it."""
    rank, size = transport.group.rank(), transport.group.size()
    curve = []
    for mebibytes in (1, 4, 16, 64, 256):
        count = mebibytes << 20

        def swap(count: int = count) -> None:
            message = transport.outbox("link", count, torch.uint8)
            incoming = transport.inbox("link", count, count, torch.uint8)
            to, source = (rank + 1) % size, (rank - 1) % size
            transport.swap("link", (message,), to, incoming, source).wait()

        milliseconds(swap, 5)
        curve.append((count, statistics.median(milliseconds(swap, 10))))
    return curve
