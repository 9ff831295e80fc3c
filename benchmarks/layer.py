"""Times one HSTU layer, forward and backward, and weighs what it keeps. For whoever touches it.

    python -m benchmarks.layer                                    # width 1024, 4 heads of 256
    python -m benchmarks.layer --lengths 410-4096 --width 512 --dim 128 --dropout 0.1
    python -m benchmarks.layer --policy projections --kernels --json out.json
    python -m benchmarks.layer --lengths 32768 --mask causal semi-local window --plot out.png

Random data under bf16 autocast, by default with a bf16 residual stream as in training. Times of the
whole are CUDA events, the median; its split into attention, matrix products and the rest is the sum
of the kernels' own times in a profile; what attention's backward does of the projection's, see
`kernels.projection.Projected`, counts as attention. `plain` is the same layer in PyTorch's
operations around the same attention. Attention's plan, made once per batch for all layers, is not
in the times. FLOPs are counted from the mask's intervals as in `benchmarks.attention`, of matrix
products 2 a weight and token forward, 6 in all; what is computed again does not count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import Work, chart, installed, milliseconds, plot
from gr_train.config import ModelConfig
from gr_train.model.hstu import HSTULayer
from gr_train.model.mask import layer_flops
from kernels.jagged import Jagged
from kernels.masks import interval_lengths
from kernels.triton import backward, forward, slopes
from kernels.triton.hopper import forward as resident_forward
from kernels.triton.hopper import gradients, unordered
from kernels.triton.launcher import Launcher
from parallel.attention import context_parallel_attention
from parallel.shard import Shard
from parallel.visibility import Visibility

POLICIES = ("plain", "none", "projections")
MASKS = ("causal", "semi-local", "window")
MATMUL = re.compile("gemm|nvjet|cutlass|xmma|splitk", re.IGNORECASE)
ATTENTION = {
    name
    for module in (forward, backward, slopes, resident_forward, gradients, unordered)
    for name, value in vars(module).items()
    if isinstance(value, Launcher)
}


class PlainLayer(HSTULayer):
    """The same layer, one PyTorch operation after the other."""

    def forward(self, x: Tensor, seen: Visibility) -> Tensor:
        bias = torch.cat([self.u_bias, self.vqk_bias])
        projected = F.linear(self.input_norm(x), self.uvqk.weight, bias)
        u, v, q, k = F.silu(projected).split(self.splits, dim=-1)
        attended = context_parallel_attention(
            q.unflatten(-1, (self.heads, self.qk_dim)),
            k.unflatten(-1, (self.heads, self.qk_dim)),
            v.unflatten(-1, (self.heads, self.v_dim)),
            seen=seen,
            alpha=self.alpha,
            scale=self.scale,
        )
        gated = self.output_norm(attended.flatten(1)) * u
        return x + self.output(F.dropout(gated, self.dropout))


def configure(policy: str, args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        width=args.width,
        num_heads=args.heads,
        qk_dim=args.dim,
        v_dim=args.dim,
        dropout=args.dropout,
        recompute="none" if policy == "plain" else policy,  # type: ignore[arg-type]
    )


def make_batch(work: Work) -> Visibility:
    """A whole batch on one GPU."""
    host = torch.tensor(work.draw_lengths(), dtype=torch.int32)
    none = torch.zeros_like(host)
    shard = Shard(host, none, (Jagged.whole(host),), {}, None, 0, torch.device("cuda"))
    return Visibility(shard, work.intervals)


def profile(call: Callable[[], object], steps: int = 3) -> Counter[str]:
    """Milliseconds a step of each CUDA kernel."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time / 1000 / steps  # type: ignore[assignment]
    return times


def kind(kernel: str) -> str:
    if kernel in ATTENTION:
        return "attention"
    return "matmul" if MATMUL.search(kernel) else "rest"


def measure(policy: str, args: argparse.Namespace, work: Work) -> dict:
    seen = make_batch(work)
    config, tokens = configure(policy, args), seen.shard.rows.num_rows
    torch.manual_seed(0)
    kind_of_layer = PlainLayer if policy == "plain" else HSTULayer
    layer = kind_of_layer(config, int(seen.shard.lengths.max()), "ring").cuda()
    dtype = getattr(torch, args.residual)
    x = torch.randn(tokens, args.width, device="cuda", dtype=dtype, requires_grad=True)
    dout = torch.randn_like(x)
    wanted = [x, *layer.parameters()]

    def run() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return layer(x, seen)

    def step() -> None:
        torch.autograd.grad(run(), wanted, dout)

    step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    saved = torch.cuda.memory_allocated() - before
    torch.autograd.grad(out, wanted, dout)
    peak = torch.cuda.max_memory_allocated() - before
    del out
    milliseconds(step, 3)
    total = statistics.median(milliseconds(step, args.repeats))
    alone = statistics.median(milliseconds(run, args.repeats))

    kernels_ms = profile(step)
    split: Counter[str] = Counter()
    for name, ms in kernels_ms.items():
        split[kind(name)] += ms  # type: ignore[assignment]
    pairs = float(interval_lengths(seen.intervals).sum().double())
    of_attention, of_projections = layer_flops(config, pairs, tokens)
    return dict(
        work=work.name,
        policy=policy,
        tokens=tokens,
        total_ms=total,
        forward_ms=alone,
        forward_tflops=(of_attention + of_projections) / alone / 1e9,
        step_tflops=(3.5 * of_attention + 3 * of_projections) / total / 1e9,
        **{f"{part}_ms": split[part] for part in ("attention", "matmul", "rest")},
        rest_share=split["rest"] / split.total(),
        saved_bytes_per_token=saved / tokens,
        peak_bytes_per_token=peak / tokens,
        kernels=dict(kernels_ms.most_common()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--policy", nargs="*", choices=POLICIES, default=POLICIES)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=256, help="of a head")
    parser.add_argument("--lengths", default="4096", help="4096, or 410-4096 for uniform")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--mask", nargs="+", choices=MASKS, default=["causal"])
    parser.add_argument("--window", type=int, default=1024, help="of the mask of that name")
    parser.add_argument("--local", type=int, default=Work.local, help="of semi-local")
    parser.add_argument("--prefix", type=int, default=Work.prefix, help="of semi-local")
    parser.add_argument("--residual", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--kernels", action="store_true", help="every kernel's time too")
    parser.add_argument("--json", help="file for all numbers")
    parser.add_argument("--plot", type=chart, help="file for a bar chart, .png or .svg")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")

    works = [
        Work(
            mask,
            args.lengths,
            args.tokens,
            "semi-local" if mask == "semi-local" else "hstu",
            window=args.window if mask == "window" else 0,
            local=args.local,
            prefix=args.prefix,
            heads=args.heads,
            dim=args.dim,
        )
        for mask in args.mask
    ]
    gpu, versions = torch.cuda.get_device_name(), installed()
    print(
        f"{gpu}, {versions}: width {args.width}, {args.heads} heads of {args.dim}, lengths "
        f"{args.lengths}, {sum(works[0].draw_lengths())} tokens, {args.residual} residual stream, "
        f"dropout {args.dropout:g}\n"
        f"{'mask':10} {'policy':12} {'ms':>8} {'TFLOP/s':>8} {'forward':>8} {'TFLOP/s':>8}"
        f" {'attention':>10} {'matmul':>8} {'rest':>8} {'rest %':>7}"
        f" {'saved B/token':>14} {'peak B/token':>13}"
    )
    rows = []
    for work, policy in itertools.product(works, args.policy):
        rows.append(row := measure(policy, args, work))
        print(
            f"{work.name:10} {policy:12} {row['total_ms']:8.3f} {row['step_tflops']:8.0f}"
            f" {row['forward_ms']:8.3f} {row['forward_tflops']:8.0f}"
            f" {row['attention_ms']:10.3f} {row['matmul_ms']:8.3f} {row['rest_ms']:8.3f}"
            f" {100 * row['rest_share']:7.1f} {row['saved_bytes_per_token']:14.0f}"
            f" {row['peak_bytes_per_token']:13.0f}",
            flush=True,
        )
        if args.kernels:
            for name, ms in row["kernels"].items():
                print(f"    {ms:8.3f} ms  {kind(name):9}  {name[:100]}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(gpu=gpu, versions=versions, args=vars(args), rows=rows), file, indent=1)
    if args.plot:
        bars = [row | {"kernel": row["policy"]} for row in rows]
        plot(bars, args.plot, ("forward", "step"))


if __name__ == "__main__":
    main()
