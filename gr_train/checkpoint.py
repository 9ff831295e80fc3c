"""Save and resume through torch.distributed.checkpoint: every rank writes what it holds.

A checkpoint is a folder step_N. DCP writes its .metadata last, so a folder without it is one that
was cut off, and is ignored.
"""

from __future__ import annotations

import shutil
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

from gr_train.config import CheckpointConfig
from parallel.embedding.tables import fused_optimizer


class Checkpointer:
    """What a run needs to go on as if it had never stopped, bit for bit."""

    def __init__(
        self,
        config: CheckpointConfig,
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
            for old in self._complete()[: -self.config.keep]:
                shutil.rmtree(old)
        dist.barrier()

    def resume(self) -> int:
        """Load the newest complete checkpoint into everything; its step, or 0 if there is none.

        Raises ValueError if the checkpoint does not fit.
        """
        complete = self._complete()
        if not complete:
            return 0
        path = complete[-1]
        state = self._state(0, self.loader.state_dict())
        # A rank may hold no row of a table. The default planner would drop that table's entry and
        # then take the checkpoint for one of an old format.
        planner = dcp.DefaultLoadPlanner(flatten_sharded_tensors=False)
        try:
            dcp.load(state, checkpoint_id=path, planner=planner)
        except (KeyError, RuntimeError, dcp.api.CheckpointException) as error:
            raise ValueError(
                f"checkpoint.resume: {path} does not fit this config and {dist.get_world_size()} "
                f"processes; resume with the ones it was saved with, or choose another run_dir: "
                f"{error}"
            ) from error
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
            self._own_key(): (own,),  # a tuple: DCP pickles it whole instead of flattening it
        }

    def _own_key(self) -> str:
        return f"rank_{dist.get_rank()}"

    def _complete(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step_*") if (p / ".metadata").is_file())
