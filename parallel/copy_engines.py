"""Messages by copy engines, between GPUs that reach each other's memory.

The sender's copy engine writes into the receiver's buffer (symmetric memory), right out of what is
sent, though its rows lie apart. No multiprocessor is taken from the kernels, nothing is packed.
Ranks tell each other of messages by counters, which streams write and wait for without a kernel: a
kernel, however small, would queue behind attention's blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.columns import is_packed
from kernels.source import Arrival
from parallel.driver import copy_rows, reorders_writes
from parallel.symmetric import SymmetricBuffer
from parallel.transport import GROWTH, Message, Transport
from parallel.watchdog import Watchdog


class CopyEngines(Transport):
    """Copies into the peers' memory, on a stream of their own."""

    name = "copy engines"

    def __init__(self, group: dist.ProcessGroup, device: torch.device, watchdog: Watchdog) -> None:
        super().__init__(group, device, watchdog)
        self.signals = not reorders_writes(device)
        self._last: _Copy | None = None  # on the stream, if nothing comes behind it
        self._inboxes: dict[str, SymmetricBuffer] = {}
        self._leaving: dict[int, torch.cuda.Event] = {}  # behind messages, by their address

    @property
    def nbytes(self) -> int:
        return sum(buffer.size for buffer in self._inboxes.values())

    def inbox(self, name: str, numel: int, capacity: int, dtype: torch.dtype) -> Tensor:
        size, buffer = capacity * dtype.itemsize, self._inboxes.get(name)
        if buffer is None or buffer.size < size:
            buffer = SymmetricBuffer(int(size * GROWTH), self.group, self.device)
            self._inboxes[name] = buffer
        return buffer.typed(dtype)[:numel]

    def pack(self, name: str, parts: Message) -> Message:
        return [part if _is_rows(part) else part.contiguous() for part in parts]

    def settle(self, flat: Tensor) -> None:
        if flat.data_ptr() in self._leaving:
            self.current.wait_event(self._leaving.pop(flat.data_ptr()))

    def beside(self, messages: Callable[[], None] | None, work: Callable[[], None] | None) -> None:
        if messages is not None:
            self._last = None
        super().beside(messages, work)

    def join(self) -> None:
        if self._last is None:
            super().join()
            return
        if not self._last.joined:  # costs the host less than to wait for the stream
            self._last.wait()
        self._current = None

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


def _is_rows(part: Tensor) -> bool:
    """Whether rows of a part [n, ...] are contiguous in themselves, and apart from each other."""
    return is_packed(part) and (len(part) < 2 or part.stride(0) >= part[0].numel())
