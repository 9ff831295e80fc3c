"""The schema of a run, as structured OmegaConf dataclasses, and its loading.

`load_config` merges a YAML file and dotlist overrides into `Config` and refuses what cannot work
(gr_train/validate.py) before any process group or device is touched. To add an option, add a field
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from gr_train.validate import ConfigError, validate


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
    # Whether attention's backward gives the same bits from run to run. If not, it is faster: on
    # Hopper, in 16 bits, if no sequence of a batch is cut, for heads (qk_dim and v_dim) wider than
    # 64, up to 128, and sequences of 16,384 tokens or more in the mean that are not few.
    deterministic: bool = True
    # GiB that attention's backward may take for a moment to be faster: on Hopper, in 16 bits, where
    # no sequence is cut and heads are wider than 128, or up to 64 and the mean sequence under 512
    # tokens, or `deterministic` is false. Lower it if a job runs out of memory; 0: none.
    scratch_gib: float = 4.0
    time_buckets: int = 128  # log-spaced time gaps; 0: no time encoding
    mask: MaskConfig = field(default_factory=MaskConfig)
    num_negatives: int = 512  # retrieval: shared by the whole batch, drawn anew each step
    temperature: float = 0.05  # retrieval: of the L2-normed inner products


@dataclass
class EmbeddingConfig:
    optimizer: Literal["rowwise_adagrad", "sgd"] = "rowwise_adagrad"
    lr: float = 0.05
    eps: float = 1e-8


@dataclass
class ParallelConfig:
    cp: int = 1  # processes that share sequences; the rest of the mesh is data parallel
    # Which positions a rank holds (parallel/layout.py), and how keys and values reach the ranks
    # that need them (parallel/exchange/). auto: contiguous and halo where queries see a window, so
    # short that contiguous chunks are equal work, else zigzag and ring.
    layout: Literal["auto", "zigzag", "contiguous"] = "auto"
    exchange: Literal["auto", "ring", "all_gather", "halo", "ulysses"] = "auto"
    keep_whole: bool = True  # cut only the sequences that must be, for ranks to have equal work
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
    # Of matrix products; auto: bf16 where the device has it. On GPUs bf16 is also what embeddings
    # and their gradients travel in, and the loss multiplies in TF32; parameters stay float32.
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # Of the sum of all layers' outputs that runs through the model, and of its gradient. False:
    # that of train.precision, as in most trainings of this field. True rounds the sum less, for
    # models of very many layers; under bf16 it costs memory and a few percent of a step's time.
    fp32_residual: bool = False
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
    sources: list[tuple[str, Any]] = []
    if path is not None:
        sources.append((str(path), _read(Path(path))))
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"override {item!r}: want key=value, such as parallel.cp=2")
        try:
            sources.append((f"override {item!r}", OmegaConf.from_dotlist([item])))
        except (OmegaConfBaseException, YAMLError) as error:
            raise ConfigError(f"override {item!r}: {_first_line(error)}") from error
    merged = OmegaConf.structured(Config)
    for name, source in sources:
        try:
            merged = OmegaConf.merge(merged, source)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            where = f"{name}: {getattr(error, 'full_key', None) or ''}".removesuffix(": ")
            what = _first_line(error).rstrip(".")
            if "is not a ListConfig" in what:
                what = "want a list, such as [10]"
            raise ConfigError(f"{where}: {what} (gr_train/config.py lists every field)") from error
    try:
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # an interpolation of nothing
        raise ConfigError(f"{getattr(error, 'full_key', '')}: {_first_line(error)}") from error
    validate(config, world_size)
    return config


def save_config(config: Config, path: Path) -> None:
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"--config: no file {str(path)!r}")
    try:
        loaded = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}{_problem(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: want a mapping of options, found a {type(loaded).__name__}")
    return loaded


def _problem(error: Exception) -> str:
    """In one line; YAML's own words have the place in another one."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f", line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return f": not a YAML file: {' '.join(str(error).split())}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
