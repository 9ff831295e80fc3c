"""Save and resume through torch.distributed.checkpoint: every rank writes what it holds.

A checkpoint is a folder step_N. DCP writes its .metadata last, so a folder without it is one that
was cut off, and is ignored.
"""

from __future__ import annotations

import shutil
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR
from torchdata.stateful_dataloader import StatefulDataLoader
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from gr_train.config import Config, ConfigError
from parallel.embedding.tables import fused_optimizer

# What a saved state holds for. The rest of a config may change when a run goes on: learning rates,
# the number of steps, dropout, what is computed again.
SETTINGS = (
    "data.source",
    "data.max_length",
    "data.batch_size",
    "data.readers",
    "data.num_workers",
    "model.kind",
    "model.task",
    "model.input_style",
    "model.num_layers",
    "model.width",
    "model.num_heads",
    "model.qk_dim",
    "model.v_dim",
    "model.time_buckets",
    "embedding.optimizer",
    "parallel.cp",
    "train.seed",
)


class Checkpointer:
    """What a run needs to go on as if it had never stopped, bit for bit."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        dense: nn.Module,
        embeddings: ShardedEmbeddingCollection,
        optimizer: torch.optim.Optimizer,
        schedule: LambdaLR,
        loader: StatefulDataLoader,
        device: torch.device,
    ) -> None:
        self.config, self.folder = config, folder
        self.dense, self.embeddings = dense, embeddings
        self.optimizer, self.schedule, self.loader = optimizer, schedule, loader
        self.device = device

    def save(self, step: int, loader_state: dict[str, Any]) -> None:
        """Write step_N and remove the oldest beyond `keep`. Collective.

        loader_state: the loader's after this step's batch; it may be a batch ahead by now.
        """
        dcp.save(self._state(step, loader_state), checkpoint_id=self.folder / f"step_{step:08d}")
        if dist.get_rank() == 0:
            for old in self._complete()[: -self.config.checkpoint.keep]:
                shutil.rmtree(old)
        dist.barrier()

    def resume(self) -> int:
        """Load the newest complete checkpoint into everything; its step, or 0 if there is none.

        Collective. Raises ConfigError if the checkpoint does not fit.
        """
        complete = self._complete()
        if not complete:
            return 0
        path = complete[-1]
        self._check_settings(path)
        state = self._state(0, self.loader.state_dict())
        _load(state, path)
        set_model_state_dict(self.dense, state["dense"])
        set_optimizer_state_dict(self.dense, self.optimizer, optim_state_dict=state["optimizer"])
        self.embeddings.load_state_dict(state["embeddings"])
        fused_optimizer(self.embeddings).load_state_dict(state["embedding_optimizer"])
        (own,) = state[self._own_key()]
        self.schedule.load_state_dict(own["schedule"])
        self.loader.load_state_dict(own["loader"])
        torch.set_rng_state(own["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], self.device)
        return own["step"]

    def _check_settings(self, path: Path) -> None:
        """Before DCP compares: it takes fewer processes or layers than were saved for a fit."""
        state: dict[str, Any] = {"settings": ({},)}
        _load(state, path)
        (saved,), own = state["settings"], self._settings()
        anew = "or train anew with checkpoint.resume=false"
        if saved["processes"] != own["processes"]:
            raise ConfigError(
                f"checkpoint.resume: {path} was saved by {saved['processes']} processes, this job "
                f"has {own['processes']}; start that many, {anew}"
            )
        for name, value in own.items():
            if saved[name] != value:
                raise ConfigError(f"{name}={value}: {path} has {saved[name]}; use that, {anew}")

    def _settings(self) -> dict[str, Any]:
        settings = {name: attrgetter(name)(self.config) for name in SETTINGS}
        return {"processes": dist.get_world_size(), **settings}

    def _state(self, step: int, loader_state: dict[str, Any]) -> dict[str, Any]:
        own = {
            "step": step,
            "schedule": self.schedule.state_dict(),
            "loader": loader_state,
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            own["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return {
            "dense": get_model_state_dict(self.dense),
            "optimizer": get_optimizer_state_dict(self.dense, self.optimizer),
            "embeddings": self.embeddings.state_dict(),
            "embedding_optimizer": fused_optimizer(self.embeddings).state_dict(),
            # Tuples: DCP pickles them whole instead of flattening them.
            "settings": (self._settings(),),
            self._own_key(): (own,),
        }

    def _own_key(self) -> str:
        return f"rank_{dist.get_rank()}"

    def _complete(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step_*") if (p / ".metadata").is_file())


def _load(state: dict[str, Any], path: Path) -> None:
    # A rank may hold no row of a table. The default planner would drop that table's entry and then
    # take the checkpoint for one of an old format.
    planner = dcp.DefaultLoadPlanner(flatten_sharded_tensors=False)
    try:
        dcp.load(state, checkpoint_id=path, planner=planner)
    except (KeyError, RuntimeError, dcp.api.CheckpointException) as error:
        cause = str(error).strip().splitlines()[-1]  # before it come every rank's tracebacks
        raise ConfigError(f"checkpoint.resume: {path} cannot be loaded: {cause}") from error
