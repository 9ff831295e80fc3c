"""Triton attention as one operator, `gr_kernels::attention`, for autograd and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.columns import empty_gradients
from kernels.jagged import Jagged
from kernels.triton import launch
from kernels.weighting import Weighting


@torch.library.custom_op("gr_kernels::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    q_positions: Tensor,
    k_offsets: Tensor,
    k_positions: Tensor,
    intervals: Tensor,
    alpha: float,
    scale: float,
) -> Tensor:
    """`kernels.attention.hstu_attention` without its checks, on the tensors of its `Jagged`s."""
    return launch.forward(
        q,
        k,
        v,
        Weighting(
            Jagged(q_offsets, q_positions), Jagged(k_offsets, k_positions), intervals, alpha, scale
        ),
        out=q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
    )


@torch.library.custom_op("gr_kernels::attention_backward", mutates_args=("dq", "dk", "dv"))
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    q_positions: Tensor,
    k_offsets: Tensor,
    k_positions: Tensor,
    intervals: Tensor,
    alpha: float,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Writes the gradients of `attention` for q, k and v."""
    weighting = Weighting(
        Jagged(q_offsets, q_positions), Jagged(k_offsets, k_positions), intervals, alpha, scale
    )
    launch.key_value_gradients(dout, q, k, v, weighting, out=(dk, dv))
    launch.query_gradient(dout, q, k, v, weighting, out=dq)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, *ctx.mask, ctx.alpha, ctx.scale = inputs  # the mask's very tensors: plans know them
    ctx.save_for_backward(q, k, v)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    grads = empty_gradients(*ctx.saved_tensors)
    attention_backward(dout, *ctx.saved_tensors, *ctx.mask, ctx.alpha, ctx.scale, *grads)
    return *grads, None, None, None, None, None, None, None


attention.register_autograd(_differentiate, setup_context=_keep)
