"""Sharded tables against plain ones: lookups, first values, gradients of unevenly spread ids."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.distributed.planner.types import ParameterConstraints

from kernels.row_sums import sum_rows
from parallel.embedding import plan
from parallel.embedding.lookup import _each_once, route
from parallel.embedding.tables import Table, embedding_collection, shard_tables
from parallel.mesh import build_mesh

TABLES = [Table("item", 9000, 8, ("item", "label")), Table("action", 5, 8, ("action",))]
CPU = torch.device("cpu")
EPS = 1e-8


def ids_of(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    count = [3000, 0, 7, 1][rank]
    draw = lambda high, n: torch.randint(high, (n,), generator=generator)  # noqa: E731
    return {"item": draw(9000, count), "label": draw(9, count + 2), "action": draw(5, count)}


def look_up(
    tables, rank: int, message_dtype: torch.dtype | None = None, early: bool = False
) -> dict[str, torch.Tensor]:
    """Each feature, in the order of its ids. early: gradients begin their way before they are asked
    for."""
    ids = ids_of(rank)
    found = route(tables, ids, CPU, message_dtype).look_up()
    for i, begin in found.on_gradient.items() if early else ():
        found.rows[i].register_hook(begin)
    sums = [found.alone(name) for name in ids]
    return dict(zip(ids, sum_rows(found.rows, sums), strict=True))


def full_tables(sharded) -> dict[str, torch.Tensor]:
    """Whole weights, gathered on rank 0."""
    whole = {}
    for name, weight in sharded.state_dict().items():
        out = torch.empty(weight.size()) if torch.distributed.get_rank() == 0 else None
        weight.gather(0, out)
        whole[name] = out
    return whole


def train_with(kinds: list[str], size: int, optimizer: str):
    """kinds: of sharding, of the items and of the actions."""

    def constraints(pooling_factors: list[float], **others: Any) -> ParameterConstraints:
        kind = kinds[0] if len(pooling_factors) == 2 else kinds[1]  # one for each feature
        others["sharding_types"] = [kind]
        return ParameterConstraints(pooling_factors=pooling_factors, **others)

    with patch.object(plan, "ParameterConstraints", constraints):
        return train_once(size, optimizer)


def train_once(
    size: int,
    optimizer: str = "sgd",
    message_dtype: torch.dtype | None = None,
    early: bool = False,
):
    mesh = build_mesh(dp=size, cp=1, device=CPU)
    sharded = shard_tables(
        TABLES,
        mesh,
        tokens_per_rank=3000,
        optimizer=optimizer,
        lr=0.5,
        eps=EPS,
        seed=3,
    )
    before = full_tables(sharded)
    found = look_up(sharded, mesh.rank, message_dtype, early)
    sum((i + 1) * (x**2).sum() for i, x in enumerate(found.values())).backward()
    return before, {k: x.detach() for k, x in found.items()}, full_tables(sharded)


@pytest.mark.parametrize(
    "kinds", ["row_wise row_wise", "row_wise table_wise", "table_wise table_wise"]
)
@pytest.mark.parametrize(
    ("size", "optimizer"), [(1, "sgd"), (2, "sgd"), (2, "rowwise_adagrad"), (4, "sgd")]
)
def test_equals_plain_tables(run_in_world, size: int, optimizer: str, kinds: str) -> None:
    results = run_in_world(size, train_with, kinds.split(), size, optimizer)
    before, _, after = results[0]
    plain = embedding_collection(TABLES, "cpu")
    plain.load_state_dict(before)
    loss = 0.0
    for rank in range(size):
        found = look_up(plain, rank)
        for key, x in found.items():
            torch.testing.assert_close(results[rank][1][key], x.detach())
        loss += sum((i + 1) * (x**2).sum() for i, x in enumerate(found.values()))
    (loss / size).backward()  # gradients are averaged over ranks
    for name, parameter in plain.named_parameters():
        step = parameter.grad
        if optimizer == "rowwise_adagrad":
            step = step / (step.square().mean(1, keepdim=True).sqrt() + EPS)
        want = parameter.detach() - 0.5 * step
        torch.testing.assert_close(after[name], want, rtol=1e-5, atol=1e-7)


def test_messages_in_half_the_bytes(run_in_world) -> None:
    (_, found, exact), (_, rounded, after) = (
        run_in_world(2, train_once, 2, "sgd", dtype)[0] for dtype in (None, torch.bfloat16)
    )
    for name, x in found.items():
        assert torch.equal(rounded[name], x.bfloat16().float())
    for name, x in exact.items():
        torch.testing.assert_close(after[name], x, rtol=1e-2, atol=1e-3)
        assert not torch.equal(after[name], x)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_that_begin_early(run_in_world, dtype: torch.dtype | None) -> None:
    (_, _, want), (_, _, got) = (
        run_in_world(2, train_once, 2, "sgd", dtype, early)[0] for early in (False, True)
    )
    for name, x in want.items():
        assert torch.equal(got[name], x)


@given(st.lists(st.lists(st.integers(0, 5), max_size=8), min_size=4, max_size=4))
def test_each_id_of_a_table_is_sent_once(ids: list[list[int]]) -> None:
    features = ["item", "action", "label", "user"]
    table_of = dict(item="items", label="items", action="actions", user="users")
    asked = {
        name: torch.tensor(x, dtype=torch.int64) for name, x in zip(features, ids, strict=True)
    }
    sent, where = _each_once(asked, table_of)
    assert list(sent) == features
    for names in (["item", "label"], ["action"], ["user"]):
        every = torch.cat([sent[name] for name in names])
        assert every.tolist() == sorted({i for name in names for i in asked[name].tolist()})
    rows = torch.cat([sent[name] for name in features])
    assert torch.equal(rows[where], torch.cat([asked[name] for name in features]))


def allowed_kinds(size: int) -> list[list[str]]:
    rows = plan.MANY_ROWS * size
    mine = [Table(f"{n}", n, 8, (f"{n}",)) for n in (rows, rows - 1, 100)]
    mesh = build_mesh(dp=size, cp=1, device=CPU)
    allowed = []

    def constraints(**given: Any) -> ParameterConstraints:
        allowed.append(given["sharding_types"])
        return ParameterConstraints(**given)

    small = patch.object(plan, "SMALL_BYTES", 100 * 8 * 4 * size)
    with patch.object(plan, "ParameterConstraints", constraints), small:
        shard_tables(mine, mesh, tokens_per_rank=100, optimizer="sgd", lr=0.1, eps=0, seed=0)
    return allowed


def test_large_tables_are_cut_in_rows_and_small_ones_whole(run_in_world) -> None:
    large, between, small = run_in_world(2, allowed_kinds, 2)[0]
    assert (large, between, small) == (["row_wise"], ["table_wise", "row_wise"], ["table_wise"])


def first_values(size: int):
    return train_once(size)[0]


def test_first_values_do_not_depend_on_the_plan(run_in_world) -> None:
    one, four = (run_in_world(size, first_values, size)[0] for size in (1, 4))
    for name in one:
        assert torch.equal(one[name], four[name])
        assert 0.015 < float(one[name].std()) < 0.025
