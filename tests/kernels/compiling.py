"""Compiles attention's kernels, as they would be launched, for a GPU that need not be there.

    python -m tests.kernels.compiling 86 bfloat16
    python -m tests.kernels.compiling 86 float32
    python -m tests.kernels.compiling 90 resident
    python -m tests.kernels.compiling 90 ahead

resident: those whose programs stay, as they are launched with less usual arguments. Writes a line
for each: dtype, head dim, kernel, bytes of shared memory, columns of tensor memory, and what ptxas
warns of, such as of products that have to wait for each other (C75..); of what is found in Triton's
cache it warns no more. ahead: a few, by other processes, of which one fails; for each, whether this
one finds it in the cache. A process of its own, since Triton either compiles or interprets.
"""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.jagged import Jagged
from kernels.masks import hstu_intervals
from kernels.source import Source
from kernels.triton import configs, launch, resident, walk
from kernels.triton.ahead import Elsewhere, compile_all
from kernels.triton.launcher import Launcher, Wanted, not_compiled
from kernels.weighting import Weighting
from tests.kernels.sass import unset_operands

HEADS = 2
MANY, FEW = 25_000, 10_000  # rows, see `configs`
# Head dims of float32, by capability. The same blocks for every GPU: they fit into all if into the
# one with the least memory.
FLOAT32 = {86: (128, 256), 100: (256,)}
ATTENTION = {
    *("resident_forward_kernel", "resident_gradients_kernel", "resident_unordered_kernel"),
    *("forward_kernel", "query_kernel", "key_value_kernel", "query_slopes_kernel"),
}


def compile_attention(dim: int, dtype: torch.dtype, num_rows: int, of_one_source: bool) -> None:
    """As in a ring; of one source, for which there is less to compile, only if asked to."""
    lengths = torch.tensor([num_rows], dtype=torch.int32)
    rows = Jagged.whole(lengths)
    intervals = hstu_intervals(rows, lengths, torch.zeros_like(lengths))
    weighting = Weighting(rows, rows, intervals, 1.0, 1.0)
    q, k, v, dout = torch.empty(4, rows.num_rows, HEADS, dim, dtype=dtype)
    if of_one_source:
        out, dq, dk, dv = torch.empty(4, rows.num_rows, HEADS, dim, dtype=dtype)
        launch.forward(q, Source((k, v), weighting), out=out)
        launch.gradients(dout, q, k, v, weighting, out=(dq, dk, dv))
    sums = torch.empty(q.shape, dtype=torch.float32)
    keys, queries = Source((k, v), weighting), Source((q, dout), weighting)
    launch.forward(q, keys, keys, add=sums, out=sums)
    launch.query_gradient(dout, q, keys, keys, out=sums)
    launch.key_value_gradients(k, v, queries, queries, out=(sums, sums))


def compile_resident(dim: int, dtype: torch.dtype) -> None:
    rows = Jagged.whole(torch.tensor([MANY], dtype=torch.int32))
    weighting = Weighting(rows, rows, rows.offsets.new_empty(rows.num_rows, 4), 1.0, 1.0)
    q, k = torch.empty(2, rows.num_rows, HEADS, 128, dtype=dtype)
    v = torch.empty(rows.num_rows, HEADS, dim, dtype=dtype)
    source, sums, partial = Source((k, v), weighting), torch.empty(v.shape), torch.empty(q.shape)
    launch.forward(q, source, out=torch.empty_like(v))
    launch.forward(q, source, add=sums, out=sums)
    launch.forward(q, source, add=sums, out=torch.empty_like(v))
    launch.query_gradient(v, q, source, out=torch.empty_like(q))
    launch.query_gradient(v, q, source, add=partial, out=torch.empty_like(q))
    if dim == 128:
        out = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        launch.gradients(v, q, k, v, weighting, deterministic=False, out=out)
        source, sums = Source((q, v), weighting), (partial, partial)
        launch.key_value_gradients(k, v, source, add=sums, out=sums)
        launch.key_value_gradients(k, v, source, add=sums, out=(out[1], out[2]))


def compile_ahead() -> None:
    def run() -> None:
        rows = Jagged.whole(torch.tensor([FEW], dtype=torch.int32))
        weighting = Weighting(rows, rows, rows.offsets.new_empty(FEW, 4), 1.0, 1.0)
        q, k, v, out = torch.empty(4, FEW, 1, 64, dtype=torch.bfloat16)
        launch.forward(q, Source((k, v), weighting), out=out)

    kernels = not_compiled(run)
    compile_all([Wanted("kernels.triton", "missing", (), {}), *kernels], 2)
    knobs.compilation.listener = lambda *, src, cache_hit, **of: print(src.name, cache_hit)
    for kernel in kernels:
        kernel.compile()


def main(capability: int, which: str) -> None:
    driver.set_active(Elsewhere(GPUTarget("cuda", capability, 32)))

    def show(self: Launcher, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        name = self.kernel.fn.__name__
        if name in ATTENTION:
            with redirect_stdout(StringIO()) as log:
                compiled = self.kernel.warmup(*args, grid=grid, **constants)
            columns = getattr(compiled.metadata, "tmem_size", 0)
            faults = re.findall(r"C\d{4}", log.getvalue()) if name.startswith("resident") else []
            if hopper:
                faults += unset_operands(compiled.asm["cubin"])
            print(dtype, dim, name, compiled.metadata.shared, columns, faults, flush=True)

    gpu = SimpleNamespace(type="cuda")
    config_for, hopper = configs.config_for, capability == 90
    configs._is_hopper = lambda device: hopper  # type: ignore[assignment]
    walk.config_for = lambda *problem: config_for(*problem[:-1], gpu)  # type: ignore
    resident.multiprocessors = lambda device: 132  # type: ignore[assignment]
    walk.Walk.is_cuda = property(lambda self: True, lambda self, value: None)  # type: ignore
    if which == "ahead":
        compile_ahead()
        return
    knobs.nvidia.dump_ptxas_log = True
    Launcher._launch = show  # type: ignore[method-assign]
    if which == "resident":
        for dtype, dim in (torch.bfloat16, 128), (torch.float16, 64):
            compile_resident(dim, dtype)
        return
    dtype = getattr(torch, which)
    of_16_bits = [(128, MANY), (256, MANY), *([(128, FEW)] if hopper else [])]
    of_32_bits = [(dim, MANY) for dim in FLOAT32.get(capability, ())]
    for dim, num_rows in of_32_bits if which == "float32" else of_16_bits:
        tightest = which == "float32" and dim == 256
        compile_attention(dim, dtype, num_rows, of_one_source=hopper or tightest)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
