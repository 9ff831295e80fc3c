"""The schema of a run: structured OmegaConf dataclasses, their loading and their validation.

`load_config` merges a YAML file and dotlist overrides into `Config` and refuses what cannot work
before any process group or device is touched. To add an option, add a field here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Literal, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A config that cannot work. The message names the field, its value and the way out."""


@dataclass
class SyntheticConfig:
    """Sequences made up on the fly, deterministic by seed (gr_train/data/synthetic.py)."""

    num_items: int = 1000
    num_actions: int = 4
    contextual_sizes: list[int] = field(
        default_factory=list
    )  # vocabulary of each contextual feature
    num_tasks: int = 2  # binary tasks a candidate is labelled with
    num_candidates: int = 10  # per sequence, for ranking
    min_events: int = 4
    mean_events: float = 50.0
    max_events: int = 200
    num_eval_sequences: int = 512


@dataclass
class DataConfig:
    source: Literal["synthetic", "parquet"] = "synthetic"
    path: str | None = None  # parquet: folder with dataset.json and train/, valid/, test/
    max_length: int = 512  # tokens a sequence; the oldest events beyond it are dropped
    batch_size: int = 32  # sequences a step, of the whole job
    readers: int | None = None  # parquet: how many ways the rows are dealt; default: one a process
    num_workers: int = 0  # loader processes per training process; parquet: times the readers
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass
class MaskConfig:
    """Which keys a history query sees (kernels/masks.py). All zero: all before it."""

    window: int = 0
    full_suffix: int = 0
    local: int = 0  # semi-local: the last `local` positions and the first `prefix`
    prefix: int = 0


@dataclass
class ModelConfig:
    kind: Literal["hstu", "sasrec"] = "hstu"
    task: Literal["retrieval", "ranking"] = "retrieval"
    input_style: Literal["interleaved", "merged"] = "merged"
    num_layers: int = 2
    width: int = 64  # of embeddings and of the residual stream
    num_heads: int = 2
    qk_dim: int = 32  # per head
    v_dim: int = 32  # per head
    dropout: float = 0.0
    # What an HSTU layer computes again in the backward pass, to keep less. none: nothing.
    # projections: its normed input, U, V, Q, K and gated output; a quarter of the activations
    # stays, for one more matrix product. Attention never runs twice.
    recompute: Literal["none", "projections"] = "none"
    recompute_layers: int | None = None  # only the first so many; default: all
    time_buckets: int = 128  # log-spaced time gaps; 0: no time encoding
    mask: MaskConfig = field(default_factory=MaskConfig)
    num_negatives: int = 512  # retrieval: shared by the whole batch, drawn anew each step
    temperature: float = 0.05  # retrieval: of the L2-normed inner products


@dataclass
class EmbeddingConfig:
    plan: str = "auto"  # TorchRec's planner
    optimizer: Literal["rowwise_adagrad", "sgd"] = "rowwise_adagrad"
    lr: float = 0.05
    eps: float = 1e-8


@dataclass
class ParallelConfig:
    cp: int = 1  # processes that share each sequence
    dp: int | None = None  # groups of them; default: world size / cp
    layout: Literal["zigzag", "contiguous"] = "zigzag"
    # How keys and values reach the ranks that need them (parallel/exchange/). auto: halo for
    # windowed and semi-local masks, whose queries see little of the sequence, else ring.
    exchange: Literal["auto", "ring", "all_gather", "halo", "ulysses"] = "auto"
    balance: bool = True  # deal each step's sequences to the dp groups by their work
    timeout_s: int = 600  # a collective that waits longer ends the job


@dataclass
class OptimConfig:
    """AdamW for the dense parameters. The schedule scales the tables' learning rate as well."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.0
    warmup_steps: int = 20
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: float = 1.0  # of all dense gradients; 0: off


@dataclass
class EvalConfig:
    every: int = 0  # steps; 0: only at the end
    split: Literal["valid", "test"] = "test"
    k: list[int] = field(default_factory=lambda: [10, 50])
    batch_size: int = 64  # sequences of the whole job
    item_chunk: int = 4096  # items scored at a time


@dataclass
class CheckpointConfig:
    every: int = 0  # steps; 0: only at the end
    keep: int = 2
    resume: bool = False  # from the newest checkpoint of this run, if there is one


@dataclass
class TrainConfig:
    steps: int = 100
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device has it
    log_every: int = 10


@dataclass
class Config:
    run_dir: str = "runs/default"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, world_size: int
) -> Config:
    """YAML file, then `key.sub=value` overrides, over the defaults; validated for `world_size`.

    Raises ConfigError for unknown keys, wrong types and combinations that cannot work.
    """
    merged = OmegaConf.structured(Config)
    sources: list[tuple[str, object]] = []
    try:
        if path is not None:
            if not Path(path).is_file():
                raise ConfigError(f"--config: no file {str(path)!r}")
            sources.append((str(path), OmegaConf.load(path)))
        for item in overrides:
            if "=" not in item:
                raise ConfigError(f"override {item!r}: want key=value, such as parallel.cp=2")
            sources.append((f"override {item!r}", OmegaConf.from_dotlist([item])))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from error
    for name, source in sources:
        try:
            merged = OmegaConf.merge(merged, source)
        except (OmegaConfBaseException, ValueError) as error:
            field_name = getattr(error, "full_key", None) or ""
            message = str(error).splitlines()[0]
            raise ConfigError(
                f"{name}: {field_name}: {message}. gr_train/config.py lists every field."
            ) from error
    config = cast(Config, OmegaConf.to_object(merged))
    if (
        config.parallel.dp is None
        and config.parallel.cp > 0
        and world_size % config.parallel.cp == 0
    ):
        config.parallel.dp = world_size // config.parallel.cp
    validate(config, world_size)
    return config


def save_config(config: Config, path: Path) -> None:
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def validate(config: Config, world_size: int) -> None:
    """Refuse what cannot work. Pure: reads no file and no device."""
    _check_ranges(config)
    parallel, model, data = config.parallel, config.model, config.data

    if world_size % parallel.cp:
        _refuse(
            "parallel.cp",
            parallel.cp,
            f"does not divide the {world_size} processes of this job; choose a divisor, "
            "or start another number of processes with -j NODESxPROCESSES",
        )
    if parallel.dp is None or parallel.dp * parallel.cp != world_size:
        _refuse(
            "parallel.dp",
            parallel.dp,
            f"times parallel.cp={parallel.cp} is not the {world_size} processes of this job; "
            "leave parallel.dp out to have it computed",
        )
    for name, size in (
        ("data.batch_size", data.batch_size),
        ("eval.batch_size", config.eval.batch_size),
    ):
        if size % world_size:
            _refuse(name, size, f"must be a multiple of the {world_size} processes, which share it")
    if data.readers is not None:
        if data.readers % world_size:
            _refuse("data.readers", data.readers, f"must be a multiple of {world_size} processes")
        if data.batch_size % data.readers:
            _refuse("data.readers", data.readers, f"must divide data.batch_size={data.batch_size}")

    if parallel.exchange == "ulysses" and model.num_heads % parallel.cp:
        _refuse(
            "parallel.exchange",
            parallel.exchange,
            f"shares model.num_heads={model.num_heads} among parallel.cp={parallel.cp} processes; "
            "choose heads that cp divides, or the ring",
        )
    if model.kind == "sasrec":
        if parallel.cp > 1:
            _refuse(
                "parallel.cp",
                parallel.cp,
                "softmax attention is not split; use 1 for model.kind=sasrec",
            )
        if model.num_heads * model.qk_dim != model.width or model.qk_dim != model.v_dim:
            _refuse(
                "model.qk_dim",
                model.qk_dim,
                "SASRec wants qk_dim == v_dim == width / num_heads = "
                f"{model.width / model.num_heads:g}",
            )
    mask = model.mask
    if mask.local and (mask.window or mask.full_suffix):
        _refuse(
            "model.mask.local",
            mask.local,
            "semi-local and window masks exclude each other; set one to 0",
        )
    if mask.prefix and not mask.local:
        _refuse(
            "model.mask.prefix",
            mask.prefix,
            "belongs to semi-local masks; set model.mask.local too",
        )
    if mask.full_suffix and not mask.window:
        _refuse(
            "model.mask.full_suffix",
            mask.full_suffix,
            "exempts from a window; set model.mask.window too",
        )
    if model.recompute != "none" and model.kind != "hstu":
        _refuse("model.recompute", model.recompute, "only HSTU's layers can; use none")
    if model.recompute_layers is not None and not 0 <= model.recompute_layers <= model.num_layers:
        _refuse(
            "model.recompute_layers",
            model.recompute_layers,
            f"want 0 to model.num_layers={model.num_layers}",
        )
    if not 0 <= model.dropout < 1:
        _refuse("model.dropout", model.dropout, "want a probability in [0, 1)")
    if model.temperature <= 0:
        _refuse("model.temperature", model.temperature, "want a positive number")
    if config.embedding.plan != "auto":
        _refuse(
            "embedding.plan", config.embedding.plan, "only 'auto', TorchRec's planner, is supported"
        )

    if data.source == "parquet" and data.path is None:
        _refuse("data.path", data.path, "data.source=parquet reads a folder; name it")
    synthetic = data.synthetic
    if not 2 <= synthetic.min_events <= synthetic.mean_events <= synthetic.max_events:
        _refuse(
            "data.synthetic.mean_events",
            synthetic.mean_events,
            f"want 2 <= min_events={synthetic.min_events} <= mean_events "
            f"<= max_events={synthetic.max_events}",
        )
    if not config.eval.k or min(config.eval.k) < 1:
        _refuse("eval.k", config.eval.k, "want at least one positive cutoff, such as [10]")


LEAST = {
    **dict.fromkeys(
        (
            "data.max_length",
            "data.batch_size",
            "data.synthetic.num_items",
            "data.synthetic.num_actions",
            "data.synthetic.num_tasks",
            "data.synthetic.num_candidates",
            "data.synthetic.num_eval_sequences",
            "model.num_layers",
            "model.width",
            "model.num_heads",
            "model.qk_dim",
            "model.v_dim",
            "model.num_negatives",
            "parallel.cp",
            "parallel.timeout_s",
            "train.steps",
            "train.log_every",
            "eval.batch_size",
            "eval.item_chunk",
            "checkpoint.keep",
        ),
        1,
    ),
    **dict.fromkeys(
        (
            "data.num_workers",
            "model.time_buckets",
            "model.mask.window",
            "model.mask.full_suffix",
            "model.mask.local",
            "model.mask.prefix",
            "embedding.lr",
            "embedding.eps",
            "optim.lr",
            "optim.weight_decay",
            "optim.clip_norm",
            "optim.warmup_steps",
            "eval.every",
            "checkpoint.every",
            "train.seed",
        ),
        0,
    ),
}


def _check_ranges(config: Config) -> None:
    for name, least in LEAST.items():
        value = attrgetter(name)(config)
        if value < least:
            _refuse(name, value, f"want {least} or more")


def _refuse(name: str, value: object, way_out: str) -> None:
    raise ConfigError(f"{name}={value}: {way_out}")
