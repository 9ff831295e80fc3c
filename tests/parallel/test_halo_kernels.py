"""A halo's blocks of queries and keys, by Triton's kernels: as by the blockwise twins."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
pytest.importorskip("triton")

from kernels.attention import attention_forward, key_value_gradients, query_gradient
from kernels.masks import hstu_intervals
from kernels.source import Source
from kernels.triton import launch
from parallel.layout import LAYOUTS
from parallel.links import Links
from parallel.send_receive import SendReceive
from parallel.shard import Shard
from parallel.visibility import Visibility

CPU = torch.device("cpu")


class Group:
    def __init__(self, rank: int) -> None:
        self.rank, self.size = (lambda: rank), (lambda: 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_kernels_take_a_halo(rank: int, layout: str) -> None:
    lengths, targets = torch.tensor([[300, 7], [4, 0]], dtype=torch.int32)
    links = Links(SendReceive(Group(rank), CPU, None))  # type: ignore[arg-type]
    parts = LAYOUTS[layout](2).parts(lengths)
    shard = Shard(lengths, targets, parts, {}, links.within.group, rank, CPU, links)
    seen = Visibility(shard, partial(hstu_intervals, window=20, num_contextual=3), 3)
    own, near, of_guests = seen.of_halo((0.3, 0.1))
    assert of_guests is not None
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, shard.rows.num_rows, 1, 32)
    beyond_k, beyond_v = torch.randn(2, near.keys.num_rows, 1, 32)
    guests, their_dout = torch.randn(2, of_guests.queries.num_rows, 1, 32)
    keys = Source((k, v), own), Source((beyond_k, beyond_v), near)
    queries = Source((q, dout), own), Source((guests, their_dout), of_guests)
    for kernel, twin, *of in (
        (launch.forward, attention_forward, q, *keys),
        (launch.query_gradient, query_gradient, dout, q, *keys),
        (launch.key_value_gradients, key_value_gradients, k, v, *queries),
        (launch.forward, attention_forward, guests, Source((k, v), of_guests)),
    ):
        want = twin(*of)  # type: ignore[operator]
        both = (torch.empty_like(k), torch.empty_like(v))
        out = both if isinstance(want, tuple) else torch.empty_like(want)
        torch.testing.assert_close(kernel(*of, out=out), want, rtol=1e-4, atol=1e-5)  # type: ignore
