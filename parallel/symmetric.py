"""Memory of a group's GPUs that all of them can write to, and counters in it."""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from parallel.driver import copy_rows, wait_value, write_value


class SymmetricBuffer:
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


def reach_each_other(group: dist.ProcessGroup, device: torch.device) -> bool:
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
        buffer = SymmetricBuffer(len(ranks), group, device)
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
