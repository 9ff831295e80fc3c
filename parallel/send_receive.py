"""Messages by the process group: NCCL's send and receive, or gloo's on a CPU."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.source import Arrival
from parallel.transport import Message, Transport, piece_of_buffer
from parallel.watchdog import Watchdog


class SendReceive(Transport):
    """Point-to-point operations of the process group."""

    name = "send and receive"

    def __init__(self, group: dist.ProcessGroup, device: torch.device, watchdog: Watchdog) -> None:
        super().__init__(group, device, watchdog)
        self._inboxes: dict[str, Tensor] = {}
        self._leaving: dict[int, list[_Messages]] = {}  # by the address of what is sent

    def inbox(self, name: str, numel: int, capacity: int, dtype: torch.dtype) -> Tensor:
        return piece_of_buffer(self._inboxes, name, capacity, dtype, self.device)[:numel]

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
