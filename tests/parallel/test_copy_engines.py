"""The ring and the halo over copy engines, on a CPU: what they enqueue, and what waits for what.

Streams, events and counters are taken down as a graph instead of run, one rank after another. Two
uses of the same memory, one of them a write, must be ordered by it; and no wait may be for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from graphlib import CycleError, TopologicalSorter
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.masks import hstu_intervals
from kernels.source import Arrival, Source
from parallel import copy_engines, symmetric
from parallel.copy_engines import CopyEngines
from parallel.exchange import halo, ring
from parallel.exchange.ring_pass import RingPass
from parallel.layout import LAYOUTS
from parallel.links import Links
from parallel.relayout import Moving, Relayout
from parallel.send_receive import SendReceive
from parallel.shard import Shard
from parallel.swaps import Swaps
from parallel.transport import Message
from parallel.visibility import Visibility
from parallel.watchdog import Watchdog
from parallel.whole import CUT

CPU = torch.device("cpu")


@dataclass
class Graph:
    """Of everything that all ranks enqueue, by node."""

    before: dict[int, set[int]] = field(default_factory=dict)  # node -> what it waits for directly
    uses: list[tuple[int, Tensor, bool]] = field(default_factory=list)  # node, memory, is a write
    told: dict[tuple[Any, int], int] = field(default_factory=dict)  # counter, value -> node
    heard: list[tuple[int, tuple[Any, int]]] = field(default_factory=list)

    def add(self, *before: int) -> int:
        self.before[len(self.before)] = set(before)
        return len(self.before) - 1

    def races(self) -> list[tuple[int, int]]:
        """Nodes that are not ordered though they should be. Raises CycleError for a deadlock."""
        for node, message in self.heard:
            self.before[node].add(self.told[message])
        earlier: dict[int, int] = {}  # as bits
        for node in TopologicalSorter(self.before).static_order():
            earlier[node] = 0
            for other in self.before[node]:
                earlier[node] |= earlier[other] | 1 << other
        found = []
        for i, (a, x, x_written) in enumerate(self.uses):
            for b, y, y_written in self.uses[:i]:
                ordered = a == b or earlier[a] >> b & 1 or earlier[b] >> a & 1
                if (x_written or y_written) and not ordered and overlap(x, y):
                    found.append((a, b))
        return found


def overlap(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() < y.data_ptr() + y.nbytes and y.data_ptr() < x.data_ptr() + x.nbytes


class Stream:
    device = CPU

    def __init__(self, graph: Graph) -> None:
        self.graph, self.last = graph, graph.add()

    def enqueue(self, *after: int) -> int:
        self.last = self.graph.add(self.last, *after)
        return self.last

    def record_event(self) -> Event:
        return Event(self.enqueue())

    def wait_event(self, event: Event) -> None:
        self.enqueue(event.node)

    def wait_stream(self, other: Stream) -> None:
        self.enqueue(other.last)


@dataclass
class Event:
    node: int = 0

    def record(self, stream: Stream) -> None:
        self.node = stream.enqueue()

    def query(self) -> bool:
        return True


@dataclass
class Group:
    ranks: int
    mine: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.mine


class Device:
    """Of one rank. Stands in for what the ring and the transport use of PyTorch's."""

    def __init__(self, graph: Graph, rank: int, buffers: list[list[Tensor]]) -> None:
        self.graph, self.rank, self.buffers = graph, rank, buffers
        self.main, self.side, self.network = Stream(graph), Stream(graph), Stream(graph)
        self.current = self.main
        self.rendezvous = 0

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    def use(
        self,
        read: tuple[Tensor | None, ...],
        written: tuple[Tensor, ...],
        sources: tuple[Source, ...] = (),
        look: bool = False,
    ) -> None:
        """look: the kernel sees for itself whether rows have come; else they are waited for."""
        arrivals = [source.arrival for source in sources if source.arrival]
        signals = [arrival.signal() for arrival in arrivals] if look else []
        if not look:
            for arrival in arrivals:
                arrival.wait()
        node = self.current.enqueue()
        read += tuple(x for source in sources for x in source.rows)
        for signal in signals:
            if signal:  # as if the kernel waited: what it sees, it reads
                self.graph.heard.append((node, (signal[0].data_ptr(), signal[1])))
        self.graph.uses += [(node, x, False) for x in read if x is not None]
        self.graph.uses += [(node, x, True) for x in written]

    def write_value(self, stream: Stream, address: int, value: int) -> None:
        self.graph.told[address, value] = stream.enqueue()

    def wait_value(self, stream: Stream, address: int, value: int) -> None:
        self.graph.heard.append((stream.enqueue(), (address, value)))

    def copy_rows(self, part: Tensor, to: Tensor, start: int, stream: Stream) -> None:
        node = stream.enqueue()
        to = to[start : start + part.nbytes]
        self.graph.uses += [(node, part, False), (node, to, True)]

    def synchronize(self, device: Any = None) -> None:
        streams = self.main, self.side, self.network
        last = [stream.last for stream in streams]
        for stream in streams:
            stream.enqueue(*last)

    def meet(self, whole: Tensor, group: Group) -> Any:
        """Rendezvous: the first rank there makes the memory of all. (No growth after a message.)"""
        if self.rendezvous == len(self.buffers):
            self.buffers.append([torch.zeros_like(whole) for _ in range(group.size())])
        mine = self.buffers[self.rendezvous]
        self.rendezvous += 1
        whole.set_(mine[self.rank])  # type: ignore[call-overload]

        class Handle:
            def get_buffer(self, rank: int, *_: Any) -> Tensor:
                return mine[rank]

        return Handle()


@dataclass
class Sent(Arrival):
    node: int
    on: Device

    def wait(self) -> None:
        self.on.current.wait_event(Event(self.node))


class Network(SendReceive):
    """Between nodes, as NCCL does it: on a stream of its own, after what is current."""

    def __init__(self, device: Device, group: Any, watchdog: Watchdog) -> None:
        super().__init__(group, CPU, watchdog)
        self.on, self.kept = device, list[Any]()
        self.counts: dict[tuple[int, int], int] = {}

    def inbox(self, *args: Any) -> Tensor:
        self.kept.append(self._inboxes.copy())  # no address is used twice
        return super().inbox(*args)

    def outbox(self, *args: Any) -> Tensor:
        self.kept.append(self._outboxes.copy())
        return super().outbox(*args)

    def _count(self, ends: tuple[int, int]) -> tuple[tuple[int, int], int]:
        self.counts[ends] = self.counts.get(ends, 0) + 1
        return ends, self.counts[ends]

    def _swap(
        self, name: str, message: Message, to: int | None, incoming: Tensor, source: int | None
    ) -> Arrival:
        (sent,) = message
        graph, stream, mine = self.on.graph, self.on.network, self.group.rank()
        stream.wait_stream(self.on.current)
        if to is not None:
            node = stream.enqueue()
            graph.uses.append((node, sent, False))
            graph.told[self._count((mine, to))] = node
        if source is not None:
            node = stream.enqueue()
            graph.uses.append((node, incoming, True))
            graph.heard.append((node, self._count((source, mine))))
        done = Sent(stream.last, self.on)
        self._leaving.setdefault(sent.data_ptr(), []).append(done)  # type: ignore[arg-type]
        return done


class Copies(torch.overrides.TorchFunctionMode):
    """Takes down what is copied."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.packed = device, list[Tensor]()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.copy_:
            self.device.use((args[1],), (args[0],))
        elif function in (Tensor.index_copy_, Tensor.index_add_):
            self.device.use((args[0], args[3]), (args[0],))
        elif function in (Tensor.add, Tensor.__add__):
            self.device.use(
                [x for x in args[:2] if torch.is_tensor(x) and x.is_floating_point()], ()
            )
        elif function is torch.index_select:  # a message is packed
            self.device.use((args[0],), (kwargs["out"],))
            self.packed.append(kwargs["out"])
        return function(*args, **kwargs)

    def take_packed(self) -> list[Tensor]:
        """Messages since the last call."""
        packed, self.packed = self.packed, []
        return packed


def run_rank(
    device: Device,
    size: int,
    layout: str,
    batches: list[list[int]],
    node: int,
    nodes: int,
    copies: bool,
    heads: int,
    whole: bool,
    attention: Any,
    contextual: int,
) -> list[Any]:
    """Two layers forward and backward, batch after batch. Returns all memory, to be kept."""

    def forward(
        q: Tensor, *sources: Source, add: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        out = torch.empty(q.shape) if out is None else out
        kept.append(out)
        if any(source.arrival and source.arrival.signal() for source in sources):
            kept.append(torch.empty(q.shape))
            device.use((q, add), (out, kept[-1]), sources, look=True)
        device.use((q, add), (out,), sources)  # what was left
        return out

    def query(dout: Tensor, q: Tensor, *sources: Source, **kwargs: Any) -> Tensor:
        device.use((dout,), ())
        return forward(q, *sources, **kwargs)

    def keys(
        k: Tensor, v: Tensor, *sources: Source, add: Any = None, out: Any
    ) -> tuple[Tensor, Tensor]:
        out = out or (torch.empty(k.shape), torch.empty(v.shape))
        kept.append(out)
        device.use((k, v, *(add or ())), out, sources)
        return out

    kernels = dict(attention_forward=forward, query_gradient=query, key_value_gradients=keys)
    kept: list[Any] = []
    rank = node * size + device.rank
    group: Any = Group(size, device.rank)
    everybody: Any = Group(size * nodes, rank)
    with (
        patch.object(torch.cuda, "current_stream", lambda *_: device.current),
        patch.object(torch.cuda, "set_stream", device.set_stream),
        patch.object(torch.cuda, "synchronize", device.synchronize),
        patch.object(symmetric, "write_value", device.write_value),
        patch.object(symmetric, "wait_value", device.wait_value),
        patch.object(copy_engines, "copy_rows", device.copy_rows),
        patch.object(copy_engines, "reorders_writes", lambda _: False),
        patch.object(symmetric.symmetric_memory, "empty", lambda n, **kw: torch.empty(n, **kw)),
        patch.object(symmetric.symmetric_memory, "rendezvous", device.meet),
        patch.object(dist, "get_global_rank", lambda _, rank: rank),
        patch.multiple(ring, **kernels),
        patch.multiple(halo, **kernels),
        Copies(device) as copied,
    ):
        watchdog = Watchdog(rank, timedelta(hours=1), CPU)
        link = CopyEngines(group, CPU, watchdog) if copies else Network(device, group, watchdog)
        link.stream, link._mark = device.side, Event()  # type: ignore[assignment]
        links = Links(link, Network(device, everybody, watchdog) if nodes > 1 else None)
        kept.append(links)
        for batch in batches:
            lengths = torch.tensor(batch, dtype=torch.int32)
            owners = torch.full_like(lengths, CUT, dtype=torch.int64)
            if whole:
                owners[1:] = torch.arange(len(batch) - 1) % (size * nodes)
            parts = LAYOUTS[layout](size * nodes).parts(lengths, owners)
            targets = lengths.clamp(max=3) * (batch is not batches[0])
            shard = Shard(lengths, targets, parts, {}, everybody, rank, CPU, links)
            mask = partial(hstu_intervals, window=30, num_contextual=contextual)
            seen = Visibility(shard, mask, contextual)
            shape = (shard.rows.num_rows, heads, 8)
            qkv = [torch.zeros(shape).requires_grad_() for _ in range(3)]
            for _ in range(2):
                out = attention(*qkv, seen=seen, alpha=1.0, scale=1.0)
                gone = [*copied.take_packed(), *(x.detach() for x in qkv)]
                device.use((), tuple(gone))  # freed, and others' by now
                dout = torch.zeros(out.shape)
                with torch.no_grad():  # not by autograd: it would run with no mode on
                    grads = out.grad_fn.apply(dout)[:3]
                gone += [*copied.take_packed(), dout]
                device.use(grads, tuple(gone))
                kept += [out, *grads, *gone]
            kept += qkv
    return kept


def take_down(
    size: int,
    layout: str,
    nodes: int = 1,
    copies: bool = True,
    heads: int = 1,
    whole: bool = False,
    attention: Any = ring.ring_attention,
    contextual: int = 0,
) -> Graph:
    """size: ranks of a node. copies: by copy engines; else all of it is sent and received. whole:
    only the first sequence of a batch is cut."""
    graph, kept = Graph(), []
    for node in range(nodes):
        buffers: list[list[Tensor]] = []
        for place in range(size):
            device = Device(graph, place, buffers)
            batches = [[90, 7, 0], [60, 40], [3, 1]]
            of_rank = layout, batches, node, nodes, copies, heads, whole, attention, contextual
            kept.append(run_rank(device, size, *of_rank))
    assert kept
    return graph


@pytest.mark.parametrize("message_bytes", [1 << 20, 512])  # all rows at once, or in pieces
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_uses_of_memory_are_ordered(size: int, layout: str, message_bytes: int) -> None:
    with patch.object(ring, "MESSAGE_BYTES", message_bytes):
        graph = take_down(size, layout)
    assert graph.heard
    assert not graph.races()


@pytest.mark.parametrize("message_bytes", [1 << 20, 512])
@pytest.mark.parametrize("size", [2, 3])
def test_so_they_are_without_copy_engines(size: int, message_bytes: int) -> None:
    with patch.object(ring, "MESSAGE_BYTES", message_bytes):
        assert not take_down(size, "zigzag", copies=False).races()


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_so_they_are_where_messages_come_ahead(size: int, copies: bool) -> None:
    with patch.object(ring, "MESSAGE_BYTES", 7 << 10):  # two heads' rows
        assert not take_down(size, "zigzag", copies=copies, heads=4).races()


@pytest.mark.parametrize("nodes", [1, 2])
def test_so_they_are_beside_whole_sequences(nodes: int) -> None:
    assert not take_down(2, "zigzag", nodes, heads=4, whole=True).races()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "nodes"), [(2, 2), (2, 3), (3, 2)])
def test_so_they_are_over_nodes(size: int, nodes: int, layout: str) -> None:
    assert not take_down(size, layout, nodes).races()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize(("size", "nodes"), [(2, 1), (3, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("contextual", [0, 2])
def test_so_they_are_in_a_halo(
    contextual: int, size: int, nodes: int, copies: bool, layout: str
) -> None:
    for whole in (False, True):
        of = layout, nodes, copies, 2, whole, halo.halo_attention, contextual
        graph = take_down(size, *of)
        assert graph.heard
        assert not graph.races()


class Moved(torch.autograd.Function):
    """Keys to another layout; their gradient back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Relayout) -> Tensor:
        ctx.back = plan.reversed(len(k))
        return plan.move(k)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        dk = ctx.back.move(dout)
        return dk, dk, dk, None


def move(*qkv: Tensor, seen: Visibility, alpha: float, scale: float) -> Tensor:
    shard = seen.shard
    assert shard.links is not None
    wanted = seen.line.spans(LAYOUTS["zigzag"](shard.cp_size).parts(shard.lengths))
    return Moved.apply(*qkv, Relayout.between(seen.line, seen.held, wanted, shard.links, CPU))


@pytest.mark.parametrize(("copies", "transport"), [(True, CopyEngines), (False, SendReceive)])
def test_so_they_are_in_a_move_and_only_if_it_settles(copies: bool, transport: type) -> None:
    assert not take_down(3, "contiguous", copies=copies, attention=move).races()
    with patch.object(transport, "settle", no_wait):
        assert take_down(3, "contiguous", copies=copies, attention=move).races()


def test_the_last_message_stands_for_all_before_it() -> None:
    """To wait for its event costs the host less than to wait for the stream."""
    joins, waits = list[Any](), list[Any]()
    join, wait = CopyEngines.join, Stream.wait_stream

    def counted_join(link: CopyEngines) -> None:
        joins.append(link)
        join(link)

    def counted_wait(stream: Stream, other: Stream) -> None:
        waits.append(other)
        wait(stream, other)

    with (
        patch.object(CopyEngines, "join", counted_join),
        patch.object(Stream, "wait_stream", counted_wait),
    ):
        take_down(2, "zigzag")
    assert len(waits) < len(joins) / 2


def no_wait(*_: Any) -> None: ...


def too_soon(arrival: Any) -> tuple[Tensor, int] | None:
    return arrival._signal and (arrival._signal[0], 1)


@pytest.mark.parametrize(
    ("owner", "name", "instead"),
    [
        (copy_engines._Copy, "wait", no_wait),  # attention would read what has not arrived
        (copy_engines._Copy, "signal", too_soon),  # also where a kernel looks itself
        (CopyEngines, "join", no_wait),  # keys would be freed before they are copied
        (Stream, "wait_event", no_wait),  # and messages written before they are computed
        (RingPass, "arrive", no_wait),  # or those of the node before passed on too early
    ],
)
def test_what_is_not_waited_for_is_a_race(owner: type, name: str, instead: Any) -> None:
    with patch.object(owner, name, instead):
        assert take_down(3, "contiguous", nodes=2 if owner is RingPass else 1).races()


def not_on_the_way_back(moving: Moving) -> None:
    if not moving.plan.summing:
        moving.swaps.settle()


@pytest.mark.parametrize(
    ("owner", "name", "copies"),
    [
        (copy_engines._Copy, "wait", True),  # rows would be taken before they have come
        (Swaps, "settle", False),  # messages be freed before the network has sent them
        (Moving, "settle", False),
        (Stream, "wait_event", True),
    ],
)
@pytest.mark.parametrize("contextual", [0, 2])
def test_so_it_is_in_a_halo(contextual: int, owner: type, name: str, copies: bool) -> None:
    of = "contiguous", 1, copies, 1, False, halo.halo_attention, contextual
    with patch.object(owner, name, no_wait if owner is not Moving else not_on_the_way_back):
        assert take_down(3, *of).races()


def test_so_is_a_message_that_nobody_told_of() -> None:
    def deaf(counters: Any, rank: int, stream: Any) -> tuple[Tensor, int]:
        counters.heard[rank] += 1
        return counters.mine[rank], 1

    with patch.object(symmetric._Counters, "wait", deaf):
        assert take_down(3, "contiguous").races()


def test_a_wait_for_what_comes_later_is_a_deadlock() -> None:
    tell, late = symmetric._Counters.tell, list[Callable[[], None]]()

    def tell_late(*args: Any) -> None:
        late.append(lambda: tell(*args))
        if len(late) > 2:
            late.pop(0)()

    with (
        patch.object(symmetric._Counters, "tell", tell_late),
        pytest.raises((CycleError, KeyError)),
    ):
        take_down(2, "zigzag").races()
