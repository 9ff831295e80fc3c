"""How messages travel inside a cp group while the device computes: one interface, two roads.

`CopyEngines` for GPUs that reach each other's memory: the sender's copy engine writes into the
receiver's buffer (symmetric memory), right out of what is sent, though its rows lie apart. No
multiprocessor is taken from the kernels, nothing is packed. `SendReceive` elsewhere: NCCL's send
and receive, or gloo's on a CPU. Buffers are allocated once and shared by all layers and steps; they
grow when a batch needs more.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from kernels.columns import is_packed
from kernels.source import Arrival
from parallel.driver import copy_rows, reorders_writes, wait_value, write_value
from parallel.watchdog import Watchdog

GROWTH = 1.25  # a new buffer's size over what is asked for

# What is sent, part behind part: each flat, or rows [n, ...] that are contiguous in themselves.
Message = Sequence[Tensor]


class Transport(ABC):
    """Messages between the ranks of a group, which are counted in it.

    `swap` moves a message into an inbox. Each rank's swaps must match its peers': whom one sends
    to, receives, in an inbox of the same name. Both ends know all sizes, so empty messages are not
    sent at all.
    """

    name: str
    signals = False  # whether kernels can see that a message has come: `Arrival.signal`

    def __init__(self, group: dist.ProcessGroup, device: torch.device, watchdog: Watchdog) -> None:
        self.group, self.device, self.watchdog = group, device, watchdog
        on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device, priority=-1) if on_gpu else None
        self._mark = torch.cuda.Event() if on_gpu else None  # recorded again and again
        self._current: torch.cuda.Stream | None = None
        self._last: _Copy | None = None  # on the stream, if nothing comes behind it
        self._outboxes: dict[str, Tensor] = {}
        self._operations: dict[tuple[str, int | None, int | None], str] = {}

    def outbox(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A buffer [numel] to write a message into, free once the last one in it is on its way."""
        if name in self._outboxes:
            self.settle(self._outboxes[name])
        return _piece(self._outboxes, name, numel, dtype, self.device)

    @abstractmethod
    def inbox(self, name: str, numel: int, capacity: int, dtype: torch.dtype) -> Tensor:
        """A buffer [numel] to receive into.

        capacity: the largest numel of any rank of the group; the same on all of them.
        """

    @abstractmethod
    def pack(self, name: str, parts: Message) -> Message:
        """What `swap` can send: the parts as they are, or copied into the outbox `name`."""

    @abstractmethod
    def settle(self, flat: Tensor) -> None:
        """What is enqueued from now on may overwrite a message that was one flat part."""

    @property
    def nbytes(self) -> int:
        """Memory of this rank's inboxes that PyTorch's allocator does not know of."""
        return 0

    def begin(self) -> None:
        """Before some messages, until `join`: to ask for the current stream once spares time."""
        if self.stream is not None:
            self._current = torch.cuda.current_stream(self.device)

    @property
    def current(self) -> torch.cuda.Stream:
        return self._current or torch.cuda.current_stream(self.device)

    def beside(self, messages: Callable[[], None] | None, work: Callable[[], None] | None) -> None:
        """Enqueue both, so that neither waits for the other, but for what is enqueued already.

        On a GPU the work, if any, comes first, and so is not kept waiting by what the host does for
        messages. They read and write the memory of others: `join` before it is used again.
        """
        if messages is None or self.stream is None or self._mark is None:
            for enqueue in (messages, work):
                if enqueue:
                    enqueue()
            return
        current = self.current
        self._mark.record(current)
        if work:
            work()
        self.stream.wait_event(self._mark)
        torch.cuda.set_stream(self.stream)  # a third of the cost of `with torch.cuda.stream`
        self._current, self._last = self.stream, None
        try:
            messages()
        finally:
            torch.cuda.set_stream(current)
            self._current = current

    def join(self) -> None:
        """What is enqueued from now on comes after all that was `beside`."""
        if self.stream is not None and self._last is None:
            self.current.wait_stream(self.stream)
        elif self._last is not None and not self._last.joined:
            self._last.wait()
        self._current = None

    def swap(
        self, name: str, message: Message, to: int | None, incoming: Tensor, source: int | None
    ) -> Arrival:
        """Send `message` into the inbox `name` of a rank; receive, in mine, what `source` sends.

        None: to or from nobody. The message must not change until `settle`. Starts when what is
        enqueued so far is done, and waits for no more.
        """
        return self._swap(
            name,
            message,
            to if any(part.numel() for part in message) else None,
            incoming,
            source if incoming.numel() else None,
        )

    @abstractmethod
    def _swap(
        self, name: str, message: Message, to: int | None, incoming: Tensor, source: int | None
    ) -> Arrival: ...

    def _operation(self, name: str, to: int | None, source: int | None) -> str:
        """E.g. "keys and values to rank 1, from rank 3"; ranks of the whole job."""
        key = name, to, source
        if key not in self._operations:
            ends = [
                f"{word} rank {dist.get_global_rank(self.group, rank)}"
                for word, rank in (("to", to), ("from", source))
                if rank is not None
            ]
            self._operations[key] = f"{name} {', '.join(ends)}"
        return self._operations[key]


@dataclass(frozen=True)
class Links:
    """How the ranks of a cp group reach each other: rank = node * size of `within` + place in it.

    within: the ranks of a node; all, if they are not spread evenly over several.
    across: all ranks, if there are several nodes.
    """

    within: Transport
    across: Transport | None = None

    @property
    def name(self) -> str:
        between = f", between nodes {self.across.name}" if self.across else ""
        return self.within.name + between


def build_links(
    group: dist.ProcessGroup,
    node_group: dist.ProcessGroup | None,
    device: torch.device,
    watchdog: Watchdog,
) -> Links:
    """The best that the devices of a cp group can do. Collective.

    node_group: this rank's node, if the group spans nodes with equally many ranks each.
    """
    inner = node_group or group
    reach = device.type == "cuda" and inner.size() > 1 and _reach_each_other(inner, device)
    within = (CopyEngines if reach else SendReceive)(inner, device, watchdog)
    return Links(within, SendReceive(group, device, watchdog) if node_group else None)


class SendReceive(Transport):
    """Point-to-point operations of the process group."""

    name = "send and receive"

    def __init__(self, group: dist.ProcessGroup, device: torch.device, watchdog: Watchdog) -> None:
        super().__init__(group, device, watchdog)
        self._inboxes: dict[str, Tensor] = {}
        self._leaving: dict[int, list[_Messages]] = {}  # by the address of what is sent

    def inbox(self, name: str, numel: int, capacity: int, dtype: torch.dtype) -> Tensor:
        return _piece(self._inboxes, name, capacity, dtype, self.device)[:numel]

    def pack(self, name: str, parts: Message) -> Message:
        if len(parts) == 1 and parts[0].is_contiguous():
            return parts
        flat = self.outbox(name, sum(part.numel() for part in parts), parts[0].dtype)
        for part, place in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            place.view(part.shape).copy_(part)
        return (flat,)

    def settle(self, flat: Tensor) -> None:
        for messages in self._leaving.pop(flat.data_ptr(), []):
            messages.wait()

    def _swap(
        self, name: str, message: Message, to: int | None, incoming: Tensor, source: int | None
    ) -> Arrival:
        (sent,) = message
        ops = []
        if to is not None:
            ops.append(dist.P2POp(dist.isend, sent, group=self.group, group_peer=to))
        if source is not None:
            ops.append(dist.P2POp(dist.irecv, incoming, group=self.group, group_peer=source))
        works = dist.batch_isend_irecv(ops) if ops else []
        on_gpu = self.device.type == "cuda"
        messages = _Messages(works, self._operation(name, to, source), self.watchdog, on_gpu)
        leaving = self._leaving.get(sent.data_ptr(), [])
        self._leaving[sent.data_ptr()] = [*(x for x in leaving if not x.are_over()), messages]
        return messages


class _Messages(Arrival):
    def __init__(
        self, works: list[dist.Work], operation: str, watchdog: Watchdog, on_gpu: bool
    ) -> None:
        self.works, self.operation, self.watchdog = works, operation, watchdog
        self.on_gpu = on_gpu

    def wait(self) -> None:
        """On a GPU, any stream may wait, one after another; a host's wait is for good."""
        if self.works:
            with self.watchdog.operation(self.operation):
                for work in self.works:
                    work.wait()
        if not self.on_gpu:
            self.works = []

    def are_over(self) -> bool:
        return all(work.is_completed() for work in self.works)


class CopyEngines(Transport):
    """Copies into the peers' memory, on a stream of their own.

    Ranks tell each other of messages by counters, which streams write and wait for without a
    kernel: a kernel, however small, would queue behind attention's blocks.
    """

    name = "copy engines"

    def __init__(self, group: dist.ProcessGroup, device: torch.device, watchdog: Watchdog) -> None:
        super().__init__(group, device, watchdog)
        self.signals = not reorders_writes(device)
        self._inboxes: dict[str, _SymmetricBuffer] = {}
        self._leaving: dict[int, torch.cuda.Event] = {}  # behind messages, by their address

    @property
    def nbytes(self) -> int:
        return sum(buffer.size for buffer in self._inboxes.values())

    def inbox(self, name: str, numel: int, capacity: int, dtype: torch.dtype) -> Tensor:
        size, buffer = capacity * dtype.itemsize, self._inboxes.get(name)
        if buffer is None or buffer.size < size:
            buffer = _SymmetricBuffer(int(size * GROWTH), self.group, self.device)
            self._inboxes[name] = buffer
        return buffer.typed(dtype)[:numel]

    def pack(self, name: str, parts: Message) -> Message:
        return [part if _is_rows(part) else part.contiguous() for part in parts]

    def settle(self, flat: Tensor) -> None:
        if flat.data_ptr() in self._leaving:
            self.current.wait_event(self._leaving.pop(flat.data_ptr()))

    def _swap(
        self, name: str, message: Message, to: int | None, incoming: Tensor, source: int | None
    ) -> Arrival:
        buffer, stream = self._inboxes[name], self.stream
        assert stream is not None
        assert self._mark is not None
        assert not incoming.numel() or incoming.data_ptr() == buffer.local.data_ptr()
        current = self.current
        if current != stream:
            self._mark.record(current)
            stream.wait_event(self._mark)
        if source is not None:
            buffer.free.tell(source, stream)
        if to is not None:
            buffer.free.wait(to, stream)
            end = 0
            for part in message:
                start, end = end, end + part.nbytes
                copy_rows(part, buffer.of[to], start, stream)
            buffer.full.tell(to, stream)
        signal = buffer.full.wait(source, stream) if source is not None else None
        done = stream.record_event()
        if len(message) == 1:
            self._leaving[message[0].data_ptr()] = done
        self.watchdog.watch(self._operation(name, to, source), done)
        self._last = _Copy(done, self, signal if self.signals else None)
        return self._last


class _Copy(Arrival):
    """Behind what came and what left in one swap, and in those before it."""

    def __init__(
        self, done: torch.cuda.Event, transport: Transport, signal: tuple[Tensor, int] | None
    ) -> None:
        self.done, self.transport, self.joined = done, transport, False
        self._signal = signal

    def wait(self) -> None:
        current = self.transport.current
        current.wait_event(self.done)
        self.joined = current != self.transport.stream

    def signal(self) -> tuple[Tensor, int] | None:
        return self._signal


class _SymmetricBuffer:
    """`size` bytes on every rank of the group, writable by all. Collective; the host waits.

    free: the owner tells a sender that it may write; full: and is told that it has written.
    """

    def __init__(self, size: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.size = -(-size // 256) * 256
        row = 4 * group.size()
        whole = symmetric_memory.empty(self.size + 2 * row, dtype=torch.uint8, device=device)
        whole.zero_()
        torch.cuda.synchronize(device)
        self.handle = symmetric_memory.rendezvous(whole, group)  # kept: it holds the peers' memory
        peers = [
            self.handle.get_buffer(rank, (whole.numel(),), torch.uint8)
            for rank in range(group.size())
        ]
        self.local = whole[: self.size]
        self._typed: dict[torch.dtype, Tensor] = {}
        self.of = [x[: self.size] for x in peers]
        counters = [x[self.size :].view(torch.int32).view(2, -1) for x in peers]
        self.free = _Counters([x[0] for x in counters], group.rank())
        self.full = _Counters([x[1] for x in counters], group.rank())

    def typed(self, dtype: torch.dtype) -> Tensor:
        """All of this rank's, as flat elements."""
        if dtype not in self._typed:
            self._typed[dtype] = self.local.view(dtype)
        return self._typed[dtype]


class _Counters:
    """How often each rank has told each other rank something, in the memory of the one told.

    By the driver's stream memory operations.
    """

    def __init__(self, of: list[Tensor], rank: int) -> None:
        """of[r]: int32 [ranks] in the memory of rank r, zeros."""
        self.of = of
        self.told, self.heard = [0] * len(of), [0] * len(of)
        self.mine = list(of[rank].split(1))
        self.theirs = [counters[rank].data_ptr() for counters in of]

    def tell(self, rank: int, stream: torch.cuda.Stream) -> None:
        """Once what is on the stream so far is done."""
        self.told[rank] += 1
        write_value(stream, self.theirs[rank], self.told[rank])

    def wait(self, rank: int, stream: torch.cuda.Stream) -> tuple[Tensor, int]:
        """What comes on the stream from now on waits. Returns the counter, and how far."""
        self.heard[rank] += 1
        wait_value(stream, self.mine[rank].data_ptr(), self.heard[rank])
        return self.mine[rank], self.heard[rank]


def _reach_each_other(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether all GPUs of the group are in one machine and can read each other's memory."""
    hosts: list[str] = [""] * group.size()
    dist.all_gather_object(hosts, socket.gethostname(), group=group)
    others = (other for other in range(torch.cuda.device_count()) if other != device.index)
    works = len(set(hosts)) == 1 and all(
        torch.cuda.can_device_access_peer(device, other) for other in others
    )
    agreed = torch.tensor([works], dtype=torch.int32)
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=group)
    if not agreed.item():
        return False
    ranks, mine = range(group.size()), group.rank()
    stream = torch.cuda.current_stream(device)
    names = torch.arange(1, len(ranks) + 1, dtype=torch.uint8, device=device)
    try:
        buffer = _SymmetricBuffer(len(ranks), group, device)
        for rank in ranks:
            copy_rows(names[mine : mine + 1], buffer.of[rank], mine, stream)
            buffer.full.tell(rank, stream)
        torch.cuda.synchronize(device)
    except (RuntimeError, OSError, AttributeError):
        agreed.zero_()
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=group)
    if agreed.item():  # everybody has written to everybody; did it arrive?
        try:
            told = bool((buffer.full.of[mine] == 1).all())
            for rank in ranks if told else ():
                buffer.full.wait(rank, stream)
            agreed.fill_(told and torch.equal(buffer.local[: len(ranks)], names))
        except RuntimeError:
            agreed.zero_()
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=group)
    return bool(agreed.item())


def _is_rows(part: Tensor) -> bool:
    """Whether rows of a part [n, ...] are contiguous in themselves, and apart from each other."""
    return is_packed(part) and (len(part) < 2 or part.stride(0) >= part[0].numel())


def _piece(
    store: dict[str, Tensor], name: str, numel: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    size = numel * dtype.itemsize
    if name not in store or store[name].numel() < size:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # another stream may still read what is freed
        store[name] = torch.empty(int(size * GROWTH), dtype=torch.uint8, device=device)
    return store[name][:size].view(dtype)
