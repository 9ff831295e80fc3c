"""The training loop: read a batch, cut it into shards, forward, backward, step; log, save.

`Trainer` builds what a config describes on every process and runs it.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import resource
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader

from gr_train.ahead import Ahead
from gr_train.checkpoint import Checkpointer
from gr_train.config import Config, ConfigError, save_config
from gr_train.data.loader import Split, build_loader, dataset_info, item_counts
from gr_train.evaluation import evaluate, popularity_metrics
from gr_train.meter import Meter
from gr_train.model.recommender import DenseModel, Prepared, Recommender, tables
from gr_train.optim import build_optimizer, build_schedule, follow_schedule
from gr_train.progress import Progress, set_aside, sole_writer
from gr_train.warm_up import probes, warm_up
from kernels.backend import runs_triton
from kernels.scratch import limit_scratch, scratch_limit
from parallel.attention import EXCHANGES
from parallel.batch import JaggedBatch
from parallel.dense import replicate
from parallel.embedding.tables import fused_optimizer, shard_tables
from parallel.layout import LAYOUTS
from parallel.mesh import build_mesh, local_device
from parallel.shard import Shard, shard_batch

TARGETS = 16  # of a sequence, for kernels to be compiled


@dataclass(frozen=True)
class _Batch:
    """One step's, and what a checkpoint needs to go on after it."""

    prepared: Prepared
    num_tokens: int  # that this process read
    loader_state: dict[str, Any]


class Trainer:
    """One process's part of a run. Constructing it starts the process groups."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.info = dataset_info(config)
        parallel = config.parallel
        self.device = local_device()
        self.mesh = build_mesh(
            dp=int(os.environ["WORLD_SIZE"]) // parallel.cp,
            cp=parallel.cp,
            device=self.device,
            timeout_s=parallel.timeout_s,
        )

        precision = _precision(config.train.precision, self.device)
        on_gpu = self.device.type == "cuda"
        if precision and on_gpu:  # of the loss, which autocast leaves alone: TF32
            torch.set_float32_matmul_precision("high")

        limit_scratch(int(config.model.scratch_gib * 2**30))
        torch.manual_seed(config.train.seed)
        model = DenseModel(config, self.info).to(self.device)
        self.sharding, self.layers = model.sharding, model.layers
        self.layout = LAYOUTS[model.sharding.layout](parallel.cp)
        dense: nn.Module = replicate(model, self.mesh)
        tokens_per_rank = config.data.batch_size * config.data.max_length // self.mesh.size
        embeddings = shard_tables(
            tables(config.model, self.info),
            self.mesh,
            tokens_per_rank=tokens_per_rank,
            optimizer=config.embedding.optimizer,
            lr=config.embedding.lr,
            eps=config.embedding.eps,
            seed=config.train.seed,
        )
        self.side = torch.cuda.Stream(self.device) if on_gpu else None  # where batches are prepared
        self.used: list[Prepared] = []  # whose memory the GPU may still read
        self.dense, self.parameters = dense, list(dense.parameters())
        self.model = Recommender(
            config.model,
            self.info,
            embeddings,
            dense,
            self.mesh.world,
            precision,
            config.train.fp32_residual,
            self.sharding.exchange,
            # Half the bytes of rows; inside a node the conversion would take longer than it saves.
            precision if on_gpu and self.mesh.num_nodes > 1 else None,
        )
        self.optimizer = build_optimizer(dense, config.optim)
        self.schedule = build_schedule(self.optimizer, config.optim, config.train.steps)
        self.table_optimizer = fused_optimizer(embeddings)
        self.loader = self._loader("train")
        self._loader(config.eval.split)  # if that split is missing, say so before training
        self.run_dir = Path(config.run_dir)
        self.checkpointer = Checkpointer(
            config,
            self.info,
            self.run_dir / "checkpoints",
            dense=dense,
            embeddings=embeddings,
            optimizer=self.optimizer,
            schedule=self.schedule,
            loader=self.loader,
            device=self.device,
        )
        torch.manual_seed(config.train.seed + 1 + self.mesh.rank)  # dropout differs by rank

    def fit(self) -> dict[str, Any]:
        """Train to config.train.steps; the summary (on every rank) that is also printed."""
        with ExitStack() as stack:
            refused: list[ValueError | None] = [None]
            if self.mesh.rank == 0:
                try:
                    stack.enter_context(sole_writer(self.run_dir))
                except ValueError as error:
                    refused = [error]
            with self.mesh.watchdog.doing("start"):
                dist.broadcast_object_list(refused)
            if refused[0]:  # on all ranks: one says it, instead of the others that rank 0 is gone
                raise refused[0]
            return self._fit()

    def _fit(self) -> dict[str, Any]:
        config = self.config
        first = 0
        if config.checkpoint.resume:
            with self.mesh.watchdog.doing("resume"):
                first = self._resume()
        self.dense.train()
        if self.device.type == "cuda" and runs_triton(self.device) and config.model.kind == "hstu":
            if self.mesh.rank == 0:
                print("kernels are compiled for batches of any lengths, or were before", flush=True)
            with self.mesh.watchdog.doing("compiling"):
                self.compile_ahead()
        progress, meter, loss = None, Meter(self.device, self.mesh.watchdog), float("nan")
        batches = self._batches(first)
        for step, batch in enumerate(batches, start=first + 1):
            if step == first + 1:  # only now that there is a batch, an earlier run has to go aside
                progress = self._start_progress(first)
            meter.add(self.step(step, batch.prepared, batches.begin), batch.num_tokens)
            if step == first + 1:
                freeze_objects()
            last = step == config.train.steps
            if last or _due(step, config.train.log_every):
                with self.mesh.watchdog.doing(f"log of step {step}"):
                    loss, tokens_per_s = meter.read()
                self._check_loss(step, math.isfinite(loss))
                if progress:
                    lr = float(self.schedule.get_last_lr()[0])
                    progress.train(step, loss, tokens_per_s, lr)
            if _due(step, config.eval.every) and not last:
                with meter.paused(), self.mesh.watchdog.doing(f"evaluation after step {step}"):
                    batches.settle()
                    metrics = self.evaluate()
                if progress:
                    progress.evaluation(step, metrics)
            if last or _due(step, config.checkpoint.every):
                with meter.paused(), self.mesh.watchdog.doing(f"checkpoint of step {step}"):
                    batches.settle()
                    self._check_loss(step, meter.is_finite())
                    self.checkpointer.save(step, batch.loader_state)
        return self._finish(progress, loss, meter.tokens_per_s)

    def compile_ahead(self) -> None:
        """Have an HSTU's kernels compiled for training on batches of any lengths. What was trained
        stays as it was."""
        data, model, parallel = self.config.data, self.config.model, self.config.parallel
        # This process reads so many, and its cp group trains on cp times as many, or on any.
        count = data.batch_size // (parallel.cp if parallel.balance else self.mesh.size)
        ways: list[Callable[[JaggedBatch], Shard]] = [self.shard]
        if parallel.cp > 1 and parallel.keep_whole:  # then equal ones would not be cut
            ways.append(partial(shard_batch, layout=self.layout, mesh=self.mesh))
        message = 0
        if parallel.cp > 1 and self.sharding.exchange == "ring":
            row = (model.qk_dim + model.v_dim) * (self.model.precision or torch.float32).itemsize
            message = count * data.max_length * row  # of the group's sequences, a rank's share
        kinds = probes(
            count,
            data.max_length,
            heads=model.num_heads,
            scratch=scratch_limit(),
            message=message,
        )
        warm_up(
            {str(x.recompute): x for x in self.layers}.values(),
            model.width,
            kinds,
            shards=ways,
            mask=self.model.mask,
            num_contextual=len(self.info.contextual),
            num_targets=TARGETS if model.task == "ranking" else 0,
            exchange=self.sharding.exchange,
            residual=self.model.residual,
            precision=self.model.precision,
            device=self.device,
        )

    def prepare(self, step: int, batch: JaggedBatch) -> Prepared:
        """The host's part of a step. Copies and masks are the GPU's, beside the steps before."""
        if self.side is not None:
            # Their memory may be taken again: what reads it is enqueued, and waited for.
            used, self.used = self.used, []
            self.side.wait_stream(torch.cuda.default_stream(self.device))
            used.clear()
        with torch.cuda.stream(self.side):
            return self.model.prepare(self.shard(batch), self._negatives(step))

    def step(
        self, step: int, batch: Prepared, meanwhile: Callable[[], None] | None = None
    ) -> Tensor:
        """One update. Returns this rank's loss, whose mean over ranks is the global loss.

        meanwhile: called once the forward pass is enqueued. In the backward pass a GPU is slower
        than its host, in the forward it may not be: the next batches are best made then.
        """
        if self.side is not None:
            torch.cuda.default_stream(self.device).wait_stream(self.side)
        with self.mesh.watchdog.doing(f"step {step}"):
            loss = self._step(batch, meanwhile)
        if self.side is not None:
            self.used.append(batch)  # for `prepare`, perhaps in another thread, to let go
        return loss

    def _step(self, batch: Prepared, meanwhile: Callable[[], None] | None) -> Tensor:
        follow_schedule(self.table_optimizer, self.config.embedding.lr, self.schedule)
        self.optimizer.zero_grad()
        with self.mesh.watchdog.operation("forward"):
            loss = self.model.loss(batch)
        if meanwhile:
            meanwhile()
        with self.mesh.watchdog.operation("backward"):
            loss.backward()  # updates the tables too: their optimizer is part of it
        if self.config.optim.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def shard(self, batch: JaggedBatch) -> Shard:
        keep_whole = self.config.parallel.keep_whole
        return shard_batch(batch, self.layout, self.mesh, keep_whole=keep_whole)

    def _batches(self, first: int) -> Ahead[_Batch]:
        """Of the steps after `first`. On a GPU they can be made while those before train."""
        loader, steps = iter(self.loader), itertools.count(first + 1)

        def make() -> _Batch:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a thread's own
            batch, step = next(loader), next(steps)
            state = self.loader.state_dict()
            with self.mesh.watchdog.doing(f"batch of step {step}", beside=True):
                return _Batch(self.prepare(step, batch), batch.num_tokens, state)

        count = self.config.train.steps - first
        return Ahead(make, count, threaded=self.device.type == "cuda")

    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out split, over all ranks."""
        self.dense.eval()
        loader = self._loader(self.config.eval.split)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # scores are compared: coarser ones would tie
        metrics = evaluate(self.model, loader, self.shard, self.config, self.mesh.world)
        torch.set_float32_matmul_precision(before)
        self.dense.train()
        return metrics

    def popularity(self) -> dict[str, float]:
        """The baseline on the same split; nothing for ranking."""
        if self.config.model.task == "ranking":
            return {}
        counts = item_counts(self.config, self.info, rank=self.mesh.rank, world_size=self.mesh.size)
        return popularity_metrics(
            torch.from_numpy(counts),
            self._loader(self.config.eval.split),
            self.config.eval.k,
            self.mesh.world,
        )

    def _resume(self) -> int:
        """The step that the newest checkpoint is from; 0 if there is none."""
        first, steps = self.checkpointer.resume(), self.config.train.steps
        if first >= steps:
            raise ConfigError(
                f"train.steps={steps}: the newest checkpoint in {self.run_dir} is from step "
                f"{first}; raise train.steps, or start anew without checkpoint.resume"
            )
        return first

    def _check_loss(self, step: int, is_finite: bool) -> None:
        if is_finite:
            return
        newest, left = self.checkpointer.newest(), "there is no checkpoint"
        if newest is not None:
            left = f"remove the newest checkpoint if that fails at once, too: {newest}"
        raise ValueError(
            f"step {step}: the loss is not finite; lower optim.lr or embedding.lr, raise "
            f"optim.warmup_steps, or clip gradients by optim.clip_norm; {left}"
        )

    def _finish(
        self, progress: Progress | None, loss: float, tokens_per_s: float
    ) -> dict[str, Any]:
        with self.mesh.watchdog.doing("evaluation after the last step"):
            metrics, baseline = self.evaluate(), self.popularity()
        memory = [0.0] * self.mesh.size
        mine = _peak_gib(self.device, self.mesh.links.within.nbytes)
        with self.mesh.watchdog.doing("end of the job: peak memory of all ranks"):
            dist.all_gather_object(memory, mine)
        summary = {
            "model": self.config.model.kind.upper(),
            "task": self.config.model.task,
            "loss": loss,
            "metrics": metrics,
            "popularity": baseline,
            "steps": self.config.train.steps,
            "processes": f"{self.mesh.size} (dp={self.mesh.dp}, cp={self.mesh.cp})",
            "tokens/s": f"{tokens_per_s:,.0f}",
            "peak memory, fullest rank": f"{max(memory):.1f} GiB",
            "results": str(self.run_dir),
        }
        if progress:
            progress.write("eval", self.config.train.steps, metrics)
            progress.finish(summary, baseline)
        return summary

    def _start_progress(self, first: int) -> Progress | None:
        if self.mesh.rank != 0:
            return None
        if not first:
            set_aside(self.run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.run_dir / "config.yaml")
        progress = Progress(self.run_dir, self.config.train.steps, first)
        dense = sum(p.numel() for p in self.dense.parameters())
        rows = sum(t.num_embeddings for t in tables(self.config.model, self.info))
        progress.say(
            f"{self.config.model.kind} on {self.mesh.size} x {self.device.type}: "
            f"dp={self.mesh.dp}, cp={self.mesh.cp}; {dense:,} dense parameters, "
            f"{rows:,} embedding rows of width {self.config.model.width}"
        )
        if self.mesh.cp > 1:
            layout, exchange, why = self.sharding
            link = EXCHANGES[exchange].by(self.mesh.links)
            by = f" by {link}" if link else ""
            some = "cut" if self.config.parallel.keep_whole else "all"
            how = f"{layout} layout, {exchange}{by} ({why})"
            progress.say(f"keys and values of {some} sequences: {how}")
        if first:
            progress.say(f"resumed after step {first}")
        return progress

    def _loader(self, split: Split) -> StatefulDataLoader:
        return build_loader(
            self.config, self.info, split, rank=self.mesh.rank, world_size=self.mesh.size
        )

    def _negatives(self, step: int) -> Tensor | None:
        """Item ids shared by all ranks, on the host: the step's own draw, whatever their number."""
        if self.config.model.task == "ranking":
            return None
        generator = torch.Generator().manual_seed(self.config.train.seed * 1_000_003 + step)
        size = (self.config.model.num_negatives,)
        return torch.randint(self.info.num_items, size, generator=generator)


def _precision(precision: str, device: torch.device) -> torch.dtype | None:
    """Of the dense model's matrix products; None is float32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if precision == "bf16" or (precision == "auto" and has_bf16):
        return torch.bfloat16
    return None


def freeze_objects() -> None:
    """Spare what is there by now, and stays, from being searched for garbage every few steps."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _peak_gib(device: torch.device, buffers: int) -> float:
    """buffers: bytes of messages, which PyTorch's allocator does not count."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) + buffers) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
