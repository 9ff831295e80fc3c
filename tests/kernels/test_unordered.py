"""The backward of one pass: on a Hopper GPU as it is, else by our interpreter of Gluon."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
pytest.importorskip("triton")

from kernels.attention import hstu_attention
from kernels.blockwise import blockwise_backward
from kernels.jagged import Jagged
from kernels.masks import hstu_intervals, semi_local_intervals
from kernels.scratch import limit_scratch, scratch_limit
from kernels.triton import configs, launch, resident, tiles, walk
from kernels.triton.plan import plan_for
from kernels.triton.runs import SEGMENT_AT
from kernels.weighting import Weighting
from tests.kernels.cases import Case, any_intervals, cases, part_of
from tests.kernels.gluon_interpreter import interpret

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="not a Hopper GPU")
DEVICE = torch.device("cuda" if HOPPER else "cpu")
DIM = 128 if HOPPER else 32
LONG = 3000 if HOPPER else 300
launched: list[tuple[int, ...]] = []  # grids


@pytest.fixture(autouse=True)
def unordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it would not pay; and three programs where there is no GPU."""
    if not HOPPER:
        interpret(monkeypatch)
    kernel = resident.resident_unordered_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(resident, "resident_unordered_kernel", Counted())
    monkeypatch.setattr(walk, "config_for", lambda *problem: configs.HOPPER_LONG[128])


def check(
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    *,
    heads: int = 2,
    dim: int = DIM,
    dtype: torch.dtype = torch.bfloat16,
    bound: float = 3e-3,
) -> None:
    """Against float64, of rows that lie apart, written to such rows; and again, so that nothing is
    left behind that the next launch would find."""
    queries, keys = (
        Jagged(x.offsets.to(DEVICE), x.positions.to(DEVICE), x.num_rows) for x in (queries, keys)
    )
    weighting = Weighting(queries, keys, intervals.to(DEVICE), dim**-0.5, 0.1)
    q, dout = torch.randn(2, queries.num_rows, 2, heads, dim, device=DEVICE, dtype=dtype)[:, :, 1]
    k, v = torch.randn(2, keys.num_rows, 3, heads, dim, device=DEVICE, dtype=dtype)[:, :, 0]
    want = blockwise_backward(*(x.double() for x in (dout, q, k, v)), weighting)
    launched.clear()
    for _ in range(2):
        out = [x.new_full((x.shape[0], 2, *x.shape[1:]), 7)[:, 1] for x in (q, k, v)]
        launch.gradients(dout, q, k, v, weighting, deterministic=False, out=tuple(out))
        for found, wanted in zip(out, want, strict=True):
            assert (found - wanted).norm() <= bound * wanted.norm()
    assert len(launched) == 2


@settings(max_examples=40 if HOPPER else 4, deadline=None)
@given(case=cases(max_length=LONG, max_sequences=4), data=st.data())
def test_masks_and_shards(case: Case, data: st.DataObject) -> None:
    whole = Jagged.whole(case.lengths)
    keep = whole.positions // 16 % data.draw(st.sampled_from([1, 2])) == 0
    parts = [part_of(whole, x) for x in (keep, data.draw(st.sampled_from([keep, keep | ~keep])))]
    if all(part.num_rows for part in parts):
        check(*parts, case.intervals(parts[0]), bound=1e-2)  # pairs may be few


@settings(max_examples=20 if HOPPER else 2, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_any_intervals(seed: int) -> None:
    whole, intervals = any_intervals(seed)
    check(whole, whole, intervals, bound=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [128, 100] if HOPPER else [64, 40])
def test_dims(dim: int, dtype: torch.dtype) -> None:
    lengths = torch.tensor([300, 0, 1, 129], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    targets = torch.tensor([7, 0, 0, 1], dtype=torch.int32)
    intervals = hstu_intervals(whole, lengths, targets, num_contextual=3)
    check(whole, whole, intervals, dim=dim, dtype=dtype, heads=1)


def test_full_blocks_of_a_tile_that_is_not() -> None:
    """Queries that see all of a sequence, and its last tile is short: what lies behind it in shared
    memory are another's keys."""
    lengths = torch.tensor([200, 200, 70], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    check(whole, whole, hstu_intervals(whole, lengths, lengths * 0, num_contextual=130))


def test_tiles_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that all queries see."""
    monkeypatch.setattr(tiles, "LEAST", 2)
    lengths = torch.tensor([LONG, LONG // 2, 5], dtype=torch.int32, device=DEVICE)
    whole = Jagged.whole(lengths)
    intervals = semi_local_intervals(whole, lengths, lengths.clamp(max=2), local=70, prefix=40)
    parts = plan_for(whole, whole, intervals, 128, 64, 128).key_tiles()
    assert parts[:, 0, SEGMENT_AT.value + 1].max() > 1
    check(whole, whole, intervals)


def test_nothing_is_masked_or_seen() -> None:
    lengths = torch.tensor([256, 200], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    intervals = torch.zeros(456, 4, dtype=torch.int32)
    intervals[:256, 1] = 256
    check(whole, whole, intervals)


def test_by_request_and_where_there_is_room() -> None:
    lengths = torch.tensor([200, 3], dtype=torch.int32, device=DEVICE)
    whole = Jagged.whole(lengths)
    intervals = hstu_intervals(whole, lengths, lengths * 0)
    mask = dict(queries=whole, keys=whole, intervals=intervals, alpha=0.3, scale=0.1)
    q = torch.randn(203, 2, DIM, device=DEVICE, dtype=torch.float16, requires_grad=True)

    def gradient(**options: bool) -> Tensor:
        out = hstu_attention(q, q, q, **mask, **options, backend="triton")  # type: ignore[arg-type]
        return torch.autograd.grad(out.square().sum(), q)[0]

    before = scratch_limit()
    launched.clear()
    try:
        want = gradient()
        limit_scratch(203 * 2 * DIM * 4 - 1)
        assert torch.equal(gradient(deterministic=False), want)
        assert not launched
        limit_scratch(203 * 2 * DIM * 4)
        assert (gradient(deterministic=False) - want).norm() <= 4e-3 * want.norm()
        assert launched
    finally:
        limit_scratch(before)
