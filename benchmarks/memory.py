"""Memory of HSTU layers in training: what each keeps, what its backward needs, what then fits.

    python -m benchmarks.memory                        # bytes a token and layer, for each policy
    python -m benchmarks.memory --layers 18 --cp 8
    python -m benchmarks.memory --longest --json out.json

Predicted term by term, and measured: on a GPU kept bytes and the backward's peak, without one kept
bytes alone (the naive twins of the kernels keep no statistics, and need other memory). A GPU's are
all that its allocator counts: the weights cast to bf16 too, which have a line of their own since
they are as large for few tokens as for many.

--longest asks for the longest L such that a batch of sequences of L tokens fits in --memory.
Predictions ("simulated") cover cp = 1, 2, 4, 8 over the ring, all sequences cut; on a GPU, training
steps with one L after another are run for cp = 1. The published lengths beside them (arXiv
2508.04711) are for 80 GB GPUs without recomputation and a model of unknown size. The defaults are a
model that, kept whole, fits about as much at cp = 1: 8 layers, width 512, 4 heads of 128, 256
sequences a cp group.
Embedding tables, inputs and loss are not counted, nor what the allocator loses to fragments.
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.memory_terms import (
    ACTIVATED,
    ATTENDED,
    CAST,
    FORGOTTEN,
    GATED,
    HIDDEN,
    NORMED,
    STATISTICS,
    STEP,
    Model,
    X,
    casts,
    kept,
    longest,
    peak,
    workspace,
)
from gr_train.config import ModelConfig
from gr_train.model.hstu import HSTULayer
from kernels.masks import hstu_intervals
from parallel.batch import JaggedBatch
from parallel.layout import ZigzagLayout
from parallel.shard import shard_batch
from parallel.visibility import Visibility

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PUBLISHED = {1: 3_072, 2: 4_096, 4: 7_168, 8: 16_384}


class Storages(TorchDispatchMode):
    """Sees every storage that operations return, and tells which are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.terms: dict[int, str] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x)
        if function is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            self.name(out, CAST)
        return out

    def add(self, x: Tensor) -> int:
        storage = StorageWeakRef(x.untyped_storage())
        self.seen.setdefault(storage.cdata, (storage, x.untyped_storage().nbytes()))
        return storage.cdata

    def name(self, x: Tensor, term: str) -> None:
        self.terms[self.add(x)] = term

    def held(self) -> Counter[str]:
        """Bytes by term; STATISTICS is what nobody named."""
        held: Counter[str] = Counter()
        for key, (storage, size) in self.seen.items():
            if not storage.expired():
                held[self.terms.get(key, STATISTICS)] += size
        return held


def build(model: Model, policy: str, length: int) -> nn.Sequential:
    config = ModelConfig(
        width=model.width,
        num_heads=model.heads,
        qk_dim=model.dim,
        v_dim=model.dim,
        recompute=policy,  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    layers = [HSTULayer(config, length, "ring") for _ in range(model.layers)]
    return nn.Sequential(*layers).to(DEVICE)


def make_batch(sequences: int, length: int) -> Visibility:
    """Whole sequences on one device, under the causal mask."""
    lengths = torch.full((sequences,), length, dtype=torch.int32)
    ids = torch.zeros(sequences * length, dtype=torch.int64)
    batch = JaggedBatch(lengths, torch.zeros_like(lengths), {"id": ids})
    shard = shard_batch(batch, ZigzagLayout(1), None)
    return Visibility(replace(shard, device=DEVICE), hstu_intervals)


def forward(layers: nn.Sequential, x: Tensor, seen: Visibility) -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        for layer in layers:
            x = layer(x, seen)
    return x


def measure(model: Model, policy: str, tokens: int, length: int) -> dict[str, float]:
    """Of one layer: bytes a token that are held after its forward, and the backward's peak.

    CAST is in bytes.
    """
    model = replace(model, layers=1, cp=1)
    (layer,) = layers = build(model, policy, length)
    seen = make_batch(max(1, tokens // length), length)
    rows = seen.shard.rows.num_rows

    def make_input() -> Tensor:
        return torch.randn(
            rows, model.width, dtype=model.residual, device=DEVICE, requires_grad=True
        )

    out = forward(layers, make_input(), seen)
    out.backward(torch.ones_like(out))  # compiles kernels, plans, makes the gradients of weights
    del out
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    storages, plain = Storages(), layer._forward

    def named(*args: Any) -> tuple[Tensor, ...]:
        tensors = plain(*args)
        terms = (ATTENDED, NORMED, HIDDEN, ACTIVATED, GATED)
        for x, term in zip(tensors[1:], terms, strict=True):
            storages.name(x, term)
        return tensors

    layer._forward = named
    x = make_input()
    mine = seen.shard.device_rows
    for known in (seen.intervals, mine.offsets, mine.positions, *layer.parameters()):
        storages.name(known, "not the layer's")
    with storages:
        out = forward(layers, x, seen)
    storages.name(x, X)
    storages.name(out, "not the layer's")
    held = storages.held()
    del held["not the layer's"]
    cast = held.pop(CAST)
    measured = {term: n / rows for term, n in held.items()}
    measured |= {"kept": held.total() / rows, CAST: cast}
    if DEVICE.type == "cuda":
        measured["kept"] = (torch.cuda.memory_allocated() - before - out.nbytes) / rows
        torch.cuda.reset_peak_memory_stats()
        out.backward(torch.ones_like(out))
        measured["peak of one layer"] = (torch.cuda.max_memory_allocated() - before) / rows
    return measured


def longest_measured(budget: float, model: Model, policy: str, sequences: int) -> int:
    """The same at cp = 1, by running training steps of other lengths, half as far apart each."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    if budget > total:
        raise ValueError(f"--memory: this GPU has {total / 1e9:.1f} GB; ask for no more")
    torch.cuda.set_per_process_memory_fraction(budget / total)
    steps = range(1, 5 * longest(budget, model, policy, sequences) // (4 * STEP))
    return STEP * bisect(steps, False, key=lambda n: not fits(model, policy, sequences, n * STEP))


def fits(model: Model, policy: str, sequences: int, length: int) -> bool:
    """Whether a training step runs."""
    try:
        train(model, policy, sequences, length)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def train(model: Model, policy: str, sequences: int, length: int) -> None:
    layers = build(model, policy, length)
    optimizer = torch.optim.AdamW(layers.parameters())
    for batch in ((1, STEP), (sequences, length)):  # the first makes the optimizer's moments
        seen = make_batch(*batch)
        x = torch.randn(seen.shard.rows.num_rows, model.width, dtype=model.residual, device=DEVICE)
        out = forward(layers, x.requires_grad_(), seen)
        del x
        out.backward(torch.ones_like(out))
        optimizer.step()
        optimizer.zero_grad()
        del out


def measure_terms(model: Model, tokens: int, length: int) -> tuple[Table, dict[str, Any]]:
    table = Table("bytes a token", title="One layer, cp = 1, unless it says otherwise")
    results: dict[str, Any] = {}
    columns = []
    for policy in FORGOTTEN:
        measured = measure(model, policy, tokens, length)
        alone, single = replace(model, layers=1, cp=1), replace(model, cp=1)
        results[policy] = dict(
            predicted=kept(model, policy)
            | {"kept": sum(kept(model, policy).values()), CAST: casts(model)}
            | {f"backward: {term}": n for term, n in workspace(model).items()}
            | {"peak of one layer": sum(peak(alone, policy).values())}
            | {f"peak of {model.layers} layers": sum(peak(single, policy).values())}
            | {
                f"peak of {model.layers} layers, cp = {model.cp}": sum(peak(model, policy).values())
            },
            measured=measured,
        )
        for name, column in results[policy].items():
            table.add_column(f"{policy}\n{name}", justify="right")
            columns.append(column)
    for term in results["none"]["predicted"]:
        cells = (f"{column[term]:,.0f}" if term in column else "" for column in columns)
        table.add_row(term, *cells, end_section=term == CAST)
    return table, results


def find_longest(model: Model, memory: float, sequences: int) -> tuple[Table, dict[str, Any]]:
    title = f"Longest L: {sequences} sequences of L tokens a cp group, {memory:g} GB a GPU"
    table = Table("", "", *(f"cp = {cp}" for cp in PUBLISHED), title=title)
    results: dict[str, Any] = {}
    for policy in FORGOTTEN:
        lengths = [
            longest(1e9 * memory, replace(model, cp=cp), policy, sequences) for cp in PUBLISHED
        ]
        results[policy] = dict(simulated=dict(zip(PUBLISHED, lengths, strict=True)))
        table.add_row(policy, "simulated", *(f"{n:,}" for n in lengths))
        if DEVICE.type == "cuda":
            found = longest_measured(1e9 * memory, replace(model, cp=1), policy, sequences)
            results[policy]["measured"] = {1: found}
            table.add_row(policy, "measured", f"{found:,}")
    table.add_row("none", "arXiv 2508.04711", *(f"{n:,}" for n in PUBLISHED.values()))
    return table, results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128, help="of a head")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--cp", type=int, default=2, help="of the last predicted peak")
    parser.add_argument("--residual", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--length", type=int, default=4096 if DEVICE.type == "cuda" else 64)
    parser.add_argument("--tokens", type=int, default=65536 if DEVICE.type == "cuda" else 256)
    parser.add_argument("--longest", action="store_true", help="the longest sequences that fit")
    parser.add_argument("--memory", type=float, default=80, help="GB of 10^9 bytes, for --longest")
    parser.add_argument("--sequences", type=int, default=256, help="a cp group, for --longest")
    parser.add_argument("--json", help="file for all numbers")
    args = parser.parse_args()

    residual = getattr(torch, args.residual)
    model = Model(args.width, args.heads, args.dim, args.layers, residual, args.cp)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU, kept bytes only"
    console = Console(width=110)
    console.print(
        f"{device}, torch {torch.__version__}: {args.layers} layers, width {args.width}, "
        f"{args.heads} heads of {args.dim}, {args.residual} residual stream"
    )
    if args.longest:
        table, results = find_longest(model, args.memory, args.sequences)
    else:
        table, results = measure_terms(model, args.tokens, args.length)
    console.print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(device=device, args=vars(args), results=results), file, indent=1)


if __name__ == "__main__":
    main()
