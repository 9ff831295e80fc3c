"""Command line: gr-train train (one process of a job) and gr-train prepare (data sets)."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

PATIENCE_S = 10.0  # more than a process takes to end, and than they differ in finding an error


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr for what the user can mend; 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        if os.environ.get("GR_TRAIN_TRACEBACK"):
            raise
        # Most errors are found by every process. Local rank 0 speaks first, and once it has ended
        # the launcher ends the others; one that is still there has found what rank 0 did not.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(PATIENCE_S)
        print(f"gr-train: error: {_one_line(error)}", file=sys.stderr, flush=True)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gr-train",
        description=__doc__,
        epilog="With GR_TRAIN_TRACEBACK=1 in the environment, errors come with their traceback.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="train; one process of a job when torchrun or torchx starts it"
    )
    train.add_argument("--config", required=True, help="YAML file, see configs/")
    train.add_argument("overrides", nargs="*", help="such as parallel.cp=4 model.num_layers=8")
    train.set_defaults(run=_train)

    prepare = commands.add_parser("prepare", help="turn a public data set into Parquet")
    sets = prepare.add_subparsers(required=True, metavar="DATASET")
    movielens = sets.add_parser("movielens", help="100K u.data, 1M ratings.dat, 20M ratings.csv")
    movielens.add_argument("file", help="the raw ratings, gzipped or not")
    movielens.add_argument("--out", required=True, help="folder to write")
    movielens.add_argument("--task", choices=("retrieval", "ranking"), default="retrieval")
    movielens.add_argument(
        "--num-candidates", type=int, default=10, help="ranking: events held out per split"
    )
    movielens.add_argument(
        "--positive-rating",
        type=float,
        default=4.0,
        help="ranking: the least rating that is a like",
    )
    movielens.set_defaults(run=_prepare_movielens)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from gr_train.config import load_config  # before torch: a bad config is refused at once

    config = load_config(arguments.config, arguments.overrides, world_size=_world_size())
    _check_writable("run_dir", Path(config.run_dir))  # every process writes its part there
    # Without a launcher this is a job of one process.
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(name, value)
    _quiet()
    import torch.distributed as dist

    from gr_train.trainer import Trainer

    Trainer(config).fit()
    dist.destroy_process_group()
    return 0


def _prepare_movielens(arguments: argparse.Namespace) -> int:
    from gr_train.data.movielens import prepare_movielens

    _check_writable("--out", Path(arguments.out))
    written = prepare_movielens(
        Path(arguments.file),
        Path(arguments.out),
        task=arguments.task,
        num_candidates=arguments.num_candidates,
        positive_rating=arguments.positive_rating,
    )
    print(
        f"{arguments.out}: {written.ratings:,} ratings of {written.items:,} items by "
        f"{written.users:,} users; {written.skipped_users:,} users with too few were left out"
    )
    return 0


def _world_size() -> int:
    found = os.environ.get("WORLD_SIZE", "1")
    if not found.isdecimal() or int(found) < 1:
        raise ValueError(
            f"WORLD_SIZE={found}: want the job's number of processes; torchrun and torchx set it, "
            "else unset it"
        )
    return int(found)


def _check_writable(name: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"{name}={folder}: cannot be written ({error.strerror}); choose another"
        ) from error


def _one_line(error: ValueError) -> str:
    """Without the traceback that a loader worker puts before its error."""
    return str(error).strip().rpartition("\n")[2].removeprefix("ValueError: ")


def _quiet() -> None:
    """Libraries' notes on their own deprecations are no news to a user."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    for name in ("torchrec.distributed.planner", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
