"""Idle and exposed shares, of traces made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.communication import BEGIN, shares_of_trace


def trace(*on_gpu: tuple[str, float, float, float]) -> list[dict[str, Any]]:
    """Name, end of the call that enqueued it, start and end, after a `BEGIN` that ends at 100."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name"}]
    for number, (name, enqueued, start, end) in enumerate([(BEGIN, 5, 90, 100), *on_gpu]):
        args = {"correlation": number}
        launch = dict(name="launch", cat="cuda_runtime", ts=enqueued - 3, dur=3)
        events.append(dict(ph="X", args=args, **launch))
        kind = "gpu_memcpy" if "Memcpy" in name else "kernel"
        events.append(dict(ph="X", args=args, name=name, cat=kind, ts=start, dur=end - start))
    return events


def test_shares_by_hand() -> None:
    events = trace(
        ("before", 2, 50, 90),
        ("first", 10, 100, 150),
        ("Memcpy PtoP", 20, 150, 175),
        ("waited for the copy", 30, 180, 200),  # 30 idle, all of it exposed
        ("ncclDevKernel_AllReduce", 40, 200, 300),  # 100 idle: nothing comes after it
    )
    assert shares_of_trace(events) == (pytest.approx(130 / 200), pytest.approx(30 / 200))


@pytest.mark.parametrize(
    ("enqueued", "gap", "exposed"),
    [
        (10, 40, 40),
        (10, 7, 0),  # as between any two kernels
        (185, 40, 0),  # the host was late: 5 after it, an ordinary gap
        (160, 40, 30),  # late too, but then it waited
    ],
)
def test_what_is_exposed_of_a_gap(enqueued: float, gap: float, exposed: float) -> None:
    events = trace(("first", 8, 100, 150), ("second", enqueued, 150 + gap, 200 + gap))
    length = 100 + gap
    assert shares_of_trace(events) == (
        pytest.approx(gap / length),
        pytest.approx(exposed / length),
    )
