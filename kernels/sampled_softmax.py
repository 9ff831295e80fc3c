"""Sampled softmax over cosines: the loss and, with it, its gradients, a piece of rows at a time.

The loss is one number: the gradients of a piece are made while its logits are there, and all that
the backward does is to scale them. Nothing is computed twice, no logits are kept. Matrix products
are PyTorch's; what is fused are the passes over rows between them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import accumulator, takes_triton

LOGITS = 1 << 24  # in memory at a time: few enough to stay in a cache in part
EPS = 1e-12  # on the mean square of a row

Gradients = tuple[Tensor, Tensor, Tensor]


def unit_rows(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of x in `dtype`, scaled to an L2 norm of 1; a row of zeros stays one."""
    weight = torch.full(x.shape[1:], x.shape[1] ** -0.5, dtype=dtype, device=x.device)
    return F.rms_norm(x.to(dtype), x.shape[1:], weight, eps=EPS)


def naive_sampled_softmax_loss(
    hidden: Tensor,
    labels: Tensor,
    label_embeddings: Tensor,
    negatives: Tensor,
    unit_negatives: Tensor,
    temperature: float,
) -> Tensor:
    """All rows at once, in the dtype of unit_negatives, for PyTorch's autograd."""
    dtype = unit_negatives.dtype
    unit_hidden = unit_rows(hidden, dtype) / temperature
    positive = (unit_hidden * unit_rows(label_embeddings, dtype)).sum(-1, keepdim=True)
    negative = unit_hidden @ unit_negatives.T
    negative = negative.masked_fill_(labels[:, None] == negatives, -torch.inf)
    first = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
    return F.cross_entropy(torch.cat([positive, negative], 1), first, reduction="sum")


def sampled_softmax_loss(
    hidden: Tensor,
    labels: Tensor,
    label_embeddings: Tensor,
    negatives: Tensor,
    negative_embeddings: Tensor,
    temperature: float,
    *,
    backend: str = "auto",
) -> Tensor:
    """Sum of -log p(label) among the label and the shared negatives; cosine over temperature.

    hidden, label_embeddings: [n, D], each in a dtype of its own; labels: int64 [n]; negatives:
    int64 [M], M >= 1; negative_embeddings: [M, D]. A negative that is a row's label does not
    compete in that row. n may be 0.
    Returns a number, float32 (float64 if an input is). Where gradients are recorded, those for the
    three [., D] are made right away and kept, in their dtypes; else they are not made. They have no
    gradients of their own. backend: see `kernels.backend`.
    Raises ValueError, naming the argument, for what does not fit.
    """
    n, width = _matrix("hidden", hidden)
    if label_embeddings.shape != (n, width):
        raise ValueError(
            f"label_embeddings: shape {tuple(label_embeddings.shape)} for hidden of shape "
            f"{(n, width)}"
        )
    m, negative_width = _matrix("negative_embeddings", negative_embeddings)
    if negative_width != width or not m:
        raise ValueError(
            f"negative_embeddings: want at least one row of width {width}, got shape "
            f"{(m, negative_width)}"
        )
    for name, ids, count in (("labels", labels, n), ("negatives", negatives, m)):
        if ids.shape != (count,) or ids.dtype != torch.int64:
            raise ValueError(f"{name}: want int64 [{count}], got {ids.dtype} {tuple(ids.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: want a positive number, got {temperature}")
    rows = (hidden, label_embeddings, negative_embeddings)
    # Of the logits, too, a whole row is in one program: they are [n, M].
    triton = all(takes_triton(backend, x) for x in (*rows, negative_embeddings.T))
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in rows)
    dtype = torch.promote_types(hidden.dtype, label_embeddings.dtype)
    dtype = accumulator(torch.promote_types(dtype, negative_embeddings.dtype))
    unit_negatives = unit_rows(negative_embeddings, dtype)  # few: by PyTorch, backward too
    return _SampledSoftmax.apply(
        hidden, labels, label_embeddings, negatives, unit_negatives, temperature, wanted, triton
    )


def _matrix(name: str, x: Tensor) -> tuple[int, int]:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"{name}: want numbers [rows, width], got {x.dtype} {tuple(x.shape)}")
    return x.shape[0], x.shape[1]


class _SampledSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        label_embeddings: Tensor,
        negatives: Tensor,
        unit_negatives: Tensor,
        temperature: float,
        wanted: bool,
        triton: bool,
    ) -> Tensor:
        inputs = hidden, labels, label_embeddings, negatives, unit_negatives
        gradients: Gradients | None = None
        if wanted:
            dhidden, dlabel = (
                torch.empty(x.shape, dtype=x.dtype, device=x.device)
                for x in (hidden, label_embeddings)
            )
            gradients = dhidden, dlabel, torch.zeros_like(unit_negatives)
            ctx.save_for_backward(*gradients)
        # A piece has this many logits at most, and its unit rows as many numbers.
        piece = max(1, LOGITS // max(unit_negatives.shape))
        if triton:
            from kernels.triton import sampled_softmax

            return sampled_softmax.loss_and_gradients(*inputs, temperature, EPS, piece, gradients)
        return _naive_loss_and_gradients(*inputs, temperature, piece, gradients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dlabel, dnegatives = (
            gradient * dloss if ctx.needs_input_grad[i] else None
            for i, gradient in zip((0, 2, 4), ctx.saved_tensors, strict=True)
        )
        return dhidden, None, dlabel, None, dnegatives, None, None, None


def _naive_loss_and_gradients(
    hidden: Tensor,
    labels: Tensor,
    label_embeddings: Tensor,
    negatives: Tensor,
    unit_negatives: Tensor,
    temperature: float,
    piece: int,
    gradients: Gradients | None,
) -> Tensor:
    """As Triton's; the gradients of each piece are autograd's."""
    loss = unit_negatives.new_zeros(())
    for start in range(0, len(hidden), piece):
        rows = slice(start, start + piece)
        given = hidden[rows], label_embeddings[rows], unit_negatives
        leaves = [x.detach().requires_grad_(gradients is not None) for x in given]
        with torch.set_grad_enabled(gradients is not None):
            here = naive_sampled_softmax_loss(
                leaves[0], labels[rows], leaves[1], negatives, leaves[2], temperature
            )
        loss += here.detach()
        if gradients is not None:
            grads = torch.autograd.grad(here, leaves)
            gradients[0][rows] = grads[0]
            gradients[1][rows] = grads[1]
            gradients[2].add_(grads[2])
    return loss
