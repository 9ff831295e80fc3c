"""SiLU and its derivative through tanh, which Hopper and its like compute in one instruction.

With h = x / 2: sigmoid(x) = (1 + tanh(h)) / 2, so silu(x) = h + h tanh(h).
"""

# ruff: noqa: N803 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """FAST: the GPU's instruction (relative error 2^-11: for 16-bit inputs), else exp (float32)."""
    if FAST:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 2 / (1 + tl.exp(-2 * x)) - 1


# For h at masked pairs: tanh is exactly -1 there, so silu and its derivative are exactly 0.
UNSEEN = tl.constexpr(-40.0)


@triton.jit
def silu(h, FAST: tl.constexpr):
    """silu(2 h)."""
    return h + h * tanh(h, FAST)


@triton.jit
def silu_and_twice_slope(h, FAST: tl.constexpr):
    """silu(x) and 2 silu'(x) at x = 2 h; silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x)))."""
    t = tanh(h, FAST)
    return h + h * t, t * (1 - h * t) + (1 + h)
