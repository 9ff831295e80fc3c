"""Context-parallel attention, every exchange, against the naive reference of one process."""

from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from kernels.attention import hstu_attention
from kernels.jagged import Jagged
from kernels.masks import hstu_intervals, semi_local_intervals
from parallel.attention import EXCHANGES, context_parallel_attention
from parallel.batch import JaggedBatch
from parallel.exchange import ring
from parallel.layout import LAYOUTS
from parallel.mesh import Mesh, build_mesh
from parallel.shard import Shard, shard_batch
from parallel.transport import Transport
from parallel.visibility import Visibility
from tests.kernels.cases import Case

CPU = torch.device("cpu")
CASES = {
    "causal": Case(torch.tensor([0, 1, 2, 3, 900, 5, 8]), torch.zeros(7, dtype=torch.int32), 0),
    "targets": Case(
        torch.tensor([9, 0, 4, 90, 33]), torch.tensor([4, 0, 1, 9, 30], dtype=torch.int32), 3
    ),
    "window": Case(
        torch.tensor([150, 3, 64]),
        torch.tensor([5, 0, 1], dtype=torch.int32),
        2,
        window=7,
        full_suffix=9,
    ),
    "plain_window": Case(
        torch.tensor([150, 3, 64]), torch.zeros(3, dtype=torch.int32), 0, window=7
    ),
    "semi_local": Case(
        torch.tensor([150, 3, 64]), torch.tensor([5, 0, 1], dtype=torch.int32), 2, local=9, prefix=4
    ),
    "ends_behind_the_keys": Case(
        torch.tensor([150, 3, 64]), torch.zeros(3, dtype=torch.int32), 0, window=7, behind=9
    ),
    "alike": Case(torch.full((6,), 20), torch.zeros(6, dtype=torch.int32), 0),
    "nothing": Case(torch.tensor([0, 0]), torch.zeros(2, dtype=torch.int32), 0),
    "one_token": Case(torch.tensor([1]), torch.zeros(1, dtype=torch.int32), 0),
}
CASES = {
    name: Case(**{**vars(case), "lengths": case.lengths.int()}) for name, case in CASES.items()
}
SCALES = dict(alpha=0.6, scale=0.2)
HEADS = 6  # so that ulysses can share them


def qkvd(rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [
        torch.randn(rows, HEADS, d, generator=generator, dtype=torch.float64) for d in (4, 4, 3, 3)
    ]


def attend(cp: int, layout: str, exchange: str, name: str, keep_whole: bool = False):
    """This rank's rows of out, dq, dk, dv, and where they lie in the whole."""
    case = CASES[name]
    mesh = build_mesh(dp=1, cp=cp, device=CPU)
    mine = slice(mesh.rank, None, cp)  # samples are read by different ranks, in another order
    batch = JaggedBatch(
        case.lengths[mine],
        case.num_targets[mine],
        {"id": torch.zeros(int(case.lengths[mine].sum()), dtype=torch.int64)},
    )
    shard = shard_batch(batch, LAYOUTS[layout](cp), mesh, keep_whole=keep_whole)

    *qkv, dout = (x[shard.whole_rows[shard.rank]] for x in qkvd(int(shard.lengths.sum())))
    qkv = [x.requires_grad_() for x in qkv]
    out = context_parallel_attention(
        *qkv, seen=Visibility(shard, case.mask, case.num_contextual), exchange=exchange, **SCALES
    )
    gradients = torch.autograd.grad(out, qkv, dout)
    dist.barrier(mesh.cp_group)  # what this rank still sends is lost if its links go
    return (
        shard.lengths,
        shard.num_targets,
        shard.whole_rows[shard.rank],
        [out.detach(), *gradients],
    )


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(run_in_world, name: str, cp: int, layout: str, exchange: str) -> None:
    check_against_one_process(run_in_world(cp, attend, cp, layout, exchange, name), name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["window", "causal"])
def test_a_ring_passes_ranks_that_see_nothing(run_in_world, name: str, layout: str) -> None:
    """Contiguous parts under a window: a rank sees its neighbour's keys and no others'."""
    check_against_one_process(run_in_world(4, attend, 4, layout, "ring", name), name)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("name", ["causal", "targets", "semi_local", "alike", "nothing"])
def test_whole_sequences_beside_cut_ones(run_in_world, name: str, cp: int, exchange: str) -> None:
    results = run_in_world(cp, attend, cp, "zigzag", exchange, name, True)
    check_against_one_process(results, name)


def one_sequence(length: int, cp: int) -> tuple[Shard, Mesh]:
    """Of a batch that rank 0 reads, in contiguous parts."""
    mesh = build_mesh(dp=1, cp=cp, device=CPU)
    lengths = torch.tensor([length] if mesh.rank == 0 else [], dtype=torch.int32)
    ids = {"id": torch.zeros(int(lengths.sum()), dtype=torch.int64)}
    batch = JaggedBatch(lengths, torch.zeros_like(lengths), ids)
    return shard_batch(batch, LAYOUTS["contiguous"](cp), mesh), mesh


def halo_messages() -> tuple[list[tuple[torch.dtype, int]], list[float]]:
    """What a window has a rank send, forward and backward; errors of out and gradients."""
    shard, mesh = one_sequence(200, 2)
    seen, sent = Visibility(shard, partial(hstu_intervals, window=9)), []
    swap = Transport.swap

    def spy(transport, name, message, *ends):
        sent.append((message[0].dtype, sum(part.numel() for part in message)))
        return swap(transport, name, message, *ends)

    buffer = torch.randn(100, 3, HEADS, 4).bfloat16()  # q, k, v side by side, as layers make them
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        qkv = [x.requires_grad_() for x in buffer.to(dtype).unbind(1)]
        with patch.object(Transport, "swap", spy):
            out = context_parallel_attention(*qkv, seen=seen, exchange="halo", **SCALES)
            results.append([out, *torch.autograd.grad(out.sum(), qkv)])
    dist.barrier(mesh.cp_group)
    return sent[:2], [float((x - y).norm() / y.norm()) for x, y in zip(*results, strict=True)]


def test_a_halo_sends_rows_and_gradients_of_a_window_in_their_dtype(run_in_world) -> None:
    for rank, (sent, errors) in enumerate(run_in_world(2, halo_messages)):
        rows = 9 * HEADS * (4 + 4)  # the second half sees so many rows of the first
        assert sent == [(torch.bfloat16, rows * (1 - rank)), (torch.bfloat16, rows * rank)]
        assert max(errors) < 1e-2


def front_errors(cp: int, mask, rows: int, num_contextual: int = 0) -> list[float]:
    """Of out, dq, dk and dv of a sequence's first rows, in bfloat16."""
    shard, mesh = one_sequence(64 * cp, cp)
    seen = Visibility(shard, mask, num_contextual)
    torch.manual_seed(0)
    whole = torch.rand(4, 64 * cp, HEADS, 8).bfloat16()  # all positive: sums grow
    own = shard.whole_rows[shard.rank]
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        *qkv, dout = (x[own].to(dtype) for x in whole)
        qkv = [x.requires_grad_() for x in qkv]
        out = context_parallel_attention(*qkv, seen=seen, exchange="halo", **SCALES)
        results.append([out, *torch.autograd.grad(out, qkv, dout)])
    dist.barrier(mesh.cp_group)
    return [float((x - y)[:rows].norm() / y[:rows].norm()) for x, y in zip(*results, strict=True)]


def test_a_halo_sums_gradients_in_float32(run_in_world) -> None:
    """Each of seven messages is rounded, and their sum."""
    mask = partial(semi_local_intervals, local=2, prefix=16)
    assert max(run_in_world(8, front_errors, 8, mask, 16)[0][2:]) < 2.5e-3


def test_a_halo_sums_what_guests_find_in_float32(run_in_world) -> None:
    """What is found of a rank's own keys is rounded, and the sum."""
    mask = partial(hstu_intervals, window=2, num_contextual=32)
    assert max(run_in_world(4, front_errors, 4, mask, 32, 32)[0][:2]) < 2.1e-3


def attend_over_nodes(
    cp: int, per_node: int, layout: str, name: str, keep_whole: bool = False, exchange: str = "ring"
):
    with patch.dict(os.environ, LOCAL_WORLD_SIZE=str(per_node)):
        return attend(cp, layout, exchange, name, keep_whole)


@pytest.mark.parametrize(("cp", "per_node"), [(2, 1), (3, 1), (4, 2), (6, 2), (6, 3)])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("targets", "zigzag"),
        ("causal", "contiguous"),
        ("window", "contiguous"),
        ("one_token", "zigzag"),
    ],
)
def test_a_ring_of_rings(run_in_world, name: str, layout: str, cp: int, per_node: int) -> None:
    """Nodes of `per_node` ranks each."""
    results = run_in_world(cp, attend_over_nodes, cp, per_node, layout, name)
    check_against_one_process(results, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["targets", "plain_window", "semi_local"])
def test_a_halo_over_nodes(run_in_world, name: str, layout: str) -> None:
    results = run_in_world(4, attend_over_nodes, 4, 2, layout, name, False, "halo")
    check_against_one_process(results, name)


def attend_in_chunks(cp: int, name: str, message_bytes: int, keep_whole: bool):
    with patch.object(ring, "MESSAGE_BYTES", message_bytes):
        return attend(cp, "zigzag", "ring", name, keep_whole)


@pytest.mark.parametrize("keep_whole", [False, True])
@pytest.mark.parametrize("message_bytes", [4096, 512])
@pytest.mark.parametrize("name", ["targets", "causal", "nothing", "one_token"])
def test_a_ring_of_some_heads_and_rows_at_a_time(
    run_in_world, name: str, message_bytes: int, keep_whole: bool
) -> None:
    results = run_in_world(3, attend_in_chunks, 3, name, message_bytes, keep_whole)
    check_against_one_process(results, name)


def attend_over_nodes_in_chunks(cp: int, per_node: int, name: str, keep_whole: bool):
    with patch.object(ring, "MESSAGE_BYTES", 512):
        return attend_over_nodes(cp, per_node, "zigzag", name, keep_whole)


@pytest.mark.parametrize("keep_whole", [False, True])
@pytest.mark.parametrize("name", ["targets", "one_token"])
def test_a_ring_of_rings_of_some_rows_at_a_time(run_in_world, name: str, keep_whole: bool) -> None:
    results = run_in_world(4, attend_over_nodes_in_chunks, 4, 2, name, keep_whole)
    check_against_one_process(results, name)


def test_large_messages_are_cut_into_heads_then_rows() -> None:
    def chunks(rows: int, heads: int = 4) -> tuple[int, int]:
        k = v = torch.empty(0, heads, 128, dtype=torch.bfloat16)
        seen = SimpleNamespace(most_shared=rows, ring_pieces=None)
        return ring._chunks(k, v, seen)  # type: ignore[arg-type]

    assert chunks(0) == (4, 1)
    assert chunks(66_000) == (4, 1)  # 129 MiB
    assert chunks(120_000) == (2, 1)
    assert chunks(2_000_000) == (1, 7)  # 512 bytes a row and head
    assert chunks(150_000, heads=3) == (1, 1)  # two are a little too much: no rows are cut


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(v=torch.zeros(4, 2, 8)), "v: dtype"),  # a message has one
        (dict(k=torch.zeros(4, 1, 8, dtype=torch.bfloat16)), "k: 1 heads"),
        (dict(q=torch.zeros(8, 2, 8, dtype=torch.bfloat16)), "q: 8 rows, this rank's shard has 4"),
        (dict(scale=0.0), "scale: want a finite number, and not 0"),
        (dict(alpha=0.0), "alpha"),
        (dict(exchange="fax"), "exchange"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], name: str) -> None:
    q = torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    seen = SimpleNamespace(shard=SimpleNamespace(rows=SimpleNamespace(num_rows=4)))
    arguments = dict(q=q, k=q, v=q, seen=seen, alpha=1.0, scale=1.0) | change
    with pytest.raises(ValueError, match=name):
        context_parallel_attention(**arguments)


def sum_of_out(exchange: str) -> list[torch.Tensor]:
    """Its gradients: autograd's is one number, expanded."""
    shard, mesh = one_sequence(40, 2)
    seen = Visibility(shard, hstu_intervals)
    *qkv, _ = (x[shard.whole_rows[shard.rank]].requires_grad_() for x in qkvd(40))
    out = context_parallel_attention(*qkv, seen=seen, exchange=exchange, **SCALES)
    ones = torch.ones_like(out)
    got, want = (
        torch.autograd.grad(x, qkv, dout, retain_graph=True)
        for x, dout in ((out.sum(), None), (out, ones))
    )
    dist.barrier(mesh.cp_group)
    return [*map(torch.dist, got, want)]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_an_expanded_gradient(run_in_world, exchange: str) -> None:
    assert run_in_world(2, sum_of_out, exchange) == [[0, 0, 0]] * 2


def check_against_one_process(results: list, name: str) -> None:
    """results: what `attend` returned on each rank."""
    lengths, num_targets = results[0][:2]
    case = Case(**{**vars(CASES[name]), "lengths": lengths, "num_targets": num_targets})
    whole = Jagged.whole(lengths)
    *qkv, dout = qkvd(whole.num_rows)
    qkv = [x.requires_grad_() for x in qkv]
    out = hstu_attention(
        *qkv,
        queries=whole,
        keys=whole,
        intervals=case.intervals(whole),
        backend="naive",
        **SCALES,
    )
    want = [out, *torch.autograd.grad(out, qkv, dout)]
    for i, expected in enumerate(want):
        got = torch.full_like(expected, torch.nan)
        for *_, index, tensors in results:
            got[index] = tensors[i]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
