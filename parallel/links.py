"""How the ranks of a cp group reach each other: the choice of transport."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.copy_engines import CopyEngines
from parallel.send_receive import SendReceive
from parallel.symmetric import reach_each_other
from parallel.transport import Transport
from parallel.watchdog import Watchdog


@dataclass(frozen=True)
class Links:
    """How the ranks of a cp group reach each other: rank = node * size of `within` + place in it.

    within: the ranks of a node; all, if they are not spread evenly over several.
    across: all ranks, if there are several nodes.
    """

    within: Transport
    across: Transport | None = None

    @property
    def watchdog(self) -> Watchdog:
        return self.within.watchdog

    @property
    def direct(self) -> Transport:
        """From any rank to any other."""
        return self.across or self.within

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
    reach = device.type == "cuda" and inner.size() > 1 and reach_each_other(inner, device)
    within = (CopyEngines if reach else SendReceive)(inner, device, watchdog)
    return Links(within, SendReceive(group, device, watchdog) if node_group else None)
