"""What makes a config impossible, found before any process group or device is touched."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from gr_train.config import Config


class ConfigError(ValueError):
    """A config that cannot work. The message names the field, its value and the way out."""


# Field -> least allowed value, first value beyond the allowed (or None).
RANGES: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(
        (
            "data.max_length",
            "data.batch_size",
            "data.synthetic.num_items",
            "data.synthetic.num_actions",
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
        (1, None),
    ),
    **dict.fromkeys(
        (
            "data.num_workers",
            "model.time_buckets",
            "model.scratch_gib",
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
        ),
        (0, None),
    ),
    "data.synthetic.num_tasks": (1, 63),  # labels are bits of an int64
    "train.seed": (0, 2**31),
    "model.dropout": (0, 1),
    "optim.beta1": (0, 1),
    "optim.beta2": (0, 1),
}

MAX_HEAD_DIM = 256  # `kernels.attention.TRITON_MAX_DIM`, which is not here before torch is


def validate(config: Config, world_size: int) -> None:
    """Raise ConfigError for what cannot work. Pure: reads no file and no device."""
    _check_ranges(config)
    _check_mesh(config, world_size)
    _check_model(config)
    _check_mask(config)
    _check_data(config)


def _check_ranges(config: Config) -> None:
    for name, (least, beyond) in RANGES.items():
        value = attrgetter(name)(config)
        if not (math.isfinite(value) and value >= least and (beyond is None or value < beyond)):
            number = "" if math.isfinite(value) else "a number, "
            below = "" if beyond is None else f" and below {beyond}"
            _refuse(name, value, f"want {number}{least} or more{below}")


def _check_mesh(config: Config, world_size: int) -> None:
    parallel, data = config.parallel, config.data
    if world_size == 1 and parallel.cp > 1:
        _refuse(
            "parallel.cp",
            parallel.cp,
            "this job is one process, for which parallel.cp=1 is the way; torchx or torchrun "
            "start more",
        )
    if world_size % parallel.cp:
        _refuse(
            "parallel.cp",
            parallel.cp,
            f"does not divide the {world_size} processes of this job; choose a divisor, "
            "or start another number of processes",
        )
    sizes = (("data.batch_size", data.batch_size), ("eval.batch_size", config.eval.batch_size))
    for name, size in sizes:
        if size % world_size:
            _refuse(name, size, f"must be a multiple of the {world_size} processes, which share it")
    if (readers := data.readers) is not None:
        multiples = range(world_size, data.batch_size + 1, world_size)
        fit = [n for n in multiples if data.batch_size % n == 0]
        if readers not in fit:
            nearest = min(fit, key=lambda n: abs(n - readers))
            _refuse(
                "data.readers",
                readers,
                f"must be a multiple of the job's number of processes, {world_size}, that divides "
                f"data.batch_size={data.batch_size}, such as {nearest}",
            )


def _check_model(config: Config) -> None:
    model, parallel = config.model, config.parallel
    if not (math.isfinite(model.temperature) and model.temperature > 0):
        _refuse("model.temperature", model.temperature, "want a positive number")
    if parallel.exchange == "ulysses" and model.num_heads % parallel.cp:
        _refuse(
            "parallel.exchange",
            parallel.exchange,
            f"shares model.num_heads={model.num_heads} among parallel.cp={parallel.cp} processes; "
            "choose heads that cp divides, or the ring",
        )
    for name, dim in (("model.qk_dim", model.qk_dim), ("model.v_dim", model.v_dim)):
        if dim > MAX_HEAD_DIM and model.kind == "hstu":
            _refuse(
                name, dim, f"HSTU's kernels take up to {MAX_HEAD_DIM}; use more model.num_heads"
            )
    if model.recompute != "none" and model.kind != "hstu":
        _refuse("model.recompute", model.recompute, "only HSTU's layers can; use none")
    if not model.deterministic and model.kind != "hstu":
        _refuse("model.deterministic", False, "only HSTU's attention need not be; use true")
    if model.width % 4:
        _refuse(
            "model.width",
            model.width,
            f"embedding tables want a multiple of 4, such as {model.width + -model.width % 4}",
        )
    if model.recompute_layers is not None and model.recompute == "none":
        _refuse(
            "model.recompute_layers",
            model.recompute_layers,
            "model.recompute=none recomputes nothing; set that to projections, or this to null",
        )
    if model.recompute_layers is not None and not 0 <= model.recompute_layers <= model.num_layers:
        _refuse(
            "model.recompute_layers",
            model.recompute_layers,
            f"want 0 to model.num_layers={model.num_layers}",
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
    if not config.eval.k or min(config.eval.k) < 1:
        _refuse("eval.k", config.eval.k, "want at least one positive cutoff, such as [10]")


def _check_mask(config: Config) -> None:
    mask = config.model.mask
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


def _check_data(config: Config) -> None:
    data, synthetic = config.data, config.data.synthetic
    if data.source == "parquet":
        if data.path is None:
            _refuse("data.path", data.path, "data.source=parquet reads a folder; name it")
        return
    if data.readers is not None:
        _refuse("data.readers", data.readers, "only data.source=parquet has them; set it to null")
    if not 2 <= synthetic.min_events <= synthetic.mean_events <= synthetic.max_events:
        _refuse(
            "data.synthetic.mean_events",
            synthetic.mean_events,
            f"want 2 <= min_events={synthetic.min_events} <= mean_events "
            f"<= max_events={synthetic.max_events}",
        )
    if any(size < 1 for size in synthetic.contextual_sizes):
        _refuse(
            "data.synthetic.contextual_sizes",
            synthetic.contextual_sizes,
            "each is the vocabulary size of a feature; want 1 or more",
        )
    least = len(synthetic.contextual_sizes)
    least += synthetic.num_candidates if config.model.task == "ranking" else 0
    least += 2 if config.model.input_style == "interleaved" else 1
    if data.max_length < least:
        _refuse(
            "data.max_length",
            data.max_length,
            f"contextual tokens, candidates and one event take {least}; want that or more",
        )


def _refuse(name: str, value: object, way_out: str) -> NoReturn:
    raise ConfigError(f"{name}={value}: {way_out}")
