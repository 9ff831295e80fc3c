"""Host tensors to the device, by copies that the host does not wait for.

Out of ordinary memory, a copy first waits for everything the device still has to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_to(x: Tensor, device: torch.device) -> Tensor:
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def copy_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """1-d tensors of one dtype in one copy; the results are pieces of one buffer."""
    if not tensors:
        return []
    return list(copy_to(torch.cat(list(tensors)), device).split([x.numel() for x in tensors]))
