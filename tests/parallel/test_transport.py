"""Exchanges over both transports on two GPUs, against one GPU; also buffers that grow."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from kernels.attention import hstu_attention
from kernels.jagged import Jagged
from kernels.masks import hstu_intervals
from parallel.attention import context_parallel_attention
from parallel.batch import JaggedBatch
from parallel.copy_engines import CopyEngines
from parallel.layout import ZigzagLayout
from parallel.links import Links
from parallel.mesh import build_mesh, local_device
from parallel.send_receive import SendReceive
from parallel.shard import shard_batch
from parallel.visibility import Visibility

BATCHES = [[700, 3, 0, 1], [2000, 513, 40], [5, 9]]  # the second outgrows the first one's buffers
FACTORS = dict(alpha=0.1, scale=0.01)


def tensors(rows: int, dim: int, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(4, rows, 2, dim, generator=generator)
    return list(x.to(device, torch.bfloat16))


def attend(
    transport: str, exchange: str, keep_whole: bool, dim: int = 64
) -> list[list[torch.Tensor]]:
    """Relative errors of out, dq, dk, dv on this rank, each batch twice.

    transport: "nodes" for two nodes of one GPU each.
    """
    device = local_device()
    with patch.dict(os.environ, LOCAL_WORLD_SIZE="1" if transport == "nodes" else "2"):
        mesh = build_mesh(dp=1, cp=2, device=device)
    made = {"copy": CopyEngines, "send": SendReceive}.get(transport)
    if made:
        group = mesh.links.within.group
        mesh = replace(mesh, links=Links(made(group, device, mesh.watchdog)))
    errors = []
    for lengths in [batch for batch in BATCHES for _ in range(2)]:
        mine = torch.tensor(lengths[mesh.rank :: 2], dtype=torch.int32)
        ids = {"id": torch.zeros(int(mine.sum()), dtype=torch.int64)}
        batch = JaggedBatch(mine, (mine > 3).int(), ids)
        shard = shard_batch(batch, ZigzagLayout(2), mesh, keep_whole=keep_whole)
        window = 300 if exchange == "halo" else 0
        mask = partial(hstu_intervals, num_contextual=2, window=window)
        seen = Visibility(shard, mask, num_contextual=2)
        *qkv, dout = tensors(int(shard.lengths.sum()), dim, device)
        own = shard.whole_rows[shard.rank]
        mine_qkv = [x[own].requires_grad_() for x in qkv]
        out = context_parallel_attention(*mine_qkv, seen=seen, exchange=exchange, **FACTORS)
        got = [out, *torch.autograd.grad(out, mine_qkv, dout[own])]

        rows = Jagged.whole(shard.device_lengths, int(shard.lengths.sum()))
        intervals = mask(rows, shard.device_lengths, shard.device_num_targets)
        whole = [x.float().requires_grad_() for x in qkv]
        out = hstu_attention(*whole, queries=rows, keys=rows, intervals=intervals, **FACTORS)
        want = [out, *torch.autograd.grad(out, whole, dout.float())]
        errors.append(
            [((g - w[own]).norm() / w[own].norm()).item() for g, w in zip(got, want, strict=True)]
        )
    torch.cuda.synchronize()
    dist.barrier(mesh.cp_group)  # the other rank may still read what this one has to send
    return errors


def shares_no_group() -> bool:
    mesh = build_mesh(dp=1, cp=2, device=torch.device("cpu"))
    return mesh.links.within.group is not mesh.cp_group


def test_messages_and_batches_share_no_group(run_in_world) -> None:
    """The next batch is made in another thread: see `build_mesh`."""
    assert all(run_in_world(2, shares_no_group))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("transport", "exchange", "keep_whole"),
    [
        ("copy", "ring", False),
        ("copy", "ring", True),
        ("nodes", "ring", False),
        ("nodes", "ring", True),
        ("send", "ring", False),
        ("send", "all_gather", False),
        ("copy", "halo", False),
        ("copy", "halo", True),
        ("nodes", "halo", False),
        ("send", "halo", True),
    ],
)
def test_two_gpus_equal_one(run_in_world, transport: str, exchange: str, keep_whole: bool) -> None:
    for errors in run_in_world(2, attend, transport, exchange, keep_whole, gpus=True):
        assert all(error < 4e-3 for batch in errors for error in batch), errors


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("exchange", ["ring", "halo"])
def test_two_gpus_with_wide_heads(run_in_world, exchange: str) -> None:
    """Whose forward and backward, on Hopper, plan differently."""
    for errors in run_in_world(2, attend, "copy", exchange, False, 256, gpus=True):
        assert all(error < 4e-3 for batch in errors for error in batch), errors


def attend_in_turn(keep_whole: bool) -> list[list[torch.Tensor]]:
    from kernels.triton import launch

    with patch.object(launch, "MANY", 1), patch.object(launch, "MANY_EACH", 0):
        return attend("copy", "ring", keep_whole, dim=128)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("keep_whole", [False, True])
def test_two_gpus_visit_sources_in_turn(run_in_world, keep_whole: bool) -> None:
    """As they do where there are many rows."""
    for errors in run_in_world(2, attend_in_turn, keep_whole, gpus=True):
        assert all(error < 4e-3 for batch in errors for error in batch), errors


HANG = """
import time
import torch
from parallel.mesh import build_mesh, local_device

device = local_device()
mesh = build_mesh(dp=1, cp=2, device=device, timeout_s=4)
mesh.watchdog.where = "step 12"
transport = mesh.links.within
for step in range(2):
    message = transport.outbox("keys", 1024, torch.uint8)
    if step == 1 and mesh.rank == 1:
        time.sleep(1000)
    incoming = transport.inbox("keys", 1024, 1024, torch.uint8)
    transport.swap("keys", (message,), 1 - mesh.rank, incoming, 1 - mesh.rank).wait()
    torch.cuda.synchronize()
"""


HANG_IN_RING = """
import time
import torch
from kernels.masks import hstu_intervals
from parallel.attention import context_parallel_attention
from parallel.batch import JaggedBatch
from parallel.layout import ZigzagLayout
from parallel.mesh import build_mesh, local_device
from parallel.shard import shard_batch
from parallel.visibility import Visibility

device = local_device()
mesh = build_mesh(dp=1, cp=2, device=device, timeout_s=4)
mesh.watchdog.where = "step 12"
lengths = torch.tensor([4096], dtype=torch.int32)
batch = JaggedBatch(lengths, torch.zeros_like(lengths), {"id": torch.zeros(4096).long()})
shard = shard_batch(batch, ZigzagLayout(2), mesh)
seen = Visibility(shard, hstu_intervals)
q = torch.randn(shard.rows.num_rows, 2, 64, device=device, dtype=torch.bfloat16)
for step in range(2):
    if step == 1 and mesh.rank == 1:
        time.sleep(1000)
    context_parallel_attention(q, q, q, seen=seen, alpha=0.1, scale=0.1, exchange="ring")
    torch.cuda.synchronize()
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("code", "name"), [(HANG, "keys"), (HANG_IN_RING, "keys and values")])
def test_a_hanging_rank_ends_the_job_and_is_named(tmp_path: Path, code: str, name: str) -> None:
    script = tmp_path / "hang.py"
    script.write_text(code)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([".", *sys.path]))
    run = subprocess.run(
        [sys.executable, *launch], capture_output=True, text=True, timeout=120, env=environment
    )
    assert run.returncode
    waited = f"rank 0: step 12: {name} to rank 1, from rank 1: nothing for 4 s"
    assert waited in run.stderr, run.stderr
