"""The plan of Triton attention, read as its kernels read it: every visible pair once, no other."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
pytest.importorskip("triton")

from kernels.jagged import Jagged
from kernels.masks import hstu_intervals, semi_local_intervals
from kernels.source import Source
from kernels.triton import plan as plan_module
from kernels.triton import tiles
from kernels.triton import walk as walk_module
from kernels.triton.halves import TOLD
from kernels.triton.masked import QUARTERS
from kernels.triton.plan import Plan
from kernels.triton.runs import HALVES_AT, MASKED_RUNS, RIDERS_AT, RUNS_AT, SEGMENT_AT
from kernels.weighting import Weighting
from tests.kernels.cases import Case, any_intervals, cases, part_of, visible_pairs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILE, PART = 16, 8
KEY_TILES = PART, TILE


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "LEAST", 2)


def runs_of(record: list[int]) -> list[list[tuple[int, int]]]:
    """The runs of each kind: full ones, and those for the first and the second interval."""
    ends = record[RUNS_AT.value : SEGMENT_AT.value]
    pairs = list(zip(ends[::2], ends[1::2], strict=True))
    masked = MASKED_RUNS.value
    return [pairs[2 * masked :], pairs[masked : 2 * masked], pairs[:masked]]


def visited(plan: Plan, records: Tensor, tile: int, by_keys: bool) -> Tensor:
    """How often a kernel counts each pair: int [Tq, Tk]."""
    count = torch.zeros(plan.queries.num_rows, plan.keys.num_rows, dtype=torch.int32)
    key_rows = torch.arange(plan.keys.num_rows)
    bounds = plan.bounds.cpu().T[:, :, None]
    seen = [
        (key_rows >= 0).expand(len(count), -1),
        (key_rows >= bounds[0]) & (key_rows < bounds[1]),
        (key_rows >= bounds[2]) & (key_rows < bounds[3]),
    ]
    for record in records.tolist():
        rows = list(range(record[0], min(record[0] + tile, record[1])))
        riders = list(range(record[RIDERS_AT.value], record[RIDERS_AT.value + 1]))
        if by_keys and riders:  # queries, by their first interval
            count[np.ix_(riders, rows)] += seen[1][np.ix_(riders, rows)]
        if not by_keys:
            rows += riders
            assert len(rows) <= tile
        for kind, runs in enumerate(runs_of(record)):
            for start, end in runs:
                if start >= end:
                    continue
                assert kind or (end - start) % PART == 0
                if by_keys:
                    count[start:end, rows] += seen[kind][start:end, rows]
                else:  # its last block may overrun the run
                    end = start + -(-(end - start) // PART) * PART
                    count[rows, start:end] += seen[kind][rows, start:end]
    return count


def check_halves(plan: Plan) -> int:
    """What halves of tiles are said not to see, pair by pair; how many blocks that is."""
    count = 0
    keys = torch.arange(plan.keys.num_rows)
    bounds = plan.bounds.cpu()
    by_interval = [
        ((keys >= bounds[:, :1]) & (keys < bounds[:, 1:2])).numpy(),
        ((keys >= bounds[:, 2:3]) & (keys < bounds[:, 3:])).numpy(),
    ]
    for halved, of_keys in (plan.halved_query_tiles, False), (plan.halved_key_tiles, True):
        for record in halved[:, 0].tolist():
            rows = list(range(record[0], min(record[0] + TILE, record[1])))
            riders = list(range(record[RIDERS_AT.value], record[RIDERS_AT.value + 1]))
            if not of_keys:
                rows += riders
            unseen = [0, 0]
            block = 0
            _full, *masked = runs_of(record)
            last = max(((0, end) for start, end in masked[0] if start < end), default=None)
            for kind in 1, 0:
                for start, end in masked[kind]:
                    for row in range(start, end, PART):
                        others = list(range(row, min(row + PART, end if of_keys else len(keys))))
                        pairs = by_interval[kind]
                        if of_keys and riders and (kind, end) == last and row + PART >= end:
                            assert len(riders) <= PART // QUARTERS.value
                            assert len(others) <= PART - PART // QUARTERS.value
                            others += riders
                        for half in range(2):
                            mine = rows[half * PART : half * PART + PART]
                            some = pairs[np.ix_(*((others, mine) if of_keys else (mine, others)))]
                            if not some.any() and block < TOLD.value:
                                unseen[half] |= 1 << block
                                count += 1
                        block += 1
            assert record[HALVES_AT.value :][:2] == unseen
    return count


def check_segments(plan: Plan, *more: Plan) -> int:
    """Segments of a tile are numbered, and their sums have places of their own; how many are not
    alone."""
    by_tile: dict[int, list[list[int]]] = {}
    for record in plan.key_tiles(*more)[:, 0].tolist():
        if record[0] < record[1]:
            by_tile.setdefault(record[0], []).append(record[SEGMENT_AT.value :][:3])
    slots = []
    for segments in by_tile.values():
        index, count, slot = zip(*sorted(segments), strict=True)
        assert index == tuple(range(len(segments)))
        assert set(count) == {len(segments)}
        assert len(set(slot)) == 1
        slots += range(slot[0], slot[0] + len(segments)) if len(segments) > 1 else ()
    assert sorted(slots) == list(range(len(slots)))
    assert len(slots) <= plan.most_segments(*more)
    return len(slots)


def check(queries: Jagged, keys: Jagged, intervals: Tensor) -> Plan:
    on_device = [Jagged(x.offsets.to(DEVICE), x.positions.to(DEVICE)) for x in (queries, keys)]
    want = visible_pairs(queries, keys, intervals)
    for key_tile in KEY_TILES[::-1]:
        plan = Plan.build(*on_device, intervals.to(DEVICE), TILE, PART, key_tile)
        for records in plan.key_tiles(), plan.key_tiles_first_first:
            assert torch.equal(visited(plan, records[:, 0], key_tile, by_keys=True), want.int())
        check_segments(plan)
        if key_tile == TILE:
            check_halves(plan)
            halved = plan.halved_key_tiles[:, 0]
            assert torch.equal(visited(plan, halved, key_tile, by_keys=True), want.int())
    tiles = plan.query_tiles()[: plan.num_query_tiles, 0]  # those behind are empty
    assert torch.equal(visited(plan, tiles, TILE, by_keys=False), want.int())
    assert torch.equal(visited(plan, plan.query_parts()[:, 0], PART, by_keys=False), want.int())
    return plan


@settings(max_examples=25, deadline=None)
@given(case=cases(max_length=120, max_sequences=3), data=st.data())
def test_masks_and_shards(case: Case, data: st.DataObject) -> None:
    if int(case.lengths.sum()) == 0:
        return
    if data.draw(st.booleans()):  # as many contextual tokens as a part or tile has rows, or about
        contextual = data.draw(st.sampled_from([PART - 1, PART, PART + 1, TILE, TILE + 1, 40]))
        case = replace(case, num_contextual=contextual)
    whole = Jagged.whole(case.lengths)
    chunks = data.draw(st.sampled_from([1, 4]))
    chunk = whole.positions * chunks // case.lengths[whole.sequence_ids()].clamp(min=1)
    if data.draw(st.booleans()):
        chunk = whole.positions // TILE % chunks
    keep = (chunk == 0) | (chunk == chunks - 1)
    queries = part_of(whole, keep)
    keys = part_of(whole, data.draw(st.sampled_from([keep, ~keep, keep | ~keep])))
    if queries.num_rows and keys.num_rows:
        check(queries, keys, case.intervals(queries))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
@example(seed=1)  # a run of one interval goes on where the other's have no room
def test_any_intervals(seed: int) -> None:
    whole, intervals = any_intervals(seed)
    check(whole, whole, intervals)


def test_few_contextual_queries_ride_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last masked block of a key tile, if it has room: beside the last 3 of 163 rows."""
    monkeypatch.setattr(tiles, "LEAST", 64)  # no segments: each has but a part of the runs
    lengths = torch.tensor([10 * TILE + 3], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    for contextual, ride in (PART // QUARTERS.value, 21), (PART // QUARTERS.value + 1, 0):
        none = torch.zeros_like(lengths)
        intervals = hstu_intervals(whole, lengths, none, num_contextual=contextual)
        plan = check(whole, whole, intervals)
        riders = plan.halved_key_tiles[:, 0, RIDERS_AT.value : RIDERS_AT.value + 2]
        assert int((riders[:, 0] < riders[:, 1]).sum()) == ride


def test_halves_at_a_diagonal_and_at_a_window() -> None:
    """Each has a block that the first half sees alone, and one that is the second's."""
    lengths = torch.tensor([10 * TILE], dtype=torch.int32, device=DEVICE)
    whole = Jagged.whole(lengths)
    none = torch.zeros_like(lengths)
    causal = Plan.build(whole, whole, hstu_intervals(whole, lengths, none), TILE, PART, TILE)
    assert check_halves(causal) == 20  # one of each of ten tiles' two: of queries, and of keys
    intervals = hstu_intervals(whole, lengths, none, window=2 * TILE)
    assert check_halves(Plan.build(whole, whole, intervals, TILE, PART, TILE)) > 30


def test_a_prefix_that_all_see_is_walked_in_segments() -> None:
    """The keys that every query sees under a window: half of all there is to do, in two tiles."""
    lengths = torch.tensor([640], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    intervals = semi_local_intervals(
        whole, lengths, torch.zeros_like(lengths), local=8, prefix=2 * PART
    )
    assert check_segments(check(whole, whole, intervals)) >= 2 * 8


def test_sources_are_walked_together() -> None:
    """In one order: keys of two ranks by the queries of one, and the other way round."""
    lengths = torch.tensor([640, 50], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    mine = whole.positions // (2 * PART) % 2 == 0
    parts = [part_of(whole, keep) for keep in (mine, ~mine)]
    intervals = [
        semi_local_intervals(part, lengths, torch.zeros_like(lengths), local=8, prefix=2 * PART)
        for part in parts
    ]
    own, theirs, asked = (
        check(parts[asking], parts[keys], intervals[asking])
        for asking, keys in ((0, 0), (0, 1), (1, 0))
    )
    for plans, records, size, by_keys in (
        ((own, theirs), own.query_tiles(theirs), TILE, False),
        ((own, theirs), own.query_parts(theirs), PART, False),
        ((own, asked), own.key_tiles(asked), PART, True),
    ):
        assert records.shape[1] == 2
        for source, plan in enumerate(plans):
            want = visited(plan, plan.query_tiles()[:, 0], TILE, by_keys=False)
            assert torch.equal(visited(plan, records[:, source], size, by_keys), want)
    assert check_segments(own, asked) > 0


def test_each_stream_has_plans_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.tensor([50], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    weighting = Weighting(whole, whole, hstu_intervals(whole, lengths, lengths * 0), 1.0, 1.0)
    q = torch.zeros(50, 1, 32)
    plans = []
    for stream in (7, 8, 7, 8):
        for module in (plan_module, walk_module):
            monkeypatch.setattr(module, "stream_of", lambda x, stream=stream: stream)
        plans.append(walk_module.Walk(q, [Source((q, q), weighting)]).plan)
    first, second = plans[:2]
    assert first is not second
    assert plans[2:] == [first, second]


def test_heavy_tiles_come_first() -> None:
    """By more than a factor of two, always: of about equal ones the order of rows may count."""
    lengths = torch.tensor([100, 600, 0, 300], dtype=torch.int32, device=DEVICE)
    whole = Jagged.whole(lengths)
    intervals = hstu_intervals(whole, lengths, torch.zeros_like(lengths))
    plan = Plan.build(whole, whole, intervals, TILE, PART, PART)
    for records in (plan.query_tiles(), plan.query_parts(), plan.key_tiles()):
        work = torch.tensor(
            [
                sum(max(end - start, 0) for kind in runs_of(record) for start, end in kind)
                for record in records[:, 0].tolist()
            ]
        )
        assert work.max() > 8 * work[work > 0].min()
        still_to_come = work.flip(0).cummax(0).values.flip(0)
        assert (2 * work.clamp(min=64) >= still_to_come).all()


def test_tiles_of_a_sequence_come_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for light ones, where tiles are many: from the last sequence and row on, or from the
    first."""
    monkeypatch.setattr("kernels.triton.plan.order_bits", lambda num_rows: 0)
    monkeypatch.setattr(tiles, "LEAST", 1000)  # no segments
    lengths = torch.tensor([640, 0, 500, 70], dtype=torch.int32, device=DEVICE)
    whole = Jagged.whole(lengths)
    intervals = hstu_intervals(whole, lengths, torch.zeros_like(lengths))
    plan = Plan.build(whole, whole, intervals, TILE, PART, TILE)
    ascending = plan.key_tiles_first_first
    for records, step in (plan.query_tiles(), -1), (plan.key_tiles(), -1), (ascending, 1):
        rows = [row for row, end in records[:, 0, :2].tolist() if row < end]
        work = [
            sum(-(-max(end - start, 0) // PART) for kind in runs_of(record) for start, end in kind)
            for record in records[: len(rows), 0].tolist()
        ]
        least = 1 << (-(-max(work) // 4)).bit_length() - 1
        heavy = sum(x >= least for x in work)
        assert len(rows) / 2 < heavy < len(rows)
        assert rows[:heavy] == sorted(rows[:heavy])[::step]
        assert min(work[:heavy]) >= least > max(work[heavy:])
        assert all(2 * x > max(work[i:]) for i, x in enumerate(work) if i >= heavy and x)


def test_stripes_are_masked_at_the_diagonal_alone() -> None:
    """A causal shard's steps of a ring: what lies below the diagonal is full, also where the short
    tile in front breaks a run."""
    lengths = torch.tensor([TILE * 8 + PART], dtype=torch.int32)
    whole = Jagged.whole(lengths)
    stripe = whole.positions // TILE % 4
    outer = (stripe == 0) | (stripe == 3)
    for keys in (outer, ~outer):
        parts = [part_of(whole, keep) for keep in (outer, keys)]
        intervals = hstu_intervals(parts[0], lengths, torch.zeros_like(lengths))
        plan = check(*parts, intervals)
        for records in (plan.query_parts(), plan.key_tiles()):
            masked = [runs_of(record)[1] for record in records[:, 0].tolist()]
            blocks = [sum(-(-max(end - start, 0) // PART) for start, end in x) for x in masked]
            assert max(blocks) <= 1
