"""The process mesh: dp groups of cp processes. One object owns the groups and checks the degrees.

Ranks of a cp group are neighbours (cp is the fastest axis), to share a node when they can.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.links import Links, build_links
from parallel.watchdog import Watchdog


@dataclass(frozen=True)
class Mesh:
    """Axes ("dp", "cp") over all processes. Embedding tables and DDP span both."""

    device_mesh: DeviceMesh
    device: torch.device
    world: dist.ProcessGroup
    num_nodes: int  # 1 if they differ in size
    links: Links  # of the cp group
    watchdog: Watchdog

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return self.device_mesh.size()

    @property
    def dp(self) -> int:
        return self.device_mesh.size(0)

    @property
    def cp(self) -> int:
        return self.device_mesh.size(1)

    @property
    def dp_rank(self) -> int:
        """Which dp group, of all, this process is in."""
        return self.rank // self.cp

    @property
    def cp_group(self) -> dist.ProcessGroup:
        return self.device_mesh.get_group("cp")


def local_device() -> torch.device:
    """This process's device: its own GPU where there are GPUs, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def build_mesh(*, dp: int, cp: int, device: torch.device, timeout_s: int = 600) -> Mesh:
    """Start the process groups (environment as torchrun sets it) and lay the mesh over them.

    CPU tensors travel over gloo and GPU tensors over NCCL, in every group: the host trades lengths
    without waiting for the GPU. Raises ValueError if dp * cp is not the number of processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if dp * cp != world_size:
        raise ValueError(f"dp={dp} times cp={cp} is not the {world_size} processes of this job")
    backend = "gloo"
    if device.type == "cuda":
        if torch.cuda.device_count() <= (device.index or 0):
            raise ValueError(
                f"local rank {device.index} has no GPU: this machine has "
                f"{torch.cuda.device_count()}; start at most that many processes on it"
            )
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timeout)
    world = dist.group.WORLD
    assert world is not None
    # Groups of our own making: those that a DeviceMesh makes do not get the timeout.
    ranks = torch.arange(world_size).view(dp, cp)
    dp_group = _own_group(ranks.T, timeout)
    on_gpu = device.type == "cuda"
    cp_group = _own_group(ranks, timeout, hurried=on_gpu)
    device_mesh = DeviceMesh.from_group(
        [dp_group, cp_group], device.type, mesh=ranks, mesh_dim_names=("dp", "cp")
    )
    watchdog = Watchdog(dist.get_rank(), timeout, device)
    # Not the cp group: while a batch of sends and receives is put together on a group, PyTorch
    # would put what another thread does on it into that batch.
    link_group = _own_group(ranks, timeout, hurried=on_gpu)
    node_group, per_node = None, _processes_per_node(world_size)
    if cp > per_node and cp % per_node == 0:
        nodes = torch.arange(world_size).view(-1, per_node)
        node_group = _own_group(nodes, timeout, hurried=on_gpu)
    # NCCL connects a group in its first collective, in which every rank must take part; a ring's
    # first message need not involve a rank without tokens.
    for group in filter(None, (link_group, node_group)):
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    links = build_links(link_group, node_group, device, watchdog)
    return Mesh(device_mesh, device, world, world_size // per_node, links, watchdog)


def _processes_per_node(world_size: int) -> int:
    """The same on all ranks: world_size if nodes differ. Collective."""
    mine = torch.tensor([int(os.environ.get("LOCAL_WORLD_SIZE", world_size))])
    everybody = torch.empty(world_size, dtype=mine.dtype)
    dist.all_gather_into_tensor(everybody, mine)
    return int(mine) if bool((everybody == mine).all()) else world_size


def _own_group(ranks: Tensor, timeout: timedelta, hurried: bool = False) -> dist.ProcessGroup:
    """The group of the row that this process is in. Every process makes the groups of all rows.

    hurried: NCCL's kernels go before those of the model, which else fill the GPU and shut them out.
    """
    own, options = None, None
    for row in ranks.tolist():
        if hurried:
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            options._timeout = timeout
        group = dist.new_group(row, timeout=timeout, pg_options=options)
        if dist.get_rank() in row:
            own = group
    assert isinstance(own, dist.ProcessGroup)
    return own
