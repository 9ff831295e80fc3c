"""The processes of `benchmarks.context_parallel`: a group of one cp, or each GPU alone."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TIMES = "ms", "host ms", "idle %"


@dataclass
class Run:
    """The processes of one cp, and the file that rank 0 writes its rows to."""

    process: subprocess.Popen[bytes]
    file: Path

    @staticmethod
    def start(
        args: argparse.Namespace, cp: int, file: Path, *, simulated: bool, gpu: int | None
    ) -> Run:
        """gpu: the only one they see."""
        count = f"--nproc-per-node={cp * args.dp}"
        torchrun = ["-m", "torch.distributed.run", "--standalone", count]
        command = [sys.executable, *([] if simulated else torchrun)]
        command += ["-m", "benchmarks.context_parallel", *sys.argv[1:]]
        command += ["--worker", str(cp), "--out", str(file), *(["--simulated"] * simulated)]
        environment = dict(os.environ)
        if gpu is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        if gpu:  # the first one's trace will do
            command += ["--trace", ""]
        return Run(subprocess.Popen(command, env=environment), file)

    def rows(self) -> list[dict]:
        if self.process.wait():
            raise SystemExit(f"{self.process.args} failed")
        found: list[dict] = json.loads(self.file.read_text())
        return found


def measured(args: argparse.Namespace, cp: int, *, simulated: bool = False) -> list[dict]:
    """The rows of one cp; of cp = 1 on each GPU, all side by side, and the mean of their times."""
    several = cp * args.dp == 1 and not simulated and args.what != "longest"
    gpus = range(max(args.cp)) if several else [None]
    with tempfile.TemporaryDirectory() as folder:
        runs: list[Run] = []
        try:
            for gpu in gpus:
                file = Path(folder) / f"{gpu}.json"
                runs.append(Run.start(args, cp, file, simulated=simulated, gpu=gpu))
            of_gpus = [run.rows() for run in runs]
        finally:
            for run in runs:
                run.process.terminate()
                run.process.wait()
    rows = []
    for each in zip(*of_gpus, strict=True):
        times = {x: statistics.mean(row[x] for row in each) for x in TIMES if x in each[0]}
        rows.append(each[0] | times | {"cp": cp, "each ms": [row["ms"] for row in each]})
    return rows
