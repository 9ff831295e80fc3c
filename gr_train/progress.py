"""What a run tells the world: live lines and a final table on rank 0, JSONL, TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter


class Progress:
    """On rank 0; other ranks hold none."""

    def __init__(self, run_dir: Path, steps: int, first_step: int) -> None:
        self.run_dir, self.steps, self.first_step = run_dir, steps, first_step
        self.started = time.perf_counter()
        # Appended to: a resumed run goes on in the same files.
        self.jsonl = (run_dir / "metrics.jsonl").open("a")
        self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"))

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
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"evaluation after step {step}: {shown}")
        self.write("eval", step, metrics)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self.jsonl.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.jsonl.flush()
        for name, value in values.items():
            self.tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def finish(self, summary: Mapping[str, object], baseline: Mapping[str, float]) -> None:
        """Write summary.json and print the table: metrics beside the baseline, then the rest."""
        (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
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
            other = f"{baseline[name]:.4f}" if name in baseline else ""
            table.add_row(name, f"{value:,.4f}" if name != "samples" else f"{value:,.0f}", other)
        table.add_section()
        for name in ("steps", "processes", "tokens/s", "peak memory per rank", "results"):
            table.add_row(name, str(summary[name]))
        Console(width=72).print(table)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
