"""Save and resume through torch.distributed.checkpoint: every rank writes what it holds.

A checkpoint is a folder step_N. DCP writes its .metadata last, so a folder without it is one that
was cut off, and is ignored.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, is_dataclass
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
from gr_train.data.sample import DatasetInfo
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
    "model.mask",
    "model.num_negatives",
    "model.temperature",
    "embedding.optimizer",
    "parallel.cp",
    "train.seed",
)


class Checkpointer:
    """What a run needs to go on as if it had never stopped, bit for bit."""

    def __init__(
        self,
        config: Config,
        info: DatasetInfo,
        folder: Path,
        *,
        dense: nn.Module,
        embeddings: ShardedEmbeddingCollection,
        optimizer: torch.optim.Optimizer,
        schedule: LambdaLR,
        loader: StatefulDataLoader,
        device: torch.device,
    ) -> None:
        self.config, self.info, self.folder = config, info, folder
        self.dense, self.embeddings = dense, embeddings
        self.optimizer, self.schedule, self.loader = optimizer, schedule, loader
        self.device = device

    def save(self, step: int, loader_state: dict[str, Any]) -> None:
        """Write step_N and remove the oldest beyond `keep`. Collective.

        loader_state: the loader's after this step's batch; it may be batches ahead by now.
        Raises ValueError if it cannot be written.
        """
        path = self.folder / f"step_{step:08d}"
        try:
            dcp.save(self._state(step, loader_state), checkpoint_id=path)
        except dcp.api.CheckpointException as error:
            before = self.newest()
            left = "there is no earlier one"
            if before is not None:
                left = f"{before} is still there for checkpoint.resume=true"
            raise ValueError(
                f"checkpoint {path}: cannot be written ({_cause(error)}); {left}"
            ) from error
        if dist.get_rank() == 0:
            for old in self._complete()[: -self.config.checkpoint.keep]:
                shutil.rmtree(old)
        dist.barrier()

    def resume(self) -> int:
        """Load the newest complete checkpoint into everything; its step, or 0 if there is none.

        Collective. Raises ConfigError if the checkpoint does not fit.
        """
        path = self.newest()
        if path is None:
            if dist.get_rank() == 0:
                cut_off = ", ".join(sorted(p.name for p in self.folder.glob("step_*")))
                print(
                    f"checkpoint.resume: no complete checkpoint in {self.folder}; starting at "
                    f"step 1{cut_off and f' (cut off: {cut_off})'}",
                    flush=True,
                )
            return 0
        self._check_settings(path)
        state = self._state(0, self.loader.state_dict())
        self._load(state, path)
        options = self._optimizer_options()
        set_model_state_dict(self.dense, state["dense"])
        set_optimizer_state_dict(self.dense, self.optimizer, optim_state_dict=state["optimizer"])
        self.embeddings.load_state_dict(state["embeddings"])
        fused_optimizer(self.embeddings).load_state_dict(state["embedding_optimizer"])
        (own,) = state[self._own_key()]
        rates = {"base_lrs": self.schedule.base_lrs}  # the config's, like the options
        self.schedule.load_state_dict(own["schedule"] | rates)
        self._use(options)
        self.loader.load_state_dict(own["loader"])
        torch.set_rng_state(own["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], self.device)
        return own["step"]

    def _optimizer_options(self) -> list[dict[str, Any]]:
        """Learning rate, decay and betas: the config's, which may change when a run goes on."""
        groups = self.optimizer.param_groups
        return [{name: x for name, x in g.items() if name != "params"} for g in groups]

    def _use(self, options: list[dict[str, Any]]) -> None:
        step, factors = self.schedule.last_epoch, self.schedule.lr_lambdas
        for group, own, rate, factor in zip(
            self.optimizer.param_groups, options, self.schedule.base_lrs, factors, strict=True
        ):
            group.update(own, lr=rate * factor(step))

    def newest(self) -> Path | None:
        """The newest complete checkpoint, if there is one."""
        return max(self._complete(), default=None)

    def _check_settings(self, path: Path) -> None:
        """Before DCP compares: it takes fewer processes or layers than were saved for a fit."""
        state: dict[str, Any] = {"settings": ({},)}
        self._load(state, path)
        (saved,), own = state["settings"], self._settings()
        anew = "train anew with checkpoint.resume=false"
        if unknown := [name for name in own if name not in saved]:
            raise ConfigError(
                f"checkpoint.resume: {path} is of an older version, which does not tell "
                f"{unknown[0]}; {anew}"
            )
        if saved["processes"] != own["processes"]:
            raise ConfigError(
                f"checkpoint.resume: {path} was saved by {saved['processes']} processes, this job "
                f"has {own['processes']}; start that many, or {anew}"
            )
        if differs := _difference(own, saved):
            name, now, then = differs
            raise ConfigError(f"{name}={now}: {path} has {then}; use that, or {anew}")

    def _settings(self) -> dict[str, Any]:
        """Plain values, so that a checkpoint does not depend on what classes look like."""
        data = self.config.data
        synthetic = asdict(data.synthetic)
        del synthetic["num_eval_sequences"]
        return {
            "processes": dist.get_world_size(),
            **{name: _plain(attrgetter(name)(self.config)) for name in SETTINGS},
            "data.synthetic": synthetic if data.source == "synthetic" else None,
            "dataset": _plain(self.info),
        }

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

    def _load(self, state: dict[str, Any], path: Path) -> None:
        # A rank may hold no row of a table. The default planner would drop that table's entry and
        # then take the checkpoint for one of an old format.
        planner = dcp.DefaultLoadPlanner(flatten_sharded_tensors=False)
        try:
            dcp.load(state, checkpoint_id=path, planner=planner)
        except dcp.api.CheckpointException as error:
            way_out = "train anew with checkpoint.resume=false"
            if earlier := [p for p in self._complete() if p < path]:
                way_out = f"remove it to go on from {earlier[-1].name}, or {way_out}"
            raise ConfigError(
                f"checkpoint.resume: {path} cannot be loaded: {_cause(error)}; {way_out}"
            ) from error


def _cause(error: dcp.api.CheckpointException) -> str:
    return str(error).strip().splitlines()[-1]  # before it come every rank's tracebacks


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _difference(
    own: dict[str, Any], saved: dict[str, Any], within: str = ""
) -> tuple[str, Any, Any] | None:
    """The first field that differs, its own value and the saved one."""
    for name, value in own.items():
        then, name = saved[name], within + name
        if isinstance(value, dict) and isinstance(then, dict) and list(value) == list(then):
            if inner := _difference(value, then, f"{name}."):
                return inner
        elif value != then or isinstance(value, dict):  # their order counts too
            return name, value, then
    return None
