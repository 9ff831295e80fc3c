"""The command line: what the user did wrong is one line, from one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch._utils import ExceptionWrapper

from gr_train import cli

TRAIN = ["train", "--config", "configs/quickstart.yaml", "parallel.cp=1"]


def failing_worker() -> ExceptionWrapper:
    try:
        raise ValueError("data.max_length=1: no event fits")
    except ValueError:
        return ExceptionWrapper(where="in DataLoader worker process 0")


def test_an_error_of_a_loader_worker_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "_train", lambda _: failing_worker().reraise())
    assert cli.main(TRAIN) == 2
    assert capsys.readouterr().err == "gr-train: error: data.max_length=1: no event fits\n"


def test_other_local_processes_wait_for_the_first_to_speak(monkeypatch, capsys) -> None:
    waits: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert cli.main([*TRAIN, "train.steps=0"]) == 2
        assert "train.steps=0" in capsys.readouterr().err
    assert waits == [cli.PATIENCE_S]


def test_a_job_says_once_what_all_its_processes_find() -> None:
    torchrun = [Path(sys.executable).parent / "torchrun", "--nproc_per_node", "3"]
    job = subprocess.run(
        [*torchrun, "-m", "gr_train.cli", *TRAIN, "train.steps=0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert job.returncode != 0
    assert job.stderr.count("gr-train: error: train.steps=0: want 1 or more") == 1


@pytest.mark.parametrize("inside", ["file", "file/deeper"])
def test_a_run_dir_that_cannot_be_written_is_refused(tmp_path: Path, capsys, inside: str) -> None:
    (tmp_path / "file").touch()
    assert cli.main([*TRAIN, f"run_dir={tmp_path / inside}"]) == 2
    assert f"run_dir={tmp_path / inside}: cannot be written (" in capsys.readouterr().err
    prepare = ["prepare", "movielens", str(tmp_path / "file"), "--out", str(tmp_path / inside)]
    assert cli.main(prepare) == 2
    assert f"--out={tmp_path / inside}: cannot be written (" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["abc", "0", "-1"])
def test_a_world_size_that_is_none_is_named(monkeypatch, capsys, size: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    assert cli.main(TRAIN) == 2
    assert f"gr-train: error: WORLD_SIZE={size}: want the job's" in capsys.readouterr().err


def test_ctrl_c_is_quiet(monkeypatch, capsys) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_train", interrupted)
    assert cli.main(TRAIN) == 130
    assert capsys.readouterr().err == ""


def test_help_names_the_way_to_a_traceback(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "GR_TRAIN_TRACEBACK=1" in capsys.readouterr().out


RING = r"rank 0: step \d+: (keys and values|queries and gradients) to rank 1, from rank 1: "


@pytest.mark.parametrize(
    ("how", "said"),
    [("hang", RING + r"nothing for 10 s \(parallel.timeout_s\)"), ("die", "SIGKILL")],
)
def test_a_rank_that_fails_in_the_ring_ends_the_job(tmp_path: Path, how: str, said: str) -> None:
    torchrun = [Path(sys.executable).parent / "torchrun", "--nproc_per_node", "2"]
    config = ["--config", "configs/quickstart.yaml", "parallel.timeout_s=10", f"run_dir={tmp_path}"]
    job = subprocess.run(
        [*torchrun, "-m", "tests.gr_train.failing", how, *config],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # fewer GPUs than processes are refused
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert job.returncode != 0
    assert re.search(said, job.stderr), job.stderr[-4000:]
