"""torchx components: how a training job is put on machines, whatever the scheduler.

    torchx run -s local_cwd launch/components.py:train -j 1x2 --config configs/quickstart.yaml \\
        train.steps=50 parallel.cp=2
"""

# No `from __future__ import annotations` here: torchx reads the types of the arguments.
import torchx.specs as specs
from torchx.components.dist import ddp, parse_nnodes

from gr_train.config import ConfigError, load_config


def train(
    *overrides: str,
    config: str,
    j: str = "1x2",
    cpu: int = 2,
    gpu: int = 0,
    memory_mb: int = 1024,
    image: str = "",
    threads: int = 1,
) -> specs.AppDef:
    """Train a generative recommender: one process a GPU, or a few on CPUs.

    Args:
        overrides: config overrides such as parallel.cp=4 model.num_layers=8
        config: YAML file of the run, see configs/
        j: NODESxPROCESSES, such as 2x8: two machines with eight processes each
        cpu: CPU cores a machine, for the scheduler
        gpu: GPUs a machine, for the scheduler
        memory_mb: memory a machine, for the scheduler
        image: container image or folder, for schedulers that need one
        threads: CPU threads a process
    """
    try:
        _, nodes, processes, _ = parse_nnodes(j)
    except ValueError:
        nodes = processes = 0
    if min(nodes, processes) < 1:
        raise SystemExit(f"gr-train: error: -j {j}: want NODESxPROCESSES, such as 1x2")
    try:  # refuse a bad config here, not on every machine of the job
        load_config(config, overrides, world_size=nodes * processes)
    except ConfigError as error:
        raise SystemExit(f"gr-train: error: {error}") from None
    return ddp(
        "train",
        "--config",
        config,
        *overrides,
        m="gr_train.cli",
        name="gr-train",
        j=j,
        cpu=cpu,
        gpu=gpu,
        memMB=memory_mb,
        image=image,
        env={"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
    )
