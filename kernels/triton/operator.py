"""Triton attention as one operator, `gr_kernels::attention`, for autograd and torch.compile.

Registered by hand: what `torch.library.custom_op` puts around an operator (checks for aliases,
wrappers around autograd) costs the host more than the launches themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.columns import empty_gradients
from kernels.jagged import Jagged
from kernels.source import Source
from kernels.triton import launch
from kernels.weighting import Weighting

INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor q_positions, Tensor k_offsets, "
    "Tensor k_positions, Tensor intervals, SymInt? max_length, float alpha, float scale, "
    "bool deterministic"
)
OUTPUTS = "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv"


def attention(q: Tensor, k: Tensor, v: Tensor, *mask_and_more: Any) -> Tensor:
    """`kernels.attention.hstu_attention` without its checks, on the tensors of its `Jagged`s."""
    *mask, _deterministic = mask_and_more
    return launch.forward(q, Source((k, v), _weighting(*mask)), out=_empty_output(q, k, v))


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *mask_and_gradients: Any
) -> None:
    """Writes the gradients of `attention` for q, k and v."""
    *mask, deterministic, dq, dk, dv = mask_and_gradients
    options = dict(deterministic=deterministic, out=(dq, dk, dv))
    launch.gradients(dout, q, k, v, _weighting(*mask), **options)


def _weighting(
    q_offsets: Tensor,
    q_positions: Tensor,
    k_offsets: Tensor,
    k_positions: Tensor,
    intervals: Tensor,
    max_length: int | None,
    alpha: float,
    scale: float,
) -> Weighting:
    """max_length: of the queries."""
    queries, keys = Jagged(q_offsets, q_positions, max_length), Jagged(k_offsets, k_positions)
    return Weighting(queries, keys, intervals, alpha, scale)


def _empty_output(q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> Tensor:
        ctx.mask = mask  # the very tensors: plans know them
        ctx.save_for_backward(q, k, v)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.gr_kernels.attention(q, k, v, *mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        qkv = ctx.saved_tensors  # once: each access would have them computed again
        grads = empty_gradients(*qkv)
        torch.ops.gr_kernels.attention_backward(dout, *qkv, *ctx.mask, *grads)
        return *grads, *(None for _ in ctx.mask)


_library = torch.library.Library("gr_kernels", "DEF")
_library.define(f"attention({INPUTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.define(
    f"attention_backward(Tensor dout, {INPUTS}, {OUTPUTS}) -> ()", tags=torch.Tag.pt2_compliant_tag
)
for _device in ("CPU", "CUDA"):
    _library.impl("attention", attention, _device)
    _library.impl("attention_backward", attention_backward, _device)
_library.impl("attention", _Attention.apply, "Autograd")
torch.library.register_fake("gr_kernels::attention", _empty_output, lib=_library)
torch.library.register_fake("gr_kernels::attention_backward", lambda *_: None, lib=_library)
