"""The forward whose programs stay, which Hopper alone runs: against float64, and itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from kernels.jagged import Jagged
from kernels.masks import hstu_intervals, semi_local_intervals
from kernels.naive import naive_attention
from kernels.source import Source
from kernels.triton import configs, launch
from kernels.weighting import Weighting
from tests.kernels.cases import any_intervals, cases, part_of

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


@pytest.fixture(autouse=True)
def resident_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it would not pay."""
    monkeypatch.setattr(launch, "config_for", lambda dim, *problem: configs.HOPPER[max(128, dim)])


def on_gpu(rows: Jagged) -> Jagged:
    return Jagged(rows.offsets.cuda(), rows.positions.cuda(), rows.num_rows)


def check(
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    heads: int = 2,
    dims: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Plain, added to float32 partials in place, from rows that lie apart: right, and the same bits
    again."""
    queries, keys, intervals = on_gpu(queries), on_gpu(keys), intervals.cuda()
    weighting = Weighting(queries, keys, intervals, dims[0] ** -0.5, 0.1)
    like = {"device": "cuda", "dtype": dtype}
    q = torch.randn(queries.num_rows, 2, heads, dims[0], **like)[:, 1]
    k = torch.randn(keys.num_rows, 2, heads, dims[0], **like)[:, 0]
    v = torch.randn(keys.num_rows, 3, heads, dims[1], **like)[:, 2]
    want = naive_attention(q.double(), k.double(), v.double(), weighting)
    source = Source((k, v), weighting)

    out = [launch.forward(q, source, out=torch.empty_like(want, dtype=dtype)) for _ in range(2)]
    assert torch.equal(*out)
    assert (out[0] - want).norm() <= 3e-3 * want.norm()
    added = torch.randn(want.shape, device="cuda")
    partial = launch.forward(q, source, add=added.clone(), out=torch.empty_like(added))
    assert (partial - added - want).norm() <= 3e-3 * want.norm() + 1e-6 * added.norm()


@settings(max_examples=40, deadline=None)
@given(case=cases(max_length=700, max_sequences=6), data=st.data())
def test_masks_and_shards(case, data) -> None:  # type: ignore[no-untyped-def]
    whole = Jagged.whole(case.lengths)
    keep = whole.positions // 16 % data.draw(st.sampled_from([1, 2])) == 0
    parts = [part_of(whole, x) for x in (keep, data.draw(st.sampled_from([keep, keep | ~keep])))]
    if all(part.num_rows for part in parts):
        check(*parts, case.intervals(parts[0]))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_any_intervals(seed: int) -> None:
    whole, intervals = any_intervals(seed)
    check(whole, whole, intervals)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "dims", [(128, 128), (256, 256), (128, 32), (64, 128), (40, 100), (256, 64), (32, 256)]
)
def test_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    lengths = torch.tensor([1000, 0, 1, 300, 129], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    intervals = hstu_intervals(
        whole, lengths, torch.tensor([7, 0, 0, 20, 1], dtype=torch.int32), num_contextual=3
    )
    check(whole, whole, intervals, dims=dims, dtype=dtype, heads=3)


def test_more_tiles_than_programs() -> None:
    """Most of them handed out late, some of them empty; and a prefix under a window."""
    lengths = torch.tensor([4100, *range(1, 200, 3), 0, 3000], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    targets = lengths.clamp(max=3)
    check(whole, whole, hstu_intervals(whole, lengths, targets, num_contextual=2), heads=4)
    semi_local = semi_local_intervals(whole, lengths, targets, local=200, prefix=40)
    check(whole, whole, semi_local, heads=4)


def test_launches_side_by_side() -> None:
    """Each stream counts its tiles by itself."""
    lengths = torch.full((8,), 2000, dtype=torch.int32)
    whole = on_gpu(Jagged.whole(lengths))
    lengths = lengths.cuda()
    intervals = hstu_intervals(whole, lengths, torch.zeros_like(lengths))
    weighting = Weighting(whole, whole, intervals, 0.1, 0.1)
    q, k, v = torch.randn(3, whole.num_rows, 4, 128, device="cuda", dtype=torch.bfloat16)

    def attend() -> Tensor:
        return launch.forward(q, Source((k, v), weighting), out=torch.empty_like(q))

    want = attend()
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(attend())
    torch.cuda.synchronize()
    assert all(torch.equal(x, want) for x in found)
