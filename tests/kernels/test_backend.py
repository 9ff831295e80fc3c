"""A machine without Triton takes PyTorch by itself."""

from __future__ import annotations

import subprocess
import sys

WITHOUT_TRITON = """
import builtins, importlib.util, sys
find, load = importlib.util.find_spec, builtins.__import__

def refuse(name, *rest, **more):
    if name.split(".")[0] == "triton":
        raise ModuleNotFoundError(name)
    return load(name, *rest, **more)

builtins.__import__ = refuse
importlib.util.find_spec = lambda name, *rest: name != "triton" and find(name, *rest) or None

import pytest, torch
from kernels.attention import hstu_attention
from kernels.jagged import Jagged
from kernels.masks import hstu_intervals
from kernels.norm import branch_norm

lengths = torch.tensor([5, 2], dtype=torch.int32)
rows = Jagged.whole(lengths)
q, k, v = torch.randn(3, 7, 2, 8)
intervals = hstu_intervals(rows, lengths, torch.zeros_like(lengths))
attend = dict(queries=rows, keys=rows, intervals=intervals, alpha=1.0, scale=1.0)
out = hstu_attention(q, k, v, **attend)
torch.testing.assert_close(out, hstu_attention(q, k, v, **attend, backend="naive"))
branch_norm(out.flatten(1), torch.ones(16), torch.zeros(16), eps=1e-6)
with pytest.raises(ValueError, match="backend"):
    hstu_attention(q, k, v, **attend, backend="triton")
assert "triton" not in sys.modules
"""


def test_without_triton() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, timeout=120)
