"""Sampled softmax over cosines: the passes over rows between three matrix products a piece.

With unit rows h of hidden, e of the labels' embeddings and w of the negatives, s = h / temperature:

unit rows   s, and the logit s . e of the label
product     logits = s w^T
softmax     in place, p of each negative; the loss; q = 1 - p(label), which is the sum of the p
products    dw += p^T s, ds = p w, which takes the place of s
gradients   ds -= q e and de = -q s, each through its normalization
"""

# ruff: noqa: N803 (Triton's constants are written in capitals)
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.integers import cdiv
from kernels.triton.launcher import remembered
from kernels.triton.rows import block_at, block_shape, load_block, store_block

ALIGNED = 4  # floats in 16 bytes: rows of logits are padded to these, for wide loads


def loss_and_gradients(
    hidden: Tensor,
    labels: Tensor,
    label_embeddings: Tensor,
    negatives: Tensor,
    unit_negatives: Tensor,
    temperature: float,
    eps: float,
    piece: int,
    gradients: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """The loss, float32 [], of rows taken `piece` at a time; sums in a fixed order.

    unit_negatives: float32 [M, D]. gradients: None, or contiguous tensors for those of hidden and
    label_embeddings, which are written, and of unit_negatives, zeros, to which it is added.
    """
    (n, width), m = hidden.shape, len(negatives)
    hidden, label_embeddings = (
        x if x.stride(1) == 1 else x.contiguous() for x in (hidden, label_embeddings)
    )
    labels, negatives = labels.contiguous(), negatives.contiguous()
    strides = hidden.stride(0), label_embeddings.stride(0)
    most = max(1, min(n, piece))
    losses = unit_negatives.new_empty(n)
    whole_units = unit_negatives.new_empty(most, width)
    whole_logits = unit_negatives.new_empty(most, cdiv(m, ALIGNED) * ALIGNED)[:, :m]
    numbers = unit_negatives.new_empty(4, most).unbind()  # of rows
    for start in range(0, n, most):
        here = slice(start, start + most)
        rows = hidden[here], label_embeddings[here]
        count = len(rows[0])
        units, logits = whole_units[:count], whole_logits[:count]
        positive, others, *inverses = (x[:count] for x in numbers)
        _over_rows(
            unit_rows_kernel,
            (count, width),
            *(*rows, units, positive, *inverses),
            *(*strides, 1 / temperature, eps),
        )
        torch.mm(units, unit_negatives.T, out=logits)
        _over_rows(
            softmax_kernel,
            (count, m),
            *(logits, positive, labels[here], negatives, losses[here], others),
            PADDED=logits.stride(0),
            KEPT=gradients is not None,
        )
        if gradients is None:
            continue
        dhidden, dlabel, dnegatives = gradients
        dnegatives.addmm_(logits.T, units)
        torch.mm(logits, unit_negatives, out=units)
        _over_rows(
            gradients_kernel,
            (count, width),
            *(*rows, units, others, *inverses, dhidden[here], dlabel[here]),
            *(*strides, 1 / temperature),
        )
    return losses.sum()


def _over_rows(kernel: Any, shape: tuple[int, int], *args: object, **constants: object) -> None:
    """Launches it on blocks of whole rows, of so many rows and of this width."""
    rows, width = shape
    block_rows, block, warps = block_shape(width)
    constants.update(WIDTH=width, ROWS=block_rows, COLUMNS=block, num_warps=warps)
    kernel[(cdiv(rows, block_rows),)](*args, rows, **constants)


@triton.jit
def _normalized_backward(dunit, unit, inverse):
    """The gradient for a row, from that of its unit row: what is along the row has no effect."""
    return (dunit - unit * tl.sum(dunit * unit, 1)[:, None]) * inverse[:, None]


# Pieces begin anywhere in the vectors, and so do the vectors in what they are allocated in.
@remembered
@triton.jit(
    do_not_specialize=["num_rows", "scale", "eps"],
    do_not_specialize_on_alignment=["positive_ptr", "hidden_inverse_ptr", "label_inverse_ptr"],
)
def unit_rows_kernel(
    hidden_ptr,
    label_ptr,
    units_ptr,
    positive_ptr,
    hidden_inverse_ptr,
    label_inverse_ptr,
    hidden_stride,
    label_stride,
    scale,
    eps,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, inside = block_at(tl.program_id(0), 0, num_rows, WIDTH, ROWS, COLUMNS)
    hidden = load_block(hidden_ptr, hidden_stride, rows, columns, inside).to(tl.float32)
    label = load_block(label_ptr, label_stride, rows, columns, inside).to(tl.float32)
    hidden_inverse = 1 / tl.sqrt_rn(tl.sum(hidden * hidden, 1) + WIDTH * eps)
    label_inverse = 1 / tl.sqrt_rn(tl.sum(label * label, 1) + WIDTH * eps)
    unit = hidden * hidden_inverse[:, None] * scale
    positive = tl.sum(unit * (label * label_inverse[:, None]), 1)
    store_block(units_ptr, WIDTH, unit, rows, columns, inside)
    tl.store(positive_ptr + rows, positive, mask=rows < num_rows)
    tl.store(hidden_inverse_ptr + rows, hidden_inverse, mask=rows < num_rows)
    tl.store(label_inverse_ptr + rows, label_inverse, mask=rows < num_rows)


@remembered
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["positive_ptr", "labels_ptr", "losses_ptr", "others_ptr"],
)
def softmax_kernel(
    logits_ptr,
    positive_ptr,
    labels_ptr,
    negatives_ptr,
    losses_ptr,
    others_ptr,
    num_rows,
    PADDED: tl.constexpr,
    KEPT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, inside = block_at(tl.program_id(0), 0, num_rows, PADDED, ROWS, COLUMNS)
    logits = load_block(logits_ptr, PADDED, rows, columns, inside)
    positive = tl.load(positive_ptr + rows, mask=rows < num_rows, other=0)
    label = tl.load(labels_ptr + rows, mask=rows < num_rows, other=0)
    negatives = tl.load(negatives_ptr + columns, mask=columns < WIDTH, other=0)
    competes = (columns < WIDTH)[None, :] & (label[:, None] != negatives[None, :])
    logits = tl.where(competes, logits, -float("inf"))
    top = tl.maximum(tl.max(logits, 1), positive)  # finite, though all negatives be masked
    powers = tl.exp(logits - top[:, None])
    others = tl.sum(powers, 1)
    total = others + tl.exp(positive - top)
    if KEPT:
        store_block(logits_ptr, PADDED, powers / total[:, None], rows, columns, inside)
    # Not 1 - p(label), which would be rounded away where the label is all but certain.
    tl.store(others_ptr + rows, others / total, mask=rows < num_rows)
    tl.store(losses_ptr + rows, tl.log(total) + (top - positive), mask=rows < num_rows)


@remembered
@triton.jit(
    do_not_specialize=["num_rows", "scale"],
    do_not_specialize_on_alignment=["others_ptr", "hidden_inverse_ptr", "label_inverse_ptr"],
)
def gradients_kernel(
    hidden_ptr,
    label_ptr,
    dunits_ptr,
    others_ptr,
    hidden_inverse_ptr,
    label_inverse_ptr,
    dhidden_ptr,
    dlabel_ptr,
    hidden_stride,
    label_stride,
    scale,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, inside = block_at(tl.program_id(0), 0, num_rows, WIDTH, ROWS, COLUMNS)
    hidden = load_block(hidden_ptr, hidden_stride, rows, columns, inside).to(tl.float32)
    label = load_block(label_ptr, label_stride, rows, columns, inside).to(tl.float32)
    dunits = load_block(dunits_ptr, WIDTH, rows, columns, inside)
    others = tl.load(others_ptr + rows, mask=rows < num_rows, other=0)
    hidden_inverse = tl.load(hidden_inverse_ptr + rows, mask=rows < num_rows, other=0)
    label_inverse = tl.load(label_inverse_ptr + rows, mask=rows < num_rows, other=0)
    hidden *= hidden_inverse[:, None]
    label *= label_inverse[:, None]
    # The temperature divides each logit once, so once each gradient of a unit row.
    dhidden = (dunits - others[:, None] * label) * scale
    dlabel = hidden * (-others * scale)[:, None]
    dhidden = _normalized_backward(dhidden, hidden, hidden_inverse)
    dlabel = _normalized_backward(dlabel, label, label_inverse)
    store_block(dhidden_ptr, WIDTH, dhidden, rows, columns, inside)
    store_block(dlabel_ptr, WIDTH, dlabel, rows, columns, inside)
