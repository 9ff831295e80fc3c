"""Compiles attention's kernels, as they would be launched, for a GPU that need not be there.

    python -m tests.kernels.compiling 86

Writes a line for each: dtype, head dim, kernel, bytes of shared memory, columns of tensor memory,
and what ptxas warns of. A process of its own, since Triton either compiles or interprets.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.jagged import Jagged
from kernels.masks import hstu_intervals
from kernels.source import Source
from kernels.triton import configs, launch
from kernels.triton.launcher import Launcher
from kernels.weighting import Weighting

HEADS, LENGTH = 2, 25_000  # neither short nor few, see `configs`
ATTENTION = {
    "resident_forward_kernel",
    *("forward_kernel", "query_kernel", "key_value_kernel", "query_slopes_kernel"),
}


class Elsewhere:
    """What Triton asks of a driver to compile."""

    def __init__(self, capability: int) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def compile_attention(dim: int, dtype: torch.dtype) -> None:
    lengths = torch.tensor([LENGTH], dtype=torch.int32)
    rows = Jagged.whole(lengths)
    intervals = hstu_intervals(rows, lengths, torch.zeros_like(lengths))
    weighting = Weighting(rows, rows, intervals, 1.0, 1.0)
    q, k, v, dout = torch.empty(4, rows.num_rows, HEADS, dim, dtype=dtype)
    out, dq, dk, dv = torch.empty(4, rows.num_rows, HEADS, dim, dtype=dtype)
    launch.forward(q, Source((k, v), weighting), out=out)
    launch.gradients(dout, q, k, v, weighting, out=(dq, dk, dv))
    as_in_a_ring = torch.empty(out.shape, dtype=torch.float32)
    launch.forward(q, *[Source((k, v), weighting)] * 2, add=as_in_a_ring, out=as_in_a_ring)


def compile_resident() -> None:
    lengths = torch.tensor([LENGTH], dtype=torch.int32)
    rows = Jagged.whole(lengths)
    weighting = Weighting(rows, rows, rows.offsets.new_empty(rows.num_rows, 4), 1.0, 1.0)
    q, k, v = torch.empty(3, rows.num_rows, HEADS, 128, dtype=torch.bfloat16)
    source, partial = Source((k, v), weighting), torch.empty(q.shape)
    launch.forward(q, source, out=torch.empty_like(q))
    launch.forward(q, source, add=partial, out=partial)


def warnings_of(ptx: str) -> str:
    """What ptxas warns of, such as of products that have to wait for each other (C75..)."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
        assert target is not None
        assembler = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target[1]}", "-o", "/dev/null"]
        done = subprocess.run([*assembler, path], capture_output=True, text=True, check=True)
    return ",".join(sorted(set(re.findall(r"C\d{4}", done.stderr))))


def main(capability: int) -> None:
    driver.set_active(Elsewhere(capability))

    def show(self: Launcher, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        name = self.kernel.fn.__name__
        if name in ATTENTION:
            compiled = self.kernel.warmup(*args, grid=grid, **constants)
            columns = getattr(compiled.metadata, "tmem_size", 0)
            warnings = warnings_of(compiled.asm["ptx"]) if name.startswith("resident") else ""
            print(dtype, dim, name, compiled.metadata.shared, columns, warnings, flush=True)

    gpu = SimpleNamespace(type="cuda")
    config_for, hopper = configs.config_for, capability == 90
    Launcher._launch = show  # type: ignore[method-assign]
    configs._is_hopper = lambda device: hopper  # type: ignore[assignment]
    launch.config_for = lambda *problem: config_for(*problem[:-1], gpu)  # type: ignore
    launch._multiprocessors = lambda device: 132  # type: ignore[assignment]
    launch._Walk.is_cuda = property(lambda self: True, lambda self, value: None)  # type: ignore
    for dtype in torch.bfloat16, torch.float32:
        for dim in 128, 256:
            compile_attention(dim, dtype)
    if hopper:
        configs.HOPPER[128] = replace(configs.HOPPER[128], resident=configs.RESIDENT)
        compile_resident()


if __name__ == "__main__":
    main(int(sys.argv[1]))
