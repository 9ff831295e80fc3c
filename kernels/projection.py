"""The two linear layers of an HSTU layer, each with the elementwise work next to it fused.

For layers of a model. `silu_linear` is eq. 1 of arXiv 2402.17152 (U's bias and SiLU are left to
`kernels.gated_norm`), `residual_linear` the end of the layer. Matrix products are PyTorch's; what
is fused are the biases, the SiLUs and, backward, their derivatives and the residual sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import check_devices, compute_dtype, takes_triton
from kernels.columns import side_by_side
from kernels.differentiate import vector_jacobian


class GradientBuffer:
    """One gradient for all parts of a `silu_linear`, in which other backwards write their parts'.

    The product that follows wants the gradients of all parts side by side. What computes the first
    part's allocates them all and writes its own columns, instead of having them copied; what
    computes the others', see `Projected`, then writes those. It only says where they may lie:
    gradients go by way of autograd, and any that lie elsewhere are copied.
    """

    def __init__(self) -> None:
        self._whole: Tensor | None = None
        self._others_are_free = False

    def columns(self, part: Tensor) -> Tensor:
        """Uninitialized: for the gradient of the first part, laid out as that is."""
        self._whole, self._others_are_free = part.new_empty(part.shape[0], part.stride(0)), True
        return self._whole[:, : part.shape[1]]

    def others(self, before: Tensor) -> Tensor:
        """Uninitialized: for the gradient of `before`; given away once."""
        if not self._others_are_free:
            return torch.empty_like(before, memory_format=torch.contiguous_format)
        assert self._whole is not None
        self._others_are_free = False
        return self._whole[:, self._whole.shape[1] - before.shape[1] :]

    def take(self, dfirst: Tensor | None, dbefore: Tensor | None) -> Tensor | None:
        """The whole, if these lie there (they do not if they are sums of two), and what is not
        given may be written there."""
        whole, free = self._whole, self._others_are_free
        self._whole, self._others_are_free = None, False
        if whole is None or dfirst is None or dfirst.data_ptr() != whole.data_ptr():
            return None
        if dbefore is None:
            return whole if free else None
        there = whole[:, dfirst.shape[1] :]
        same = dbefore.data_ptr() == there.data_ptr() and dbefore.stride() == there.stride()
        return whole if same else None


@dataclass(frozen=True)
class Projected:
    """What tensors were computed from that are silu(before + bias): for one whose backward can take
    their gradients back through SiLU in passing, to `before` and `bias` themselves.

    before: [rows, width], and bias: [width], as of `silu_linear`, but as many rows as the tensors
    have. gradient: as there.
    """

    before: Tensor
    bias: Tensor
    gradient: GradientBuffer


def naive_silu_linear(
    x: Tensor, weight: Tensor, bias: Tensor, splits: Sequence[int]
) -> tuple[Tensor, ...]:
    """Columns of x W^T: the first of `splits` as they are, the others plus b and through silu; and
    all others as they are."""
    first, others = F.linear(x, weight).split([splits[0], sum(splits[1:])], dim=-1)
    return first, *F.silu(others + bias).split(list(splits[1:]), dim=-1), others


def silu_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    splits: Sequence[int],
    *,
    gradient: GradientBuffer | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """[rows, splits[i]] each: columns of x W^T, all but the first part plus b and through silu.

    Behind them, [rows, sum(splits[1:])]: all others before bias and SiLU, see `Projected`.

    x: [rows, in]; weight: [sum(splits), in] in any dtype, cast to x's; bias: [sum(splits[1:])].
    The parts are columns of wider buffers: their rows are strided. Kept for the backward: x, the
    product and the weight as cast. gradient: a new one for each call, handed to the user of the
    first part as well; the others' gradients are best laid out as the parts are
    (`kernels.columns`).
    backend: of the elementwise part, see `kernels.backend`.
    Raises ValueError for shapes or devices that do not fit.
    """
    if weight.shape != (sum(splits), x.shape[-1]) or x.dim() != 2:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)} for x of shape {tuple(x.shape)} and {splits=}"
        )
    if bias.shape != (sum(splits[1:]),):
        raise ValueError(f"bias: shape {tuple(bias.shape)} for {splits=}; the first has none")
    check_devices(x=x, weight=weight, bias=bias)
    triton, gradient = takes_triton(backend, x), gradient or GradientBuffer()
    return _SiluLinear.apply(x, weight, bias.contiguous(), tuple(splits), gradient, triton)


def residual_linear(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x + y W^T, written into x: [rows, out].

    x: [rows, out]; y: [rows, in]; weight: [out, in] in any dtype, cast to y's. Where x is of y's
    dtype, the sum is part of the product. There is no bias: its gradient would be one more pass
    over the rows. Kept for the backward: y and the weight as cast.
    Raises ValueError for shapes or devices that do not fit.
    """
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y: shape {tuple(y.shape)} for x of shape {tuple(x.shape)}")
    check_devices(x=x, y=y, weight=weight)
    if weight.shape != (x.shape[-1], y.shape[-1]) or x.dim() != 2:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)} for x of shape {tuple(x.shape)} and "
            f"y of shape {tuple(y.shape)}"
        )
    return _ResidualLinear.apply(x, y, weight)


class _SiluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        splits: tuple[int, ...],
        gradient: GradientBuffer,
        triton: bool,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.splits, ctx.gradient, ctx.triton = splits, gradient, triton
        x, ctx.weight_dtype = x.to(compute_dtype(x)), weight.dtype
        weight = weight.to(x.dtype)
        hidden = F.linear(x, weight)
        ctx.save_for_backward(x, weight, bias, hidden)
        first, before = hidden.split_with_sizes([splits[0], bias.numel()], 1)
        if triton:
            from kernels.triton import pointwise

            others = pointwise.forward(before, bias)
        else:
            others = _naive_silu(before, bias)
        return first, *others.split_with_sizes(splits[1:], 1), before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, hidden = ctx.saved_tensors
        dfirst, *dothers, dbefore = douts
        first, some = ctx.splits[0], any(dout is not None for dout in dothers)
        whole = ctx.gradient.take(dfirst, dbefore)
        in_place = whole is not None and not (some and dbefore is not None)  # a sum goes elsewhere
        dhidden = whole if in_place else torch.empty_like(hidden)
        if not in_place:
            _copy(dfirst, dhidden[:, :first])
        before, into, dbias = hidden[:, first:], dhidden[:, first:], None
        if some:
            dbias = _silu_backward(ctx, dothers, before, bias, into)
            if dbefore is not None:
                into += dbefore
        elif not in_place or dbefore is None:
            _copy(dbefore, into)
        dweight = _weight_gradient(dhidden, x, ctx.weight_dtype)
        return dhidden @ weight, dweight, dbias, None, None, None


def _copy(x: Tensor | None, into: Tensor) -> None:
    """None: zeros."""
    into.zero_() if x is None else into.copy_(x)


def _silu_backward(
    ctx: Any, douts: Sequence[Tensor | None], before: Tensor, bias: Tensor, dbefore: Tensor
) -> Tensor:
    """Writes dbefore, and returns dbias."""
    parts = before.split_with_sizes(ctx.splits[1:], 1)
    full = [torch.zeros_like(x) if y is None else y for x, y in zip(parts, douts, strict=True)]
    if ctx.triton:
        from kernels.triton import pointwise

        return pointwise.backward(side_by_side(full), before, bias, dbefore).to(bias.dtype)
    into, dbias = vector_jacobian(_naive_silu, [before, bias], side_by_side(full))
    dbefore.copy_(into)
    return dbias.to(bias.dtype)


class _ResidualLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        weight, ctx.weight_dtype = weight.to(y.dtype), weight.dtype
        ctx.save_for_backward(y, weight)
        return x.addmm_(y, weight.t()) if x.dtype == y.dtype else x.add_(F.linear(y, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        y, weight = ctx.saved_tensors
        dproduct = dout.to(y.dtype)
        dweight = _weight_gradient(dproduct, y, ctx.weight_dtype)
        return dout, dproduct @ weight, dweight


def _weight_gradient(dout: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dout^T x. The product of 16-bit tensors is a float32 sum, which a GPU need not round."""
    if dout.is_cuda and dout.element_size() == 2 and dtype == torch.float32:
        return torch.mm(dout.t(), x, out_dtype=dtype)
    return (dout.t() @ x).to(dtype)


def _naive_silu(x: Tensor, bias: Tensor) -> Tensor:
    """silu(x + bias) in x's dtype."""
    return F.silu(x + bias).to(x.dtype)
