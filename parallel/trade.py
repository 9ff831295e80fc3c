"""A jagged all-to-all: rows for every rank of a group, and from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor


def trade_rows(
    send: Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: dist.ProcessGroup | None,
) -> Tensor:
    """send: [sum(send_splits), ...], rank after rank. Returns [sum(receive_splits), ...], likewise.

    Splits are numbers of rows, each by rank of the group (None: all processes). Collective.
    """
    received = send.new_empty(sum(receive_splits), *send.shape[1:])
    dist.all_to_all_single(received, send, list(receive_splits), list(send_splits), group=group)
    return received
