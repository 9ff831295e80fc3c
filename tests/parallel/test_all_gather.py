"""The all-gather exchange in unequal chunks of heads, with ranks that hold little or nothing."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from parallel.exchange import all_gather
from parallel.layout import LAYOUTS, ContiguousLayout
from tests.parallel.test_attention import attend, check_against_one_process


class Lopsided(ContiguousLayout):
    """All rows on rank 1, but for one of each sequence on rank 0: padding by many rows."""

    def shares(self, lengths: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        shares = torch.zeros(self.cp_size, len(lengths), dtype=torch.int64)
        shares[0] = lengths.clamp(max=1)
        shares[1] = lengths - shares[0]
        return shares


def attend_in_chunks(cp: int, layout: str, name: str):
    gather = dist.all_gather_into_tensor
    widths = []

    def spy(output, *args, async_op=False, **kwargs):
        if async_op:
            widths.append(output.shape[1] // 7)  # heads: each has 4 + 3 numbers a row
        return gather(output, *args, async_op=async_op, **kwargs)

    with (
        patch.object(all_gather, "CHUNK_BYTES", 1),
        patch.object(all_gather, "MAX_CHUNKS", 4),  # which the heads do not divide by
        patch.object(dist, "all_gather_into_tensor", spy),
        patch.dict(LAYOUTS, lopsided=Lopsided),
    ):
        result = attend(cp, layout, "all_gather", name)
    is_cut = name in ("causal", "targets")  # else nobody sees another's rows
    assert widths == ([2, 2, 1, 1] * 2 if is_cut else [])
    return result


@pytest.mark.parametrize("layout", ["zigzag", "lopsided"])
@pytest.mark.parametrize("name", ["causal", "targets", "one_token", "nothing"])
def test_chunks_of_heads_equal_one_process(run_in_world, name: str, layout: str) -> None:
    check_against_one_process(run_in_world(3, attend_in_chunks, 3, layout, name), name)
