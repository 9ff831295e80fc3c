"""A backward that keeps slopes: its plan, and its gradients against float64."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
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
from kernels.triton import configs, launch, tiles
from kernels.triton.plan import Plan
from kernels.triton.runs import MASKED_RUNS, RUNS_AT, SEGMENT_AT
from kernels.weighting import Weighting
from tests.kernels.cases import Case, any_intervals, cases, part_of, visible_pairs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PART = 8
LENGTHS = (150, 0, 1, 64, 65)
TARGETS = (6, 0, 1, 0, 2)


@pytest.fixture(autouse=True)
def kept_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    block, square = configs.Blocks(16, 16, 4, 1), configs.Blocks(64, 64, 4, 1)
    kept = configs.Kept(configs.Blocks(32, 64, 4, 1), square, square)
    monkeypatch.setitem(configs.SINGLE, 64, configs.Config(32, 16, *[block] * 4, kept))
    monkeypatch.setattr(tiles, "LEAST", 2)


def walked(record: list[int]) -> list[tuple[bool, int]]:
    """Whether a part is full, and its first row, of all parts that a record names."""
    ends = record[RUNS_AT.value : SEGMENT_AT.value]
    runs = enumerate(zip(ends[::2], ends[1::2], strict=True))
    return [(i >= 2 * MASKED_RUNS.value, x) for i, (a, b) in runs for x in range(a, b, PART)]


def check_plan(queries: Jagged, keys: Jagged, intervals: Tensor) -> None:
    """Key parts and query parts name each other, once each; what is full is seen by all."""
    on_device = [
        Jagged(x.offsets.to(DEVICE), x.positions.to(DEVICE), x.num_rows) for x in (queries, keys)
    ]
    plan = Plan.build(*on_device, intervals.to(DEVICE), PART, PART, PART, aligned=True)
    seen = visible_pairs(queries, keys, intervals)
    firsts = [x.offsets[:-1].tolist() for x in (queries, keys)]
    by_key, by_query = [], []
    for record in plan.key_tiles()[:, 0].tolist():
        key, end, _, _, sequence, first = record[:6]
        if key < end:
            assert (first, (key - firsts[1][sequence]) % PART) == (firsts[0][sequence], 0)
            for full, query in walked(record):
                assert (query - first) % PART == 0
                assert not full or seen[query : query + PART, key : key + PART].all()
                assert not full or end - key == PART
                by_key.append((key, query))
    for record in plan.query_parts()[:, 0].tolist():
        query, end, _, _, sequence, first = record[:6]
        if query < end:
            assert (first, (query - first) % PART) == (firsts[0][sequence], 0)
            by_query += [(key, query) for _, key in walked(record)]
    assert len(set(by_key)) == len(by_key)
    assert len(set(by_query)) == len(by_query)
    assert set(by_query) <= set(by_key)  # more where runs have no room: they are 0
    named = torch.zeros_like(seen)
    for key, query in by_query:
        named[query : query + PART, key : key + PART] = True
    assert not (seen & ~named).any()


@settings(max_examples=10, deadline=None)
@given(case=cases(max_length=120, max_sequences=3), data=st.data())
def test_plans_of_masks_and_shards(case: Case, data: st.DataObject) -> None:
    whole = Jagged.whole(case.lengths)
    contextual = data.draw(st.sampled_from([0, 3, PART, 40]))
    case = replace(case, num_contextual=contextual)
    keep = whole.positions // PART % data.draw(st.sampled_from([1, 2])) == 0
    parts = [part_of(whole, x) for x in (keep, data.draw(st.sampled_from([keep, keep | ~keep])))]
    if all(part.num_rows for part in parts):
        check_plan(*parts, case.intervals(parts[0]))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31))
@example(seed=1)
def test_plans_of_any_intervals(seed: int) -> None:
    whole, intervals = any_intervals(seed)
    check_plan(whole, whole, intervals)


def is_called(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """As long as there were calls that kept slopes."""
    called: list[None] = []
    by_slopes = launch._gradients_by_slopes
    monkeypatch.setattr(launch, "_gradients_by_slopes", lambda *x: called.append(by_slopes(*x)))
    return called


def check_gradients(
    queries: Jagged,
    keys: Jagged,
    intervals: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    *,
    heads: int = 1,
    dims: tuple[int, int] = (32, 32),
    calls: int = 1,
) -> None:
    """Against float64; in so many calls, of some of the heads each."""
    called = is_called(monkeypatch)
    queries, keys = (
        Jagged(x.offsets.to(DEVICE), x.positions.to(DEVICE), int(x.lengths().max()))
        for x in (queries, keys)
    )
    torch.manual_seed(0)
    widths = (queries, dims[0]), (keys, dims[0]), (keys, dims[1]), (queries, dims[1])
    q, k, v, dout = (torch.randn(x.num_rows, heads, dim).to(DEVICE) for x, dim in widths)
    weighting = Weighting(queries, keys, intervals.to(DEVICE), 0.3, 0.1)
    want = blockwise_backward(*(x.double() for x in (dout, q, k, v)), weighting)
    got = (
        torch.full_like(q, torch.nan),
        torch.full_like(k, torch.nan),
        torch.full_like(v, torch.nan),
    )
    torch.use_deterministic_algorithms(True)  # uninitialized memory is NaN
    try:
        launch.gradients(dout, q, k, v, weighting, out=got)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(called) == calls
    for x, y in zip(got, want, strict=True):
        assert (x.double() - y).norm() <= 1e-5 * y.norm()


@pytest.mark.parametrize("mask", ["causal", "contextual", "window", "semi-local"])
def test_gradients(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, targets = (torch.tensor(x, dtype=torch.int32) for x in (LENGTHS, TARGETS))
    whole = Jagged.whole(lengths)
    intervals = {
        "causal": hstu_intervals(whole, lengths, torch.zeros_like(targets)),
        "contextual": hstu_intervals(whole, lengths, targets, num_contextual=3),
        "window": hstu_intervals(whole, lengths, targets, num_contextual=2, window=9),
        "semi-local": semi_local_intervals(whole, lengths, targets, local=20, prefix=7),
    }
    check_gradients(whole, whole, intervals[mask], monkeypatch)


@pytest.mark.parametrize("seed", [1, 2])
def test_gradients_of_any_intervals(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, intervals = any_intervals(seed)
    check_gradients(whole, whole, intervals, monkeypatch)


def test_more_runs_than_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other part of the queries sees everything, the others nothing."""
    whole = Jagged.whole(torch.tensor([720], dtype=torch.int32))
    intervals = torch.zeros(720, 4, dtype=torch.int32)
    intervals[:, 1] = 720 * (whole.positions // 64 % 2)
    check_gradients(whole, whole, intervals, monkeypatch)


def test_other_keys_than_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    whole = Jagged.whole(lengths)
    queries, keys = (part_of(whole, x) for x in (whole.positions % 2 == 0, whole.positions < 90))
    intervals = hstu_intervals(queries, lengths, torch.zeros_like(lengths))
    check_gradients(queries, keys, intervals, monkeypatch)


def test_dk_and_dv_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configs.SINGLE[64]
    assert config.kept is not None
    kept = replace(config.kept, key=None)
    monkeypatch.setitem(configs.SINGLE, 64, replace(config, kept=kept))
    lengths, targets = (torch.tensor(x, dtype=torch.int32) for x in (LENGTHS, TARGETS))
    whole = Jagged.whole(lengths)
    intervals = hstu_intervals(whole, lengths, targets, num_contextual=3)
    check_gradients(whole, whole, intervals, monkeypatch, heads=2)


def test_autograd_keeps_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the host knows how long sequences are."""
    called = is_called(monkeypatch)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    grads = []
    for whole in (Jagged.whole(lengths), Jagged.whole(lengths, sum(LENGTHS))):
        intervals = hstu_intervals(whole, lengths, torch.zeros_like(lengths))
        q = torch.linspace(-1, 1, sum(LENGTHS) * 32, device=DEVICE).view(-1, 1, 32).requires_grad_()
        mask = dict(queries=whole, keys=whole, intervals=intervals, alpha=0.3, scale=0.1)
        hstu_attention(q, q, q, **mask, backend="triton").square().sum().backward()
        grads.append(q.grad)
        assert len(called) == 1
    torch.testing.assert_close(*grads)


def test_shipped_blocks_are_squares() -> None:
    tables = configs.HOPPER, configs.HOPPER_SHORT, configs.CONSERVATIVE
    shipped = [config for table in tables for config in table.values()]
    kept = [config.kept for config in shipped if config.kept]
    assert kept
    for x in kept:
        assert x.value.n == 64 == x.query.m == x.query.n
        assert 64 % x.value.m == 0 == x.value.m % 16
        assert x.key is None or (x.key.m, x.key.n) == (64, 64)
        assert {y.warps for y in (x.value, x.key, x.query) if y} == {4}


@pytest.mark.skipif(DEVICE.type == "cpu", reason="of a GPU's instructions")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(256, 256), (200, 64), (64, 32)])
def test_shipped_blocks(
    dims: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only Hopper's configurations keep slopes")
    called = is_called(monkeypatch)
    lengths = torch.tensor([300, 0, 1, 1000, 64, 129], dtype=torch.int32, device=DEVICE)
    whole = Jagged.whole(lengths)
    intervals = hstu_intervals(whole, lengths, lengths // 20, num_contextual=3)
    torch.manual_seed(0)
    widths = dims[0], dims[0], dims[1], dims[1]
    q, k, v, dout = (torch.randn(whole.num_rows, 4, x, device=DEVICE, dtype=dtype) for x in widths)
    weighting = Weighting(whole, whole, intervals, 0.1, 0.01)
    got = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    launch.gradients(dout, q, k, v, weighting, out=got)
    assert called
    want = blockwise_backward(*(x.double() for x in (dout, q, k, v)), weighting)
    for x, y in zip(got, want, strict=True):
        assert (x.double() - y).norm() <= 3e-3 * y.norm()


def test_some_heads_at_a_time_and_padded_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    whole = Jagged.whole(lengths)
    intervals = hstu_intervals(whole, lengths, torch.zeros_like(lengths))
    of_head = (sum(LENGTHS) // 64 + len(LENGTHS)) * 3 * 64 * 64 * 4
    before = scratch_limit()
    try:
        limit_scratch(2 * of_head)
        check_gradients(whole, whole, intervals, monkeypatch, heads=3, dims=(24, 40), calls=2)
        limit_scratch(2 * of_head - 1)
        check_gradients(whole, whole, intervals, monkeypatch, heads=3, calls=3)
        limit_scratch(of_head - 1)
        check_gradients(whole, whole, intervals, monkeypatch, heads=3, calls=0)
    finally:
        limit_scratch(before)
    with pytest.raises(ValueError, match="num_bytes"):
        limit_scratch(-1)


def test_a_longer_sequence_than_promised_is_an_error() -> None:
    whole = Jagged.whole(torch.tensor([70], dtype=torch.int32), total=70, max_length=69)
    q = torch.randn(70, 1, 32)
    intervals = torch.zeros(70, 4, dtype=torch.int32)
    mask = dict(queries=whole, keys=whole, intervals=intervals, alpha=0.3, scale=0.1)
    with pytest.raises(ValueError, match="max_length=69"):
        hstu_attention(q, q, q, **mask)
    if DEVICE.type == "cpu":  # there it ends the process
        weighting = Weighting(**mask)
        with pytest.raises(RuntimeError, match="max_length"):
            launch.gradients(q, q, q, q, weighting, out=(q, q, q))
