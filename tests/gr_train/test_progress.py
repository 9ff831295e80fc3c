"""What a run says: durations, and who failed while losses were summed."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from gr_train.meter import Meter
from gr_train.progress import Progress, _duration
from parallel.watchdog import Watchdog

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(59, "59s"), (61, "1m01s"), (3599.6, "1h00m"), (90_000, "25h00m")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert _duration(seconds) == shown


def test_samples_are_a_whole_number(tmp_path, capsys) -> None:
    Progress(tmp_path, 10, 0).evaluation(5, {"MRR": 0.5, "samples": 1234.0})
    assert capsys.readouterr().out == "evaluation after step 5: MRR 0.5000  samples 1,234\n"


def test_a_sum_of_losses_that_never_comes_is_named(monkeypatch) -> None:
    def timed_out(_: object) -> None:
        raise RuntimeError("Timed out waiting 9000ms for recv operation to complete")

    monkeypatch.setattr("torch.distributed.all_reduce", timed_out)
    watchdog = Watchdog(3, timedelta(seconds=9), CPU)
    meter = Meter(CPU, watchdog)
    meter.add(torch.ones(()), 1)
    with (
        pytest.raises(RuntimeError, match=r"rank 3: log of step 7: sum of losses: nothing for 9 s"),
        watchdog.doing("log of step 7"),
    ):
        meter.read()
