"""A rank that waits too long ends, and says where."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import build_mesh
from parallel.watchdog import Watchdog

CPU = torch.device("cpu")
START = """
import time
from datetime import timedelta
import torch
from parallel.watchdog import Watchdog

class Event:
    def __init__(self, seconds): self.end = time.monotonic() + seconds
    def query(self): return time.monotonic() > self.end

watchdog = Watchdog(3, timedelta(seconds=1.0), torch.device("cuda", 0))
"""
HANG = """
with watchdog.doing("step 7"):
    watchdog.watch("keys and values from rank 1", Event(0))
    watchdog.watch("keys and values from rank 2", Event(1e9))
time.sleep(1e9)
"""
SLOW = """
for k in range(1, 5):
    watchdog.watch("slow, but under way", Event(0.7 * k))
time.sleep(3.5)
"""
FAIL = """
with watchdog.doing("batch of step 8", beside=True):
    raise RuntimeError("connection reset")
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START + script]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_hanging_device_ends_the_process() -> None:
    ended = run(HANG)
    assert ended.returncode == 1
    assert "rank 3: step 7: keys and values from rank 2: nothing for 1 s" in ended.stderr


def test_progress_is_not_a_hang() -> None:
    ended = run(SLOW)
    assert ended.returncode == 0, ended.stderr


def test_an_error_ends_a_process_whose_device_may_wait() -> None:
    ended = run(FAIL)
    assert ended.returncode == 1
    assert "rank 3: batch of step 8: connection reset. Ending the job." in ended.stderr
    assert "Traceback" in ended.stderr


def _late() -> Any:
    """Rank 1 never sends; rank 0 says what it waited for."""
    mesh = build_mesh(dp=1, cp=2, device=CPU, timeout_s=6)
    errors = []
    if dist.get_rank() == 0:
        transport = mesh.links.within
        message = transport.outbox("keys and values", 4, torch.float32)
        incoming = transport.inbox("keys and values", 4, 4, torch.float32)
        arrival = transport.swap("keys and values", (message,), None, incoming, 1)
        with pytest.raises(RuntimeError) as raised, mesh.watchdog.doing("step 12"):
            arrival.wait()
        errors.append(str(raised.value))
        with pytest.raises(RuntimeError) as raised, mesh.watchdog.doing("evaluation"):
            dist.all_reduce(torch.zeros(1), group=mesh.cp_group)
        errors.append(str(raised.value))
    return errors


def test_what_never_comes_is_named(run_in_world: Any) -> None:
    (message, collective), _ = run_in_world(2, _late)
    assert message.startswith("rank 0: step 12: keys and values from rank 1: ")
    assert collective.startswith("rank 0: evaluation: ")


def test_a_timeout_on_a_cpu_names_the_option() -> None:
    watchdog = Watchdog(3, timedelta(seconds=9), CPU)
    want = r"rank 3: step 7: ids: nothing for 9 s \(parallel.timeout_s\); .*: pair.cc: Timed out"
    with (
        pytest.raises(RuntimeError, match=want),
        watchdog.doing("step 7"),
        watchdog.operation("ids"),
    ):
        raise RuntimeError("pair.cc: Timed out waiting 9000ms for recv operation to complete")
