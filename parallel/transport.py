"""How messages travel inside a cp group while the device computes: one interface, two roads.

`CopyEngines` for GPUs that reach each other's memory, `SendReceive` elsewhere; `build_links`
chooses. Buffers are allocated once and shared by all layers and steps; they grow when a batch needs
more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.source import Arrival
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
        self._outboxes: dict[str, Tensor] = {}
        self._operations: dict[tuple[str, int | None, int | None], str] = {}

    def outbox(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A buffer [numel] to write a message into, free once the last one in it is on its way."""
        if name in self._outboxes:
            self.settle(self._outboxes[name])
        return piece_of_buffer(self._outboxes, name, numel, dtype, self.device)

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
        self._current = self.stream
        try:
            messages()
        finally:
            torch.cuda.set_stream(current)
            self._current = current

    def join(self) -> None:
        """What is enqueued from now on comes after all that was `beside`."""
        if self.stream is not None:
            self.current.wait_stream(self.stream)
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


def piece_of_buffer(
    store: dict[str, Tensor], name: str, numel: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[numel] of the buffer of that name, which is made anew if it is too small."""
    size = numel * dtype.itemsize
    if name not in store or store[name].numel() < size:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # another stream may still read what is freed
        store[name] = torch.empty(int(size * GROWTH), dtype=torch.uint8, device=device)
    return store[name][:size].view(dtype)
