"""Kernels whose programs stay: on a Hopper GPU as they are, else by our interpreter of Gluon."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
pytest.importorskip("triton")

from kernels.blockwise import blockwise_backward
from kernels.jagged import Jagged
from kernels.masks import hstu_intervals, semi_local_intervals
from kernels.naive import naive_attention
from kernels.source import Arrival, Source
from kernels.triton import configs, launch, tiles, walk
from kernels.triton.configs import Resident, Residents
from kernels.triton.plan import plan_for
from kernels.triton.runs import SEGMENT_AT
from kernels.weighting import Weighting
from tests.kernels.cases import Case, any_intervals, cases, part_of
from tests.kernels.gluon_interpreter import interpret

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="not a Hopper GPU")
DEVICE = torch.device("cuda" if HOPPER else "cpu")
DIMS = (128, 128) if HOPPER else (32, 32)
OTHER = Residents(
    Resident(128, 64, 1, 2, early=True),
    gradients=Resident(128, 64, 1, 3, early=True),
    at_once=True,
)
SHORT = configs.HOPPER_SHORT[128].resident
assert SHORT is not None
AT_ONCE = replace(SHORT, at_once=True)
LONG = 3000 if HOPPER else 300
ROUNDINGS = 2 * 2**-8  # to bf16, of a weight and of an output: of a pair or two they may add up


# A GPU compiles them for a long time: only those that are shipped.
@pytest.fixture(autouse=True, params=[configs.RESIDENT, AT_ONCE if HOPPER else OTHER])
def resident_configs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Also where it would not pay; and three programs where there is no GPU."""
    config = replace(configs.HOPPER[128], resident=request.param)
    monkeypatch.setattr(walk, "config_for", lambda *problem: config)
    if not HOPPER:
        interpret(monkeypatch)


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
    """Against float64, from rows that lie apart, to such rows; with float32 partials to add to; and
    the same bits again, so that nothing is left behind that the next launch would find."""
    queries, keys = (
        Jagged(x.offsets.to(DEVICE), x.positions.to(DEVICE), x.num_rows) for x in (queries, keys)
    )
    weighting = Weighting(queries, keys, intervals.to(DEVICE), dims[0] ** -0.5, 0.1)
    q = torch.randn(queries.num_rows, 2, heads, dims[0], device=DEVICE, dtype=dtype)[:, 1]
    k = torch.randn(keys.num_rows, 2, heads, dims[0], device=DEVICE, dtype=dtype)[:, 0]
    v = torch.randn(keys.num_rows, 3, heads, dims[1], device=DEVICE, dtype=dtype)[:, 2]
    dout = torch.randn(queries.num_rows, 2, heads, dims[1], device=DEVICE, dtype=dtype)[:, 0]
    keys_of, queries_of = Source((k, v), weighting), Source((q, dout), weighting)
    exact = tuple(x.double() for x in (dout, q, k, v))
    want = naive_attention(*exact[1:], weighting), *blockwise_backward(*exact, weighting)

    def attend(add: Sequence[Tensor | None], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        launch.forward(q, keys_of, add=add[0], out=out[0])
        launch.query_gradient(dout, q, keys_of, add=add[1], out=out[1])
        more = None if add[2] is None or add[3] is None else (add[2], add[3])
        launch.key_value_gradients(k, v, queries_of, add=more, out=(out[2], out[3]))
        return out

    def apart(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(x.shape[0], 2, *x.shape[1:], dtype=dtype)[:, 1] for x in want)

    once, again = apart(dtype), apart(dtype)
    launch.forward(q, keys_of, out=once[0])
    launch.gradients(dout, q, k, v, weighting, out=once[1:])
    attend([None] * 4, again)  # dq, dk and dv one by one
    partial = [torch.randn(x.shape, device=DEVICE) for x in want]
    onto = attend(partial, apart(torch.float32))
    in_place = tuple(x.clone() for x in partial)
    attend(in_place, in_place)
    for i, found in enumerate(once):
        assert torch.equal(found, again[i])
        assert (found - want[i]).norm() <= bound * want[i].norm()
        assert torch.equal(in_place[i], onto[i])
        more = onto[i] - partial[i]
        assert (more - want[i]).norm() <= bound * want[i].norm() + 1e-6 * partial[i].norm()


@settings(max_examples=20 if HOPPER else 4, deadline=None)
@given(case=cases(max_length=LONG, max_sequences=4), data=st.data())
def test_masks_and_shards(case: Case, data: st.DataObject) -> None:
    whole = Jagged.whole(case.lengths)
    keep = whole.positions // 16 % data.draw(st.sampled_from([1, 2])) == 0
    parts = [part_of(whole, x) for x in (keep, data.draw(st.sampled_from([keep, keep | ~keep])))]
    if all(part.num_rows for part in parts):
        check(*parts, case.intervals(parts[0]), bound=ROUNDINGS)


@settings(max_examples=10 if HOPPER else 2, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_any_intervals(seed: int) -> None:
    whole, intervals = any_intervals(seed)
    check(whole, whole, intervals, bound=ROUNDINGS)


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [((128, 32), torch.bfloat16), ((64, 128), torch.float16), ((40, 100), torch.float16)],
)
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
    check(whole, whole, intervals, heads=3)  # no power of two


def test_tiles_of_keys_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that all queries see."""
    monkeypatch.setattr(tiles, "LEAST", 2)
    lengths = torch.tensor([LONG, LONG // 2, 5], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    intervals = semi_local_intervals(whole, lengths, lengths.clamp(max=2), local=70, prefix=40)
    check(whole, whole, intervals)
    on_device = Jagged(*(x.to(DEVICE) for x in (whole.offsets, whole.positions)), whole.num_rows)
    records = plan_for(on_device, on_device, intervals.to(DEVICE), 128, 64, 128).key_tiles()
    assert records[:, 0, SEGMENT_AT.value + 1].max() > 1


def test_more_tiles_of_queries_than_of_keys() -> None:
    lengths = torch.tensor([LONG, 100], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    some = part_of(whole, whole.positions < 90)
    check(whole, some, hstu_intervals(whole, lengths, torch.zeros_like(lengths)))


class Late(Arrival):
    """Rows that are not there before someone waits for them."""

    def __init__(self, *rows: Tensor) -> None:
        self.coming, self.rows = rows, tuple(torch.full_like(x, math.nan) for x in rows)

    def wait(self) -> None:
        for x, comes in zip(self.rows, self.coming, strict=True):
            x.copy_(comes)


@pytest.mark.parametrize("dim", [DIMS[0], 40])
def test_rows_that_come_late(dim: int) -> None:
    """Also those that have to be padded."""
    lengths = torch.tensor([150, 30], dtype=torch.int32, device=DEVICE)
    whole = Jagged.whole(lengths)
    intervals = hstu_intervals(whole, lengths, torch.zeros_like(lengths))
    weighting = Weighting(whole, whole, intervals, 0.2, 0.1)
    q, k, v, dout = torch.randn(4, 180, 2, dim, device=DEVICE, dtype=torch.float16)

    def attend(keys: Source, queries: Source) -> tuple[Tensor, ...]:
        out, dq, dk, dv = torch.empty(4, 180, 2, dim, device=DEVICE, dtype=torch.float16)
        launch.forward(q, keys, out=out)
        launch.query_gradient(dout, q, keys, out=dq)
        launch.key_value_gradients(k, v, queries, out=(dk, dv))
        return out, dq, dk, dv

    want = attend(Source((k, v), weighting), Source((q, dout), weighting))
    for i in range(4):  # each the first to wait
        keys, queries = Late(k, v), Late(q, dout)
        of_keys, of_queries = (Source(x.rows, weighting, x) for x in (keys, queries))
        out = torch.empty_like(q)
        if i == 0:
            found = [launch.forward(q, of_keys, out=out)]
        elif i == 1:
            found = [launch.query_gradient(dout, q, of_keys, out=out)]
        else:
            both = launch.key_value_gradients(k, v, of_queries, out=(out, torch.empty_like(v)))
            found = [both[i - 2]]
        assert torch.equal(found[0], want[i])


@pytest.mark.parametrize("onto", [False, True])
def test_two_sources_in_turn(monkeypatch: pytest.MonkeyPatch, onto: bool) -> None:
    """A rank's own rows, and others' that come late; perhaps added to what there is."""
    monkeypatch.setattr(launch, "MANY", 1)
    monkeypatch.setattr(launch, "MANY_EACH", 1)
    monkeypatch.setattr(walk, "MOST_SOURCES", 1)  # at a time
    lengths = torch.tensor([150, 130], dtype=torch.int32, device=DEVICE)
    whole = Jagged.whole(lengths)
    mine = part_of(whole, whole.positions // 32 % 2 == 0)
    others = part_of(whole, whole.positions // 32 % 2 == 1)
    q, k, v, dout = torch.randn(4, mine.num_rows, 2, DIMS[0], device=DEVICE).bfloat16()
    theirs = torch.randn(4, others.num_rows, 2, DIMS[0], device=DEVICE).bfloat16()

    def weighting(queries: Jagged, keys: Jagged) -> Weighting:
        intervals = hstu_intervals(queries, lengths, torch.zeros_like(lengths))
        return Weighting(queries, keys, intervals, 0.2, 0.1)

    own, of_keys, of_queries = (
        weighting(*x) for x in ((mine, mine), (mine, others), (others, mine))
    )
    late_keys, late_queries = Late(theirs[1], theirs[2]), Late(theirs[0], theirs[3])
    keys = Source((k, v), own), Source(late_keys.rows, of_keys, late_keys)
    queries = Source((q, dout), own), Source(late_queries.rows, of_queries, late_queries)
    add = [torch.randn(q.shape, device=DEVICE) if onto else None for _ in range(4)]
    out_onto, dq_onto, *of_k = (None if x is None else x.clone() for x in add)
    out, dq, dk, dv = (torch.empty_like(q) for _ in range(4))
    launch.forward(q, *keys, add=out_onto, out=out)
    launch.query_gradient(dout, q, *keys, add=dq_onto, out=dq)
    both = (of_k[0], of_k[1]) if of_k[0] is not None and of_k[1] is not None else None
    launch.key_value_gradients(k, v, *queries, add=both, out=(dk, dv))

    q, k, v, dout, *rest = (x.double() for x in (q, k, v, dout, *theirs))
    mine_dq, mine_dk, mine_dv = blockwise_backward(dout, q, k, v, own)
    other_dq = blockwise_backward(dout, q, rest[1], rest[2], of_keys)[0]
    _, other_dk, other_dv = blockwise_backward(rest[3], rest[0], k, v, of_queries)
    want = [
        naive_attention(q, k, v, own) + naive_attention(q, rest[1], rest[2], of_keys),
        mine_dq + other_dq,
        mine_dk + other_dk,
        mine_dv + other_dv,
    ]
    for found, sums, more in zip((out, dq, dk, dv), want, add, strict=True):
        total = sums if more is None else sums + more
        assert (found - total).norm() <= 3e-3 * total.norm()


@pytest.mark.parametrize("table", ["HOPPER", "HOPPER_LONG", "HOPPER_FEW", "HOPPER_SHORT"])
def test_shipped_blocks_fit_into_a_plan(table: str) -> None:
    for config in getattr(configs, table).values():
        if config.resident:
            tile, part, key_tile = config.resident.plan
            x = config.resident
            assert tile == 2 * part
            for blocks in (x.forward, x.gradients, x.unordered):
                assert not blocks or blocks.n == part
                assert not blocks or blocks.m == tile == key_tile


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
