"""Making the next batches beside a step: order, how many ahead, errors; no waits on a GPU."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch

from gr_train.ahead import DEPTH, Ahead
from gr_train.config import load_config
from gr_train.trainer import Trainer


@pytest.mark.parametrize("threaded", [False, True])
def test_in_order_and_no_more_than_asked_for(threaded: bool) -> None:
    numbers, threads = itertools.count(), set()

    def make() -> int:
        threads.add(threading.current_thread())
        return next(numbers)

    ahead, got = Ahead(make, 4, threaded=threaded), []
    ahead.begin()
    for number in ahead:
        got.append(number)
        ahead.begin()
        ahead.begin()
    assert got == [0, 1, 2, 3]
    assert next(numbers) == 4
    assert (threading.current_thread() in threads) != threaded


def test_so_many_ahead_once_settled() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    ahead, expected = Ahead(make, 10, threaded=True), 0
    for used, number in enumerate(ahead):
        assert number == used
        expected = max(expected, used + 1)
        assert len(made) == expected  # none before it is asked for, or begun
        if used % 3 == 0:
            ahead.begin()
            ahead.settle()
            expected = min(used + 1 + DEPTH, 10)
            assert len(made) == expected
    assert len(made) == 10


def test_one_is_there_while_the_next_is_being_made() -> None:
    numbers, go_on = itertools.count(), threading.Event()

    def make() -> int:
        number = next(numbers)
        if number == 2:
            assert go_on.wait(30)
        return number

    ahead = Ahead(make, 3, threaded=True)
    results = iter(ahead)
    assert next(results) == 0
    ahead.begin()
    assert next(results) == 1
    go_on.set()
    assert list(results) == [2]


def test_an_error_reaches_the_user() -> None:
    def make() -> int:
        raise OSError("no such file")

    ahead = Ahead(make, 2, threaded=True)
    ahead.begin()
    with pytest.raises(OSError, match="no such file"):
        next(iter(ahead))
    ahead.settle()


def test_nothing_is_made_after_an_error() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        if len(made) == 2:
            raise OSError("no such file")
        return made[-1]

    ahead = Ahead(make, 3, threaded=True)
    results = iter(ahead)
    assert next(results) == 0
    ahead.begin()
    with pytest.raises(OSError, match="no such file"):
        next(results)
    assert made == [0, 1]


def steps(run_dir: str, overrides: list[str], ahead: bool) -> list[float]:
    """Losses of steps that, once all is compiled and buffers have grown, must not wait for the GPU.

    ahead: batches are made beside the steps before.
    """
    world = torch.cuda.device_count()
    shared = [
        "data.max_length=256",
        "data.batch_size=8",
        "model.width=64",
        "model.num_heads=2",
        "train.steps=12",
        f"run_dir={run_dir}",
    ]
    config = load_config(None, [*shared, f"parallel.cp={world}", *overrides], world_size=world)
    trainer = Trainer(config)
    trainer.dense.train()
    losses, batches = [], trainer._batches(0)
    for step, batch in enumerate(batches, start=1):
        if step == 5:
            torch.cuda.set_sync_debug_mode("error")
        torch.cuda._sleep(50_000_000)  # the GPU falls behind, more with each step
        losses.append(trainer.step(step, batch.prepared, batches.begin if ahead else None))
    torch.cuda.set_sync_debug_mode("default")
    return torch.stack(losses).tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.exchange=ring", "parallel.keep_whole=false", "model.dropout=0.1"],
        ["model.mask.local=32", "model.mask.prefix=8", "parallel.keep_whole=false"],
        [
            "model.task=ranking",
            "parallel.exchange=all_gather",
            "parallel.keep_whole=false",
            "model.recompute=projections",
        ],
        ["parallel.exchange=ring"],
    ],
    ids=["ring", "halo", "all_gather", "whole"],
)
def test_a_step_never_waits_for_the_gpu(
    run_in_world: Any, tmp_path: Any, overrides: list[str]
) -> None:
    world = torch.cuda.device_count()
    for losses in run_in_world(world, steps, str(tmp_path), overrides, True, gpus=True):
        assert all(loss == loss for loss in losses)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_made_ahead_disturbs_nothing(run_in_world: Any, tmp_path: Any) -> None:
    """Its memory was that of a batch whose step the GPU may still be at."""
    world = torch.cuda.device_count()
    losses = [run_in_world(world, steps, str(tmp_path), [], x, gpus=True) for x in (True, False)]
    for ahead, alone in zip(*losses, strict=True):
        assert ahead == pytest.approx(alone, rel=1e-3)
