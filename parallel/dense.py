"""Dense layers are replicated over dp x cp and their gradients averaged by DDP."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from parallel.mesh import Mesh


def replicate(module: nn.Module, mesh: Mesh) -> DistributedDataParallel:
    """DDP over all processes: parameters start as rank 0's, gradients are averaged over ranks."""
    return DistributedDataParallel(
        module, process_group=mesh.world, gradient_as_bucket_view=True, broadcast_buffers=False
    )
