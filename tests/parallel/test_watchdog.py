"""A rank that waits too long ends, and says where."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from parallel.mesh import build_mesh
from parallel.watchdog import Watchdog

CPU = torch.device("cpu")
HANG = """
import time
from datetime import timedelta
from parallel.watchdog import Watchdog

class Event:
    def __init__(self, done): self.done = done
    def query(self): return self.done

watchdog = Watchdog(3, timedelta(seconds=0.5))
watchdog.step = 7
watchdog.watch("keys and values from rank 1", Event(True))
watchdog.watch("keys and values from rank 2", Event(False))
time.sleep(20)
"""


def test_a_hanging_device_ends_the_process() -> None:
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "rank 3: step 7: keys and values from rank 2: nothing for" in run.stderr
    assert time.monotonic() - start < 15


def test_progress_is_not_a_hang() -> None:
    class Event:
        def __init__(self) -> None:
            self.until = time.monotonic() + 0.8

        def query(self) -> bool:
            return time.monotonic() > self.until

    watchdog = Watchdog(0, timedelta(seconds=1.0))
    for _ in range(3):
        watchdog.watch("slow, but under way", Event())
        time.sleep(0.8)  # or this process would be gone


def _late(seconds: float) -> Any:
    """Rank 1 never sends; rank 0 says what it waited for."""
    mesh = build_mesh(dp=1, cp=2, device=CPU, timeout_s=2)
    mesh.watchdog.step = 12
    error = None
    if dist.get_rank() == 0:
        transport = mesh.links.within
        message = transport.outbox("keys and values", 4, 4, torch.float32)
        arrival = transport.swap(
            "keys and values", message, None, transport.inbox("in", 4, torch.float32), 1
        )
        try:
            arrival.wait()
        except RuntimeError as raised:
            error = str(raised)
    time.sleep(seconds)
    return error


def test_a_message_that_never_comes_is_named(run_in_world: Any) -> None:
    error, _ = run_in_world(2, _late, 3.0)
    assert "rank 0: step 12: keys and values from rank 1 of the cp group" in error
