"""shard_batch against a slice of the concatenated batch."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from parallel import shard as shard_module
from parallel.batch import JaggedBatch
from parallel.layout import LAYOUTS
from parallel.mesh import build_mesh
from parallel.shard import shard_batch

CPU = torch.device("cpu")


def make_batch(lengths: list[int], first: int) -> JaggedBatch:
    total = sum(lengths)
    ids = torch.arange(total) + 1000 * first
    targets = [min(n, 2) for n in lengths]
    return JaggedBatch(
        lengths=torch.tensor(lengths, dtype=torch.int32),
        num_targets=torch.tensor(targets, dtype=torch.int32),
        tokens={"id": ids, "time": ids * 2**33 - 5},
    )


def shard_and_report(dp: int, cp: int, layout: str, lengths_by_rank: list[list[int]]):
    mesh = build_mesh(dp=dp, cp=cp, device=CPU)
    batch = make_batch(lengths_by_rank[mesh.rank], mesh.rank)
    shard = shard_batch(batch, LAYOUTS[layout](cp), mesh)
    return shard.lengths, shard.num_targets, shard.rows, shard.tokens, shard.whole_rows[shard.rank]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dp", "cp"), [(1, 2), (1, 3), (2, 2)])
def test_slices_of_all_samples_of_the_group(run_in_world, dp: int, cp: int, layout: str) -> None:
    by_rank = [[5, 0, 301, 2], [], [1, 1, 17], [4]][: dp * cp]
    results = run_in_world(dp * cp, shard_and_report, dp, cp, layout, by_rank)
    for group in range(dp):
        ranks = range(group * cp, (group + 1) * cp)
        lengths = [n for r in ranks for n in by_rank[r]]
        whole = {
            name: torch.cat([make_batch(by_rank[r], r).tokens[name] for r in ranks])
            for name in ("id", "time")
        }
        for r in ranks:
            got_lengths, targets, rows, tokens, index = results[r]
            assert got_lengths.tolist() == lengths
            assert targets.tolist() == [min(n, 2) for n in lengths]
            assert rows.lengths().sum() == index.numel()
            for name, x in tokens.items():
                assert torch.equal(x, whole[name][index])


def shard_balanced(dp: int, cp: int, lengths_by_rank: list[list[int]], keep_whole: bool = False):
    mesh = build_mesh(dp=dp, cp=cp, device=CPU)
    batch = make_batch(lengths_by_rank[mesh.rank], mesh.rank)
    batch = replace(batch, costs=batch.lengths.double() ** 2)
    shard = shard_batch(batch, LAYOUTS["zigzag"](cp), mesh, keep_whole=keep_whole)
    return shard.lengths, shard.rows, shard.tokens


@pytest.mark.parametrize("keep_whole", [False, True])
@pytest.mark.parametrize(("dp", "cp"), [(1, 1), (2, 1), (3, 1), (2, 2), (1, 3)])
def test_balanced_groups_hold_every_token_once(
    run_in_world, dp: int, cp: int, keep_whole: bool
) -> None:
    by_rank = [[40, 0, 30, 2], [], [1, 1, 17], [4]][: dp * cp]
    results = run_in_world(dp * cp, shard_balanced, dp, cp, by_rank, keep_whole)
    want = torch.cat([make_batch(lengths, r).tokens["id"] for r, lengths in enumerate(by_rank)])
    got = torch.cat([tokens["id"] for _, _, tokens in results])
    assert torch.equal(got.sort().values, want.sort().values)
    for lengths, rows, tokens in results:
        # Ids count up within a sequence, so id - position names the sequence a row is from.
        origin = tokens["id"] - rows.positions
        assert len(origin.unique()) == int((rows.lengths() > 0).sum())
        assert bool((rows.positions < lengths[rows.sequence_ids()]).all())
        assert bool((tokens["time"] == tokens["id"] * 2**33 - 5).all())
    if dp > 1:
        groups = [results[g * cp][0].double().square().sum() for g in range(dp)]
        total = sum(n * n for lengths in by_rank for n in lengths)
        assert max(groups) <= max(total / dp, 40**2) + 17**2


def shard_whole(cp: int, lengths_by_rank: list[list[int]]):
    mesh = build_mesh(dp=1, cp=cp, device=CPU)
    batch = make_batch(lengths_by_rank[mesh.rank], mesh.rank)
    shard = shard_batch(batch, LAYOUTS["zigzag"](cp), mesh, keep_whole=True)
    return shard.lengths, shard.rows, shard.num_shared


def test_cut_sequences_come_first(run_in_world) -> None:
    by_rank = [[500, 500, 50], [50, 3000, 2500]]
    for lengths, rows, num_shared in run_in_world(2, shard_whole, 2, by_rank):
        assert lengths.tolist() == [3000, 2500, 500, 500, 50, 50]
        assert num_shared == [2750, 2750]
        first, second, *others = rows.lengths().tolist()
        assert (first, second) == (1500, 1250)
        assert sorted(others) == [0, 0, 50, 500]


def shard_in_room(room: int, dp: int, cp: int, lengths_by_rank: list[list[int]]):
    with patch.object(shard_module, "ROOM", room):
        sliced = shard_and_report(dp, cp, "zigzag", lengths_by_rank)
        balanced = shard_balanced(dp, cp, lengths_by_rank)
    return *sliced[:2], *sliced[3].values(), balanced[0], *balanced[2].values()


def test_sizes_go_round_in_more_messages_if_need_be(run_in_world) -> None:
    by_rank = [[40, 0, 30, 2], [], [1, 1, 17], [4]]
    roomy, tight = (run_in_world(4, shard_in_room, room, 2, 2, by_rank) for room in (4, 1))
    for want, got in zip(roomy, tight, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def sizes_of_all(dp: int, cp: int, lengths_by_rank: list[list[int]]):
    mesh = build_mesh(dp=dp, cp=cp, device=CPU)
    shard = shard_batch(make_batch(lengths_by_rank[mesh.rank], 0), LAYOUTS["zigzag"](cp), mesh)
    return shard.of_all or (shard.lengths, shard.num_targets)


@pytest.mark.parametrize(("dp", "cp"), [(1, 1), (3, 1), (2, 2)])
def test_every_rank_knows_the_sizes_of_all(run_in_world, dp: int, cp: int) -> None:
    by_rank = [[40, 0, 30, 2], [], [1, 1, 17], [4]][: dp * cp]
    want = [n for lengths in by_rank for n in lengths]
    for lengths, num_targets in run_in_world(dp * cp, sizes_of_all, dp, cp, by_rank):
        assert lengths.tolist() == want
        assert num_targets.tolist() == [min(n, 2) for n in want]


def shard_unlike(which: str) -> str:
    """What is said where rank 1's batch has something that the others' have not."""
    mesh = build_mesh(dp=3, cp=1, device=CPU)
    batch = make_batch([3, 1], mesh.rank)
    if mesh.rank == 1:
        more = {"more": batch.tokens["id"]}
        costs = torch.ones(2, dtype=torch.float64)
        batch = dict(
            more=replace(batch, tokens=batch.tokens | more),
            other=replace(batch, tokens={"id": batch.tokens["id"]} | more),
            costs=replace(batch, costs=costs),
        )[which]
    try:
        shard_batch(batch, LAYOUTS["zigzag"](1), mesh)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("which", ["more", "other", "costs"])
def test_batches_must_be_alike(run_in_world, which: str) -> None:
    assert all("those of [1] hold others" in said for said in run_in_world(3, shard_unlike, which))


def test_one_process_needs_no_group() -> None:
    batch = make_batch([3, 0, 4], 0)
    shard = shard_batch(batch, LAYOUTS["zigzag"](1), None)
    assert torch.equal(shard.tokens["time"], batch.tokens["time"])
    assert shard.rows.positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert shard.device_rows.max_length == shard.whole.max_length == 4


def test_errors() -> None:
    two, none = torch.tensor([2], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    with pytest.raises(ValueError, match="lengths: want int32"):
        JaggedBatch(two.long(), none, {})
    with pytest.raises(ValueError, match="tokens\\['id'\\]"):
        JaggedBatch(two, none, {"id": torch.zeros(3, dtype=torch.int64)})
    ids = {"id": torch.zeros(2, dtype=torch.int64)}
    for targets in (two + 1, none - 1):
        with pytest.raises(ValueError, match="num_targets: a sequence"):
            JaggedBatch(two, targets, ids)
    with pytest.raises(ValueError, match="costs: want shape"):
        JaggedBatch(two, none, ids, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="cp_size=2"):
        shard_batch(make_batch([1], 0), LAYOUTS["zigzag"](2), None)
