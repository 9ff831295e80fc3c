"""Whole runs: resuming bit for bit, cp that changes nothing, every model and task."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gr_train.config import Config, ConfigError, load_config
from gr_train.data.parquet import write_split
from gr_train.data.sample import DatasetInfo
from gr_train.progress import sole_writer
from gr_train.trainer import Trainer
from kernels.scratch import scratch_limit
from tests.gr_train.samples import make_samples

SMALL = [
    "data.max_length=64",
    "data.batch_size=12",
    "data.synthetic.num_items=100",
    "data.synthetic.mean_events=12",
    "data.synthetic.max_events=60",
    "data.synthetic.num_eval_sequences=41",
    "data.synthetic.num_candidates=3",
    "model.width=16",
    "model.qk_dim=8",
    "model.v_dim=8",
    "model.num_negatives=32",
    "model.scratch_gib=0.5",
    "eval.batch_size=12",
    "train.log_every=1",
]


def small(run_dir: Path, *overrides: str, world_size: int) -> Config:
    return load_config(
        "configs/quickstart.yaml",
        [*SMALL, f"run_dir={run_dir}", *overrides],
        world_size=world_size,
    )


def run(run_dir: Path, *overrides: str):
    """The summary, and every trained number."""
    trainer = Trainer(small(run_dir, *overrides, world_size=int(os.environ["WORLD_SIZE"])))
    assert scratch_limit() == 1 << 29
    summary = trainer.fit()
    state = {name: p.detach().clone() for name, p in trainer.dense.named_parameters()}
    for name, weight in trainer.model.embeddings.state_dict().items():
        for i, shard in enumerate(weight.local_shards()):
            state[f"{name}/{i}"] = shard.tensor.clone()
    return summary, state


VOCABULARIES = DatasetInfo(num_items=50, num_actions=4, contextual={"country": 3})


def write_data(folder: Path) -> list[str]:
    """A small data set; the overrides that name it."""
    samples = make_samples([5] * 12, [0] * 12, num_contextual=1)
    for split in ("train", "valid", "test"):
        write_split(samples, VOCABULARIES, folder / split)
    VOCABULARIES.save(folder)
    return ["data.source=parquet", f"data.path={folder}"]


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_is_bit_for_bit(run_in_world, tmp_path: Path, workers: int) -> None:
    # The quickstart's tables: the planner gives each to one rank, and the other has no row of it.
    tables = ["data.synthetic.num_items=1000", "model.width=64"]
    common = ["model.dropout=0.2", f"data.num_workers={workers}", "optim.schedule=cosine", *tables]
    straight = run_in_world(2, run, tmp_path / "straight", "train.steps=20", *common)
    # The schedule's end belongs to the config, so the first half stops early by its checkpoint.
    half = tmp_path / "half"
    run_in_world(2, run, half, "train.steps=20", "checkpoint.every=10", *common)
    for later in (half / "checkpoints").glob("step_00000020"):
        (later / ".metadata").unlink()  # as if the job had been cut off after step 10
    resumed = run_in_world(2, run, half, "train.steps=20", "checkpoint.resume=true", *common)
    for (want_summary, want), (summary, got) in zip(straight, resumed, strict=True):
        assert summary["metrics"] == want_summary["metrics"]
        for name, x in want.items():
            assert torch.equal(got[name], x), name
    assert losses(half) == losses(tmp_path / "straight")


def run_and_lose_the_end(run_dir: Path) -> list[float]:
    """Losses as logged, every 4 steps, by a run that is cut off after step 6 and resumed."""
    overrides = ["parallel.cp=1", "train.log_every=4", "train.steps=12"]
    run(run_dir, *overrides, "checkpoint.every=6")
    (run_dir / "checkpoints" / "step_00000012" / ".metadata").unlink()
    run(run_dir, *overrides, "checkpoint.resume=true")
    return losses(run_dir)


def test_log_of_a_resumed_run(run_in_world, tmp_path: Path) -> None:
    """Means over the steps since the last line, wherever the run was cut off."""
    every = ["parallel.cp=1", "train.steps=12"]
    run_in_world(1, run, tmp_path / "each", *every)
    each = losses(tmp_path / "each")
    (logged,) = run_in_world(1, run_and_lose_the_end, tmp_path / "cut")
    want = [sum(each[:4]) / 4, sum(each[6:8]) / 2, sum(each[8:12]) / 4]
    assert logged == pytest.approx(want, rel=1e-6)


def resume_too_late(run_dir: Path) -> None:
    run(run_dir, "parallel.cp=1", "train.steps=2")
    with pytest.raises(ConfigError, match=r"train\.steps=2"):
        run(run_dir, "parallel.cp=1", "train.steps=2", "checkpoint.resume=true")


def test_nothing_left_to_train(run_in_world, tmp_path: Path) -> None:
    run_in_world(1, resume_too_late, tmp_path / "run")


def refused(run_dir: Path, *overrides: str) -> str:
    with pytest.raises(ValueError, match=": ") as caught:
        run(run_dir, "parallel.cp=1", *overrides)
    return str(caught.value)


def refuse_to_resume(run_dir: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run(run_dir, "train.steps=3", "checkpoint.resume=true", *overrides)
    return str(caught.value)


@pytest.mark.parametrize(("saved_by", "resumed_by"), [(2, 1), (1, 2)])
def test_resume_wants_the_number_of_processes(
    run_in_world, tmp_path: Path, saved_by: int, resumed_by: int
) -> None:
    run_in_world(saved_by, run, tmp_path, "parallel.cp=1", "train.steps=2")
    for message in run_in_world(resumed_by, refuse_to_resume, tmp_path, "parallel.cp=1"):
        assert f"saved by {saved_by} processes, this job has {resumed_by}; start" in message
        assert len(message.splitlines()) == 1


CHANGED = {  # override -> what was saved
    "parallel.cp=1": "2",
    "data.num_workers=1": "0",
    "data.batch_size=24": "12",
    "train.seed=7": "0",
    "model.width=32": "16",
    "model.num_layers=1": "2",
    "model.temperature=0.1": "0.05",
    "model.num_negatives=16": "32",
    "model.mask.window=16": "0",
    "data.synthetic.num_items=200": "100",
}


def test_resume_names_in_one_line_what_changed(run_in_world, tmp_path: Path) -> None:
    run_in_world(2, run, tmp_path, "train.steps=2")
    for override, saved in CHANGED.items():
        for message in run_in_world(2, refuse_to_resume, tmp_path, override):
            assert f"{override}: {tmp_path}/checkpoints/step_00000002 has {saved}; use" in message


def rates_after_resuming(run_dir: Path) -> list[float]:
    """As logged: of two steps, and two more with others."""
    each = ["parallel.cp=1", "optim.warmup_steps=0"]
    run(run_dir, *each, "train.steps=2", "optim.lr=1e-3")
    changed = ["optim.lr=1e-5", "optim.beta1=0.5", "data.synthetic.num_eval_sequences=3"]
    steps = ["train.steps=4", "checkpoint.resume=true"]
    trainer = Trainer(small(run_dir, *each, *changed, *steps, world_size=1))
    trainer.fit()
    assert trainer.optimizer.param_groups[0]["betas"] == (0.5, 0.98)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [x["lr"] for x in map(json.loads, lines) if x["kind"] == "train"]


def test_what_may_change_is_the_config_s(run_in_world, tmp_path: Path) -> None:
    (rates,) = run_in_world(1, rates_after_resuming, tmp_path)
    assert rates == pytest.approx([1e-3, 1e-3, 1e-5, 1e-5])


def resume_with_another_vocabulary(folder: Path) -> str:
    data = ["parallel.cp=1", *write_data(folder)]
    run(folder, *data, "train.steps=1")
    replace(VOCABULARIES, contextual={"country": 4}).save(folder)
    return refuse_to_resume(folder, *data)


def test_resume_wants_the_vocabularies(run_in_world, tmp_path: Path) -> None:
    (message,) = run_in_world(1, resume_with_another_vocabulary, tmp_path)
    assert message.startswith("dataset.contextual.country=4: ")
    assert "step_00000001 has 3; use that" in message


def resume_from_an_older_version(run_dir: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gr_train.checkpoint.SETTINGS", ("train.seed",))
        run(run_dir, "parallel.cp=1", "train.steps=1")
    return refuse_to_resume(run_dir, "parallel.cp=1")


def test_a_checkpoint_of_an_older_version_is_refused(run_in_world, tmp_path: Path) -> None:
    (message,) = run_in_world(1, resume_from_an_older_version, tmp_path)
    assert "older version, which does not tell data.source; train anew" in message


def damage(run_dir: Path) -> tuple[str, str, str]:
    """What is said of a full disk, of a damaged checkpoint, and of the last one, damaged too."""
    folder = run_dir / "checkpoints"
    run(run_dir, "parallel.cp=1", "train.steps=2", "checkpoint.every=1")
    (folder / "step_00000003").mkdir()
    (folder / "step_00000003" / "__0_0.distcp").symlink_to("/dev/full")
    full = refused(run_dir, "train.steps=3", "checkpoint.resume=true")
    for path in folder.glob("step_0000000[12]/*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])
    second = refuse_to_resume(run_dir, "parallel.cp=1")
    shutil.rmtree(folder / "step_00000002")
    return full, second, refuse_to_resume(run_dir, "parallel.cp=1")


def test_disks_that_fail(run_in_world, tmp_path: Path) -> None:
    (messages,) = run_in_world(1, damage, tmp_path)
    full, second, first = messages
    folder = tmp_path / "checkpoints"
    assert full.startswith(f"checkpoint {folder}/step_00000003: cannot be written (OSError")
    assert f"No space left on device); {folder}/step_00000002 is still there for" in full
    assert f"{folder}/step_00000002 cannot be loaded: " in second
    assert "; remove it to go on from step_00000001, or train anew with" in second
    assert "; train anew with checkpoint.resume=false" in first


def diverge(run_dir: Path, *overrides: str) -> str:
    """What is said of a loss that from step 3 on is not finite on rank 1."""
    step = Trainer.step

    def bad(trainer: Trainer, number: int, *args: Any) -> torch.Tensor:
        loss = step(trainer, number, *args)
        return loss * torch.nan if trainer.mesh.rank == 1 and number >= 3 else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", bad)
        return refused(run_dir, "train.steps=6", *overrides)


@pytest.mark.parametrize(
    ("every", "step", "newest"),
    [
        ("train.log_every=1 checkpoint.every=2", 3, "at once, too: {}/step_00000002"),
        ("train.log_every=6 checkpoint.every=2", 4, "at once, too: {}/step_00000002"),
        ("train.log_every=5 checkpoint.every=5", 5, "there is no checkpoint"),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run(
    run_in_world, tmp_path: Path, every: str, step: int, newest: str
) -> None:
    for message in run_in_world(2, diverge, tmp_path, *every.split()):
        assert message.startswith(f"step {step}: the loss is not finite; lower optim.lr")
        assert message.endswith(newest.format(tmp_path / "checkpoints"))
    found = [p.name for p in (tmp_path / "checkpoints").glob("*")]
    assert found == ["step_00000002"] * ("step_" in newest)


def what_is_said(run_dir: Path, *overrides: str) -> str:
    with redirect_stdout(io.StringIO()) as said:
        run(run_dir, *overrides)
    return said.getvalue()


def test_resuming_from_nothing_is_said(run_in_world, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000007").mkdir(parents=True)
    overrides = ["parallel.cp=1", "train.steps=1", "checkpoint.resume=true"]
    (said,) = run_in_world(1, what_is_said, tmp_path, *overrides)
    assert said.splitlines()[0] == (
        f"checkpoint.resume: no complete checkpoint in {tmp_path}/checkpoints; starting at step 1 "
        "(cut off: step_00000007)"
    )


def test_two_jobs_do_not_share_a_folder(run_in_world, tmp_path: Path) -> None:
    with sole_writer(tmp_path / "run"):
        for message in run_in_world(2, refused, tmp_path / "run", "train.steps=1"):
            assert (
                message == f"run_dir={tmp_path}/run: another job is writing there; choose another"
            )
    assert not (tmp_path / "run").exists()
    run_in_world(1, run, tmp_path / "run", "parallel.cp=1", "train.steps=1")


def test_a_file_system_without_locks_will_do(tmp_path: Path, capsys, monkeypatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with sole_writer(tmp_path / "run"):
        assert ".run.lock: no lock (No locks available)" in capsys.readouterr().out


def test_a_new_run_keeps_the_old_one(run_in_world, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        run_in_world(
            1, run, tmp_path / "run", "parallel.cp=1", "train.steps=1", f"train.seed={seed}"
        )
    assert load_config(tmp_path / "run" / "config.yaml", world_size=1).train.seed == 2
    assert load_config(tmp_path / "run.1" / "config.yaml", world_size=1).train.seed == 1
    assert len(losses(tmp_path / "run")) == 1


def fail_at_the_first_batch(folder: Path) -> None:
    data = ["parallel.cp=1", "train.steps=1", *write_data(folder)]
    run(folder / "run", *data)
    with pytest.raises(ValueError, match=r"data\.max_length=1: no event fits"):
        run(folder / "run", *data, "data.max_length=1")


def test_a_run_without_a_first_batch_leaves_the_earlier_one(run_in_world, tmp_path: Path) -> None:
    run_in_world(1, fail_at_the_first_batch, tmp_path)
    assert (tmp_path / "run" / "summary.json").is_file()
    assert not (tmp_path / "run.1").exists()


def test_loss_curve_does_not_depend_on_cp(run_in_world, tmp_path: Path) -> None:
    # Gentle steps: large ones amplify the rounding of float32 until nothing can be compared.
    gentle = ["embedding.lr=0.001", "model.temperature=0.3", "optim.warmup_steps=100"]
    curves, summaries = {}, {}
    for size in (1, 2, 4):
        overrides = ["train.steps=15", f"parallel.cp={size}", "data.batch_size=48", *gentle]
        summaries[size] = run_in_world(size, run, tmp_path / str(size), *overrides)[0][0]
        curves[size] = losses(tmp_path / str(size))
    assert len(set(curves[1])) == 15
    assert curves[2] == pytest.approx(curves[1], rel=1e-4)
    assert curves[4] == pytest.approx(curves[1], rel=1e-4)
    for size in (2, 4):  # evaluation too, though 41 samples do not divide
        assert summaries[size]["popularity"] == pytest.approx(summaries[1]["popularity"])
        assert summaries[size]["metrics"] == pytest.approx(summaries[1]["metrics"], rel=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.task=ranking", "model.input_style=interleaved"],
        ["model.task=ranking", "data.synthetic.contextual_sizes=[7,3]"],
        ["model.input_style=interleaved", "parallel.exchange=all_gather"],
        ["model.mask.window=5", "model.mask.full_suffix=3", "parallel.layout=contiguous"],
        ["model.mask.local=6", "model.mask.prefix=2", "embedding.optimizer=sgd"],
        ["model.kind=sasrec", "parallel.cp=1"],
        ["model.kind=sasrec", "model.task=ranking", "parallel.cp=1", "train.precision=bf16"],
    ],
    ids=lambda overrides: " ".join(o.split(".", 1)[1] for o in overrides),
)
def test_runs(run_in_world, tmp_path: Path, overrides: list[str]) -> None:
    evaluation = ["eval.every=2", "checkpoint.every=1"]
    results = run_in_world(2, run, tmp_path, "train.steps=4", *evaluation, *overrides)
    summary = results[0][0]
    assert summary["metrics"] == results[1][0]["metrics"]
    assert summary["metrics"]["samples"] in (41, 41 * 3)
    assert all(0 <= x == x for x in summary["metrics"].values())
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # keep
    assert (tmp_path / "config.yaml").is_file()
    assert (tmp_path / "summary.json").is_file()
    assert list((tmp_path / "tensorboard").iterdir())
