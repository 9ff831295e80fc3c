"""The forward whose programs stay: on a Hopper GPU as it is, else by our interpreter of Gluon."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
pytest.importorskip("triton")

from kernels.jagged import Jagged
from kernels.masks import hstu_intervals, semi_local_intervals
from kernels.naive import naive_attention
from kernels.source import Source
from kernels.triton import configs, launch
from kernels.weighting import Weighting
from tests.kernels.cases import Case, any_intervals, cases, part_of
from tests.kernels.gluon_interpreter import interpret

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="not a Hopper GPU")
DEVICE = torch.device("cuda" if HOPPER else "cpu")
DIMS = (128, 128) if HOPPER else (32, 32)
OTHER = configs.Resident(128, 64, 1, 3)
LONG = 3000 if HOPPER else 300
ROUNDINGS = 2 * 2**-8  # to bf16, of a weight and of an output: of a pair or two they may add up


@pytest.fixture(autouse=True, params=[configs.RESIDENT, OTHER])
def resident(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Also where it would not pay; and three programs where there is no GPU."""
    config = replace(configs.HOPPER[128], resident=request.param)
    monkeypatch.setattr(launch, "config_for", lambda *problem: config)
    if not HOPPER:
        interpret(monkeypatch, "resident_forward_kernel")


def check(
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    *,
    heads: int = 2,
    dims: tuple[int, int] = DIMS,
    dtype: torch.dtype = torch.bfloat16,
    bound: float = 3e-3,
) -> None:
    """Against float64, from rows that lie apart; with float32 partials to add to; and the same bits
    again, so that nothing is left behind that the next launch would find."""
    queries, keys = (
        Jagged(x.offsets.to(DEVICE), x.positions.to(DEVICE), x.num_rows) for x in (queries, keys)
    )
    weighting = Weighting(queries, keys, intervals.to(DEVICE), dims[0] ** -0.5, 0.1)
    q = torch.randn(queries.num_rows, 2, heads, dims[0], device=DEVICE, dtype=dtype)[:, 1]
    k = torch.randn(keys.num_rows, 2, heads, dims[0], device=DEVICE, dtype=dtype)[:, 0]
    v = torch.randn(keys.num_rows, 3, heads, dims[1], device=DEVICE, dtype=dtype)[:, 2]
    want = naive_attention(q.double(), k.double(), v.double(), weighting)
    source = Source((k, v), weighting)

    out = [launch.forward(q, source, out=torch.empty_like(want, dtype=dtype)) for _ in range(2)]
    assert torch.equal(*out)
    assert (out[0] - want).norm() <= bound * want.norm()
    partial = torch.randn(want.shape, device=DEVICE)
    sums = launch.forward(q, source, add=partial, out=torch.empty_like(partial))
    assert (sums - partial - want).norm() <= bound * want.norm() + 1e-6 * partial.norm()


@settings(max_examples=40 if HOPPER else 4, deadline=None)
@given(case=cases(max_length=LONG, max_sequences=4), data=st.data())
def test_masks_and_shards(case: Case, data: st.DataObject) -> None:
    whole = Jagged.whole(case.lengths)
    keep = whole.positions // 16 % data.draw(st.sampled_from([1, 2])) == 0
    parts = [part_of(whole, x) for x in (keep, data.draw(st.sampled_from([keep, keep | ~keep])))]
    if all(part.num_rows for part in parts):
        check(*parts, case.intervals(parts[0]), bound=ROUNDINGS)


@settings(max_examples=20 if HOPPER else 2, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_any_intervals(seed: int) -> None:
    whole, intervals = any_intervals(seed)
    check(whole, whole, intervals, bound=ROUNDINGS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(128, 32), (64, 128), (40, 100)])
def test_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    lengths = torch.tensor([300, 0, 1, 129], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    targets = torch.tensor([7, 0, 0, 1], dtype=torch.int32)
    intervals = hstu_intervals(whole, lengths, targets, num_contextual=3)
    check(whole, whole, intervals, dims=dims, dtype=dtype, heads=1)


def test_more_tiles_than_programs() -> None:
    """Most are handed out late; of short sequences some are empty; a prefix under a window."""
    lengths = torch.tensor([LONG, *range(1, 200, 40), 0, LONG // 2], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    targets = lengths.clamp(max=3)
    check(whole, whole, hstu_intervals(whole, lengths, targets, num_contextual=2), heads=1)
    check(whole, whole, semi_local_intervals(whole, lengths, targets, local=100, prefix=40))


def test_nothing_is_masked_or_seen() -> None:
    lengths = torch.tensor([256, 200], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    intervals = torch.zeros(456, 4, dtype=torch.int32)
    intervals[:256, 1] = 256
    check(whole, whole, intervals)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_launches_side_by_side() -> None:
    """Each stream counts its tiles by itself."""
    lengths = torch.full((8,), 2000, dtype=torch.int32, device=DEVICE)
    whole = Jagged.whole(lengths)
    intervals = hstu_intervals(whole, lengths, torch.zeros_like(lengths))
    weighting = Weighting(whole, whole, intervals, 0.1, 0.1)
    q, k, v = torch.randn(3, whole.num_rows, 4, 128, device=DEVICE, dtype=torch.bfloat16)

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
