"""How unequal dp groups' work is, as read and dealt by `parallel.balance`. Simulated: no GPU.

    python -m benchmarks.balance --config configs/long_sequence.yaml model.input_style=interleaved

Users' numbers of events follow Zipf's law, cut to --max-events; the config says what an event and
a context are in tokens, and what model their cost is of: FLOPs, as in training. A step takes as
long as its slowest group's work; 1.00 is all groups equal.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from gr_train.config import Config, load_config
from gr_train.model.mask import sequence_flops
from parallel.balance import deal
from parallel.batch import JaggedBatch


def zipf_events(
    rng: np.random.Generator, exponent: float, most: int, size: int | None = None
) -> np.ndarray:
    """Numbers of events that follow Zipf's law, those above `most` cut to it."""
    return np.minimum(rng.zipf(exponent, size), most)


def slowest_over_mean(costs: Tensor, groups: Tensor) -> float:
    """costs [N], the group of each int64 [N], none empty."""
    work = torch.bincount(groups, weights=costs)
    return float(work.max() / work.mean())


def measure(args: argparse.Namespace, config: Config) -> dict[str, list[float]]:
    """Slowest over mean work of every batch, by who deals."""
    rng = np.random.default_rng(0)
    tokens_per_event = 2 if config.model.input_style == "interleaved" else 1
    num_contextual = len(config.data.synthetic.contextual_sizes)
    as_read = torch.arange(args.groups).repeat_interleave(args.batch)
    ratios: dict[str, list[float]] = {"as read": [], "dealt": []}
    for _ in range(args.batches):
        events = zipf_events(rng, args.exponent, args.max_events, as_read.numel())
        lengths = torch.from_numpy(num_contextual + tokens_per_event * events).int()
        batch = JaggedBatch(lengths, torch.zeros_like(lengths), {})
        costs = sequence_flops(config.model, num_contextual, batch)
        for name, groups in (("as read", as_read), ("dealt", deal(costs, args.groups))):
            ratios[name].append(slowest_over_mean(costs, groups))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=8, help="dp groups")
    parser.add_argument("--batch", type=int, default=32, help="sequences a group")
    parser.add_argument("--exponent", type=float, default=1.2, help="of Zipf's law, over 1")
    parser.add_argument("--max-events", type=int, default=4096, help="of a user")
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--config", help="as of gr-train train")
    parser.add_argument("overrides", nargs="*", help="such as model.width=1024")
    args = parser.parse_args()
    if args.exponent <= 1 or min(args.groups, args.batch, args.max_events, args.batches) < 1:
        parser.error("--exponent: want more than 1, of the rest 1 or more")

    try:
        config = load_config(args.config, [*args.overrides, "parallel.cp=1"], world_size=1)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"simulated: {args.groups} dp groups of {args.batch} sequences, Zipf({args.exponent:g}) up "
        f"to {args.max_events:,} events, {args.batches} batches; slowest group's work over the mean"
    )
    print(f"{'':8} {'mean':>6} {'worst':>6}")
    for name, ratios in measure(args, config).items():
        print(f"{name:8} {sum(ratios) / len(ratios):6.3f} {max(ratios):6.3f}")


if __name__ == "__main__":
    main()
