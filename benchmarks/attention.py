"""Times HSTU attention, forward and backward, beside its peers. For whoever touches the kernels.

    python -m benchmarks.attention                        # the table of works below
    python -m benchmarks.attention --work causal-4096 --dim 256 --json out.json --plot out.png
    python -m benchmarks.attention --lengths 100-8192 --tokens 65536 --targets 20
    python -m benchmarks.attention --peer-path ~/generative-recommenders

Random data, CUDA events, the median; all rows of one run take turns, also those of different works,
so that the GPU's temperature and its clock favour none. FLOPs are counted from the mask's
intervals, 4 H D per visible pair forward and 2.5 times that backward, for every kernel alike,
whatever it computes besides.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor

from kernels.attention import hstu_attention
from kernels.jagged import Jagged
from kernels.masks import hstu_intervals, interval_lengths, semi_local_intervals


@dataclass(frozen=True)
class Work:
    """One shape of problem."""

    name: str
    lengths: str  # "4096", or "410-4096" for uniform
    tokens: int = 65536  # sequences are drawn until there are this many
    mask: str = "hstu"  # causal but for the next three; or semi-local (the two after)
    contextual: int = 0
    targets: int = 0
    window: int = 0
    local: int = 1024
    prefix: int = 128
    heads: int = 4
    dim: int = 128

    def draw_lengths(self) -> list[int]:
        low, _, high = self.lengths.partition("-")
        rng = random.Random(0)
        lengths: list[int] = []
        while sum(lengths) < self.tokens:
            lengths.append(rng.randint(int(low), int(high or low)))
        return lengths

    def intervals(self, queries: Jagged, lengths: Tensor, num_targets: Tensor) -> Tensor:
        """int32 [rows, 4]: which keys each query sees; see `kernels.masks`."""
        whole = (queries, lengths, num_targets)
        if self.mask == "semi-local":
            return semi_local_intervals(*whole, local=self.local, prefix=self.prefix)
        return hstu_intervals(*whole, num_contextual=self.contextual, window=self.window)


MASKS = ("hstu", "semi-local")
WORKS = [
    Work("causal-4096", "4096"),
    Work("causal-16384", "16384"),
    Work("jagged-4096", "410-4096", contextual=4, targets=20),
    Work("jagged-16384", "1638-16384", contextual=4, targets=20),
    Work("short", "20-500", tokens=266000),
    Work("full-32768", "32768"),
    Work("semi-local-32768", "32768", mask="semi-local"),
    Work("causal-4096-d64", "4096", dim=64),
    Work("causal-4096-d256", "4096", dim=256),
]


class Problem:
    """A work's tensors."""

    def __init__(self, work: Work, dtype: torch.dtype) -> None:
        self.work = work
        self.lengths = work.draw_lengths()
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device="cuda")
        self.targets = lengths.clamp(max=work.targets)
        self.rows = Jagged.whole(lengths, sum(self.lengths), max(self.lengths))
        self.intervals = work.intervals(self.rows, lengths, self.targets)
        shape = (self.rows.num_rows, work.heads, work.dim)
        self.q, self.k, self.v, self.dout = (
            torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4)
        )
        self.alpha, self.scale = work.dim**-0.5, 1 / max(self.lengths)
        pairs = int(interval_lengths(self.intervals).sum())
        self.flops = 4 * pairs * work.heads * work.dim

    def dense(self, x: Tensor) -> Tensor | None:
        """[B, H, L, D] for kernels without jagged rows, if the lengths and the mask allow."""
        work = self.work
        causal = work.mask == "hstu" and not (work.contextual or work.targets or work.window)
        if not causal or len(set(self.lengths)) > 1:
            return None
        return x.unflatten(0, (len(self.lengths), -1)).transpose(1, 2).contiguous()


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Candidate = tuple[Attention, list[Tensor], Tensor]  # the function, q k v, dout


def ours(problem: Problem, deterministic: bool) -> Candidate:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hstu_attention(
            q,
            k,
            v,
            queries=problem.rows,
            keys=problem.rows,
            intervals=problem.intervals,
            alpha=problem.alpha,
            scale=problem.scale,
            deterministic=deterministic,
        )

    return attend, [problem.q, problem.k, problem.v], problem.dout


def sdpa(problem: Problem, backend: str) -> Candidate | None:
    """PyTorch's softmax attention: another function, but the same products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    tensors = [problem.dense(x) for x in (problem.q, problem.k, problem.v, problem.dout)]
    q, k, v, dout = tensors
    if q is None or k is None or v is None or dout is None:
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend, [q, k, v], dout


def generative_recommenders(problem: Problem) -> Candidate | None:
    """Meta's Triton kernel, tuned for this length, which takes minutes. It divides by its longest
    length."""
    from generative_recommenders.common import set_use_runtime_max_seq_len
    from generative_recommenders.ops.triton import triton_hstu_attention as theirs

    set_use_runtime_max_seq_len(True)
    # On short sequences and an H200, this one reads memory not its own, and ends the process.
    faulty = dict(BLOCK_M=32, BLOCK_N=128, UNROLL=4)
    backward = theirs._hstu_attn_bwd
    backward.configs = [x for x in backward.configs if not faulty.items() <= x.kwargs.items()]
    work = problem.work
    if work.mask == "semi-local":
        return None
    offsets = problem.rows.offsets.long()
    targets = problem.targets.long() if work.targets else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return theirs.triton_hstu_mha(
            N=max(problem.lengths),
            alpha=problem.alpha,
            q=q,
            k=k,
            v=v,
            seq_offsets=offsets,
            num_targets=targets,
            max_attn_len=work.window,
            contextual_seq_len=work.contextual,
        )

    return attend, [problem.q, problem.k, problem.v], problem.dout


# What there is to time; None if it cannot do a problem.
CANDIDATES: dict[str, Callable[[Problem], Candidate | None]] = {
    "gr-train": lambda problem: ours(problem, deterministic=True),
    "gr-train, unordered": lambda problem: ours(problem, deterministic=False),
    "SDPA cuDNN": lambda problem: sdpa(problem, "CUDNN_ATTENTION"),
    "SDPA flash": lambda problem: sdpa(problem, "FLASH_ATTENTION"),
}


Call = Callable[[], object]
Key = tuple[str, str, str]  # work, kernel, direction


def milliseconds(call: Call, repeats: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def prepare(problem: Problem) -> tuple[list[dict], dict[Key, Call]]:
    """One row a candidate, with its answer's distance to the first's, and what is to be timed."""
    calls: dict[Key, Call] = {}
    rows: list[dict] = []
    reference: Tensor | None = None
    work = problem.work.name
    for name, make in CANDIDATES.items():
        try:
            candidate = make(problem)
            if candidate is None:
                continue
            attend, tensors, dout = candidate
            tensors = [x.detach().requires_grad_() for x in tensors]
            out = attend(*tensors)
            torch.autograd.grad(out, tensors, dout, retain_graph=True)
        except (ImportError, RuntimeError) as error:
            print(f"{work}: {name} did not run: {str(error).splitlines()[0]}")
            continue
        plain = [x.detach() for x in tensors]
        calls[work, name, "forward"] = lambda attend=attend, plain=plain: attend(*plain)
        calls[work, name, "backward"] = lambda out=out, tensors=tensors, dout=dout: (
            torch.autograd.grad(out, tensors, dout, retain_graph=True)
        )
        row = dict(work=work, kernel=name, tokens=problem.rows.num_rows, flops=problem.flops)
        if not name.startswith("SDPA"):
            answer = out.detach().float()
            reference = answer if reference is None else reference
            row["difference"] = float((answer - reference).norm() / reference.norm())
        rows.append(row)
    return rows, calls


def measure(rows: list[dict], calls: dict[Key, Call], rounds: int, repeats: int) -> None:
    """Add median times and TFLOP/s to the rows."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            milliseconds(call, 2)
            # Kernels are timed, not the host: they wait until it has asked for all, 1 ms for each.
            torch.cuda._sleep(2_000_000 * repeats)
            times[key] += milliseconds(call, repeats)
    for row in rows:
        for direction, factor in (("forward", 1.0), ("backward", 2.5)):
            ms = statistics.median(times[row["work"], row["kernel"], direction])
            row[f"{direction}_ms"] = ms
            row[f"{direction}_tflops"] = factor * row["flops"] / ms / 1e9


def installed() -> str:
    """What numbers depend on besides the GPU."""
    return f"torch {torch.__version__}, triton {version('triton')}"


def peer(path: str) -> str:
    """--peer-path, from where it is imported from now on."""
    sys.path.insert(0, path)
    if importlib.util.find_spec("generative_recommenders") is None:
        raise argparse.ArgumentTypeError(f"there is no package generative_recommenders in {path}")
    return path


def chart(path: str) -> str:
    """--plot's file, refused before anything is measured if nothing can draw it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install -e '.[plot]'")
    return path


def plot(rows: list[dict], path: str, directions: tuple[str, str]) -> None:
    """Bars of TFLOP/s, both ways: a group for each work, in it a bar for each kernel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    works = list(dict.fromkeys(row["work"] for row in rows))
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    figure, axes = pyplot.subplots(2, 1, figsize=(2 + 1.4 * len(works), 7), sharex=True)
    for axis, direction in zip(axes, directions, strict=True):
        for i, kernel in enumerate(kernels):
            mine = [row for row in rows if row["kernel"] == kernel]
            at = [works.index(row["work"]) + 0.8 * i / len(kernels) for row in mine]
            heights = [row[f"{direction}_tflops"] for row in mine]
            axis.bar(at, heights, 0.8 / len(kernels), align="edge", label=kernel)
        axis.set_ylabel(f"{direction}, TFLOP/s")
    axes[0].legend()
    axes[1].set_xticks([x + 0.4 for x in range(len(works))], works, rotation=20, ha="right")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [work.name for work in WORKS]
    parser.add_argument("--work", nargs="+", choices=names, help="works to run, instead of all")
    for field in dataclasses.fields(Work)[1:]:
        kind = str if field.name in ("lengths", "mask") else int
        choices = MASKS if field.name == "mask" else None
        parser.add_argument(
            f"--{field.name}",
            type=kind,
            choices=choices,
            help=f"instead of each work's {field.name}",
        )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--peer-path", type=peer, help="a checkout of generative-recommenders")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=6, help="timed calls a round")
    parser.add_argument("--json", help="file for all numbers")
    parser.add_argument("--plot", type=chart, help="file for a bar chart, .png or .svg")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")
    if args.work and args.lengths:
        parser.error("--work names works whose lengths are known, --lengths makes one of its own")

    changes = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(Work)[1:]
        if getattr(args, field.name) is not None
    }
    works = [work for work in WORKS if not args.work or work.name in args.work]
    if args.lengths:
        works = [Work("custom", **changes)]
    if args.peer_path:
        CANDIDATES["generative-recommenders"] = generative_recommenders
    gpu, versions = torch.cuda.get_device_name(), installed()
    print(f"{gpu}, {versions}, {args.dtype}")
    rows: list[dict] = []
    calls: dict[Key, Call] = {}
    for work in works:
        problem = Problem(dataclasses.replace(work, **changes), getattr(torch, args.dtype))
        more_rows, more_calls = prepare(problem)
        rows += more_rows
        calls |= more_calls
    measure(rows, calls, args.rounds, args.repeats)
    print(f"{'work':18} {'kernel':24} {'fwd ms':>8} {'TFLOP/s':>8} {'bwd ms':>8} {'TFLOP/s':>8}")
    for row in rows:
        print(
            f"{row['work']:18} {row['kernel']:24}"
            f" {row['forward_ms']:8.3f} {row['forward_tflops']:8.0f}"
            f" {row['backward_ms']:8.3f} {row['backward_tflops']:8.0f}"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(gpu=gpu, versions=versions, dtype=args.dtype, rows=rows), file, indent=1)
    if args.plot:
        plot(rows, args.plot, ("forward", "backward"))


if __name__ == "__main__":
    main()
