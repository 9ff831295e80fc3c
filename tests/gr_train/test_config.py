"""Configs that cannot work are refused with the field, the value and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gr_train.config import ConfigError, load_config, save_config
from gr_train.validate import MAX_HEAD_DIM
from kernels.attention import TRITON_MAX_DIM

PARQUET = "data.source=parquet data.path=data"
PROJECTIONS = "model.recompute=projections"
CONFIGS = sorted(Path("configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    wants = OmegaConf.load(path).parallel.cp
    load_config(path, world_size=wants)


def test_there_are_shipped_configs() -> None:
    assert {path.stem for path in CONFIGS} >= {"quickstart", "movielens", "long_sequence"}


def test_overrides_win() -> None:
    config = load_config(
        "configs/quickstart.yaml", ["parallel.cp=4", "model.num_layers=8"], world_size=8
    )
    assert (config.parallel.cp, config.model.num_layers) == (4, 8)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_layerz=2", ["num_layerz", "'num_layers'? (gr_train/config.py lists"]),
        ("model.num_layers=two", ["model.num_layers", "two"]),
        ("model.num_layers=0", ["model.num_layers=0", "1 or more"]),
        ("model.kind=bert", ["model.kind", "bert", "hstu"]),
        ("parallel.cp=3", ["parallel.cp=3", "4 processes"]),
        ("parallel.cp=0", ["parallel.cp=0"]),
        ("data.batch_size=6", ["data.batch_size=6", "multiple of the 4"]),
        (f"{PARQUET} data.readers=6", ["data.readers=6", "multiple", "such as 4"]),
        (f"{PARQUET} data.readers=32", ["data.readers=32", "batch_size=48, such as 24"]),
        ("data.readers=4", ["data.readers=4", "only data.source=parquet"]),
        ("model.width=66", ["model.width=66", "multiple of 4, such as 68"]),
        ("model.qk_dim=257", ["model.qk_dim=257", "up to 256", "num_heads"]),
        ("model.v_dim=512", ["model.v_dim=512", "up to 256"]),
        ("model.recompute_layers=1", ["model.recompute_layers=1", "model.recompute=none"]),
        ("parallel.cp=4 parallel.exchange=ulysses", ["parallel.exchange=ulysses", "num_heads=2"]),
        ("data.source=parquet", ["data.path"]),
        ("model.recompute=all", ["model.recompute", "projections"]),
        (f"{PROJECTIONS} model.recompute_layers=3", ["recompute_layers=3", "num_layers=2"]),
        ("model.scratch_gib=-1", ["model.scratch_gib=-1", "0 or more"]),
        ("model.kind=sasrec", ["parallel.cp=2", "sasrec"]),
        ("model.kind=sasrec model.deterministic=false", ["model.deterministic=False", "use true"]),
        ("model.mask.prefix=4", ["model.mask.prefix=4", "model.mask.local"]),
        ("model.mask.full_suffix=4", ["model.mask.full_suffix=4", "model.mask.window"]),
        ("model.dropout=1.5", ["model.dropout=1.5"]),
        ("data.synthetic.mean_events=1", ["data.synthetic.mean_events"]),
        ("eval.k=[]", ["eval.k"]),
        ("eval.k=10", ["eval.k", "want a list, such as [10]"]),
        ("eval.k.0=10", ["eval.k.0=10", "gr_train/config.py"]),
        ("optim.lr=-1", ["optim.lr=-1", "0 or more"]),
        ("optim.lr=nan", ["optim.lr=nan: want a number, 0 or more"]),
        ("optim.beta1=2", ["optim.beta1=2", "below 1"]),
        ("model.temperature=.inf", ["model.temperature=inf"]),
        ("data.max_length=1 model.input_style=interleaved", ["data.max_length=1", "take 2"]),
        ("data.max_length=5 model.task=ranking", ["data.max_length=5", "take 11"]),
        ("data.synthetic.contextual_sizes=[0]", ["data.synthetic.contextual_sizes=[0]"]),
        ("data.synthetic.num_tasks=70", ["data.synthetic.num_tasks=70", "below 63"]),
        ("train.seed=99999999999", ["train.seed=99999999999"]),
        ("run_dir=${nothing}", ["nothing"]),
        ("model=3", ["override 'model=3'"]),
        ("parallel.cp", ["'parallel.cp'", "key=value"]),
    ],
)
def test_refusals(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("configs/quickstart.yaml", override.split(), world_size=4)
    for word in words:
        assert word in str(caught.value)


def test_head_dims_are_those_of_the_kernels() -> None:
    assert MAX_HEAD_DIM == TRITON_MAX_DIM


def test_one_process_is_told_its_way() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.cp=2: .*one process.*parallel\.cp=1"):
        load_config("configs/quickstart.yaml", world_size=1)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"configs/none\.yaml"):
        load_config("configs/none.yaml", world_size=1)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1", ", line "),
        ("a: 1\n\tb: 2", ", line 2, column 1: found "),
        ("- 1\n- 2", ": want a mapping"),
        ("a: 1\na: 2", ", line 2, column 1: found duplicate key a"),
        ("\x00\xff", ": not a YAML file: "),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_config(path, world_size=1)
    assert str(caught.value).startswith(f"{path}{problem}")
    assert len(str(caught.value).splitlines()) == 1


def test_saved_config_loads_back_for_any_number_of_processes(tmp_path: Path) -> None:
    config = load_config("configs/movielens.yaml", ["eval.k=[5, 10]"], world_size=2)
    save_config(config, tmp_path / "config.yaml")
    for world_size in (2, 4):
        assert load_config(tmp_path / "config.yaml", world_size=world_size) == config
