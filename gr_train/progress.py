"""What a run tells the world: live lines and a final table on rank 0, JSONL, TensorBoard."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter


class Progress:
    """On rank 0; other ranks hold none."""

    def __init__(self, run_dir: Path, steps: int, first_step: int) -> None:
        self.run_dir, self.steps, self.first_step = run_dir, steps, first_step
        self.started = time.perf_counter()
        # A resumed run goes on in the same files, after the step it resumes from.
        path = run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= first_step]
        path.write_text("".join(f"{line}\n" for line in kept))
        self.jsonl = path.open("a")
        self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def say(self, message: str) -> None:
        print(message, flush=True)

    def train(self, step: int, loss: float, tokens_per_s: float, lr: float) -> None:
        """One line, with the time left by the mean pace so far."""
        done = step - self.first_step
        left = (time.perf_counter() - self.started) / done * (self.steps - step)
        self.say(
            f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {loss:.4f}  "
            f"{tokens_per_s:,.0f} tokens/s  {_duration(left)} left"
        )
        self.write("train", step, {"loss": loss, "tokens_per_s": tokens_per_s, "lr": lr})

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = "  ".join(f"{name} {_shown(name, value)}" for name, value in metrics.items())
        self.say(f"evaluation after step {step}: {shown}")
        self.write("eval", step, metrics)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self.jsonl.write(json.dumps({"kind": kind, "step": step, **_finite(values)}) + "\n")
        self.jsonl.flush()
        for name, value in values.items():
            self.tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def finish(self, summary: Mapping[str, object], baseline: Mapping[str, float]) -> None:
        """Write summary.json and print the table: metrics beside the baseline, then the rest."""
        (self.run_dir / "summary.json").write_text(json.dumps(_finite(summary), indent=2) + "\n")
        self.tensorboard.close()
        self.jsonl.close()
        table = Table(title=f"{summary['model']}, {summary['task']}")
        table.add_column("")
        table.add_column("this run", justify="right")
        if baseline:
            table.add_column("popularity", justify="right")
        metrics = summary["metrics"]
        assert isinstance(metrics, Mapping)
        for name, value in {"training loss": summary["loss"], **metrics}.items():
            other = _shown(name, baseline[name]) if name in baseline else ""
            table.add_row(name, _shown(name, value), *([other] if baseline else []))
        table.add_section()
        for name in ("steps", "processes", "tokens/s", "peak memory, fullest rank", "results"):
            table.add_row(name, str(summary[name]))
        Console(width=72).print(table)


@contextmanager
def sole_writer(run_dir: Path) -> Iterator[None]:
    """Inside, other jobs that want run_dir are refused; if one is inside already, this one is."""
    folder = Path(os.path.abspath(run_dir))
    lock = folder.with_name(f".{folder.name}.lock")  # not in the folder, which may be moved aside
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(lock.open("w"))
            # Not flock: a loader's workers would inherit it, and keep it after a crash.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"run_dir={run_dir}: another job is writing there; choose another"
            ) from error
        except OSError as error:
            print(f"{lock}: no lock ({error.strerror}); start no other job there", flush=True)
        yield


def set_aside(run_dir: Path) -> None:
    """Move an earlier run's folder out of the way: run becomes run.1, or the next free number."""
    if not (run_dir / "config.yaml").exists():
        return
    number = 1
    while (earlier := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    run_dir.rename(earlier)
    print(f"{run_dir} held an earlier run, which is now {earlier}", flush=True)


def _shown(name: str, value: float) -> str:
    return f"{value:,.0f}" if name == "samples" else f"{value:,.4f}"


def _finite(values: Any) -> Any:
    """JSON has no nan or infinity: null."""
    if isinstance(values, Mapping):
        return {name: _finite(value) for name, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
