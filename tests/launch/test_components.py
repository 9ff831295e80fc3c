"""The torchx component, down to a real job of two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.components import train

BIN = Path(sys.executable).parent


def test_command() -> None:
    app = train("model.num_layers=1", config="configs/quickstart.yaml", j="2x4")
    (role,) = app.roles
    assert role.num_replicas == 2
    command = " ".join(role.args)
    assert "--nproc_per_node 4" in command
    assert "-m gr_train.cli train --config configs/quickstart.yaml model.num_layers=1" in command


def test_bad_config_is_refused_before_launch() -> None:
    with pytest.raises(SystemExit, match=r"parallel\.cp=3"):
        train("parallel.cp=3", config="configs/quickstart.yaml", j="1x2")


@pytest.mark.parametrize("j", ["1x0", "0x2", "axb"])
def test_numbers_of_processes_that_are_none(j: str) -> None:
    with pytest.raises(SystemExit, match=f"error: -j {j}: want NODESxPROCESSES"):
        train(config="configs/quickstart.yaml", j=j)


def test_local_job(tmp_path: Path) -> None:
    overrides = ["train.steps=2", "train.log_every=1", f"run_dir={tmp_path}"]
    command = [BIN / "torchx", "run", "-s", "local_cwd", "launch/components.py:train"]
    job = subprocess.run(
        [*command, "-j", "1x2", "--config", "configs/quickstart.yaml", *overrides],
        env={"PATH": f"{BIN}:/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert job.returncode == 0, job.stdout
    assert "step 2/2" in job.stdout
    assert "HR@10" in job.stdout
    assert (tmp_path / "checkpoints" / "step_00000002" / ".metadata").is_file()
