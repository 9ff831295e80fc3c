"""The two linear layers of an HSTU layer, each with the elementwise work next to it fused.

For layers of a model. `silu_linear` is eq. 1 of arXiv 2402.17152 (U's bias and SiLU are left to
`kernels.gated_norm`), `residual_linear` the end of the layer. Matrix products are PyTorch's; what
is fused are the biases, the SiLUs and, backward, their derivatives and the residual sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activation import Activation
from kernels.backend import compute_dtype, takes_triton
from kernels.columns import side_by_side
from kernels.differentiate import vector_jacobian


class GradientBuffer:
    """One gradient for all parts of a `silu_linear`, in which those who use the parts write theirs.

    The product that follows wants the gradients of all parts side by side. Whose backward comes
    first allocates them all; each writes its own columns, instead of having them copied. For parts
    that went through silu, it may write what comes out on its other side: see `go_through`.
    """

    def __init__(self) -> None:
        self.product: Tensor | None = None  # of the forward, with all columns
        self.bias: Tensor | None = None
        self.whole: Tensor | None = None
        self.dbias: Tensor | None = None  # once the gradients lie on silu's other side

    def columns(self, part: Tensor) -> Tensor:
        """Uninitialized: for the gradient of some columns of the product, laid out as they are."""
        if self.whole is None:
            self.whole = part.new_empty(part.shape[0], part.stride(0))
        start = int(part.storage_offset())
        return self.whole[:, start : start + part.shape[1]]

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """The whole, if anyone has written there; the bias's gradient, if someone went through."""
        found = self.whole, self.dbias
        self.whole = self.dbias = None
        return found

    def inputs(self) -> tuple[Tensor, Tensor]:
        """The product and the bias, for who wants to `go_through`: to be saved in its forward."""
        product, bias, self.product = self.product, self.bias, None
        assert product is not None
        assert bias is not None
        return product, bias

    def go_through(
        self, parts: Sequence[Tensor], product: Tensor, bias: Tensor
    ) -> tuple[list[Activation], list[Tensor]]:
        """What made these parts, all but the first, each viewed as [rows, H, D]; and where what
        comes out is to be written, which then stands for the parts' gradients."""
        first = product.shape[1] - bias.numel()
        self.dbias = torch.zeros_like(bias, dtype=torch.float32)
        made, into = [], []
        for x in parts:
            start, shape = int(x.storage_offset()), x.shape[1:]
            of_bias = slice(start, start + shape.numel())
            before = product[:, first:][:, of_bias]
            vectors = (y[of_bias].view(shape) for y in (bias, self.dbias))
            made.append(Activation(before.unflatten(1, shape), *vectors))
            into.append(self.columns(before).unflatten(1, shape))
        return made, into


def naive_silu_linear(
    x: Tensor, weight: Tensor, bias: Tensor, splits: Sequence[int]
) -> tuple[Tensor, ...]:
    """Columns of x W^T: the first of `splits` as they are, the others plus b and through silu."""
    first, others = F.linear(x, weight).split([splits[0], sum(splits[1:])], dim=-1)
    return first, *F.silu(others + bias).split(list(splits[1:]), dim=-1)


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

    x: [rows, in]; weight: [sum(splits), in] in any dtype, cast to x's; bias: [sum(splits[1:])].
    The parts are columns of wider buffers: their rows are strided. Kept for the backward: x and
    the product. gradient: a new one for each call, handed to the users of the parts as well; the
    others' gradients are best laid out as the parts are (`kernels.columns`).
    backend: of the elementwise part, see `kernels.backend`.
    Raises ValueError for shapes that do not fit.
    """
    if weight.shape != (sum(splits), x.shape[-1]) or x.dim() != 2:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)} for x of shape {tuple(x.shape)} and {splits=}"
        )
    if bias.shape != (sum(splits[1:]),):
        raise ValueError(f"bias: shape {tuple(bias.shape)} for {splits=}; the first has none")
    triton = takes_triton(backend, x)
    return _SiluLinear.apply(x, weight, bias, tuple(splits), gradient or GradientBuffer(), triton)


def residual_linear(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x + y W^T, written into x: [rows, out].

    x: [rows, out]; y: [rows, in]; weight: [out, in] in any dtype, cast to y's. Where x is of y's
    dtype, the sum is part of the product. There is no bias: its gradient would be one more pass
    over the rows. Kept for the backward: y.
    Raises ValueError for shapes that do not fit.
    """
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
        ctx.splits, ctx.gradient, ctx.triton = splits, gradient, triton
        x = x.to(compute_dtype(x))
        hidden = F.linear(x, weight.to(x.dtype))
        ctx.save_for_backward(x, weight, bias, hidden)
        gradient.product, gradient.bias = hidden, bias
        first, others = hidden.split_with_sizes([splits[0], bias.numel()], 1)
        if triton:
            from kernels.triton import pointwise

            others = pointwise.forward(others, bias)
        else:
            others = _naive_silu(others, bias)
        return first, *others.split_with_sizes(splits[1:], 1)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, hidden = ctx.saved_tensors
        first = ctx.splits[0]
        dhidden, dbias = ctx.gradient.take()
        if dhidden is None:
            dhidden = torch.empty_like(hidden)
        if dhidden.data_ptr() != douts[0].data_ptr():  # not there, or a sum of two
            dhidden[:, :first] = douts[0]
        dout, before, dbefore = side_by_side(douts[1:]), hidden[:, first:], dhidden[:, first:]
        if dbias is not None:
            if dout.data_ptr() != dbefore.data_ptr():
                raise RuntimeError(
                    "silu_linear: who went through silu must be the only user of all its parts"
                )
        elif ctx.triton:
            from kernels.triton import pointwise

            dbias = pointwise.backward(dout, before, bias, dbefore)
        else:
            into, dbias = vector_jacobian(_naive_silu, [before, bias], dout)
            dbefore.copy_(into)
        dweight = _weight_gradient(dhidden, x, weight.dtype)
        return dhidden @ weight.to(x.dtype), dweight, dbias.to(bias.dtype), None, None, None


class _ResidualLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(y, weight)
        ctx.mark_dirty(x)
        weight = weight.to(y.dtype)
        return x.addmm_(y, weight.t()) if x.dtype == y.dtype else x.add_(F.linear(y, weight))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        y, weight = ctx.saved_tensors
        dproduct = dout.to(y.dtype)
        dweight = _weight_gradient(dproduct, y, weight.dtype)
        return dout, dproduct @ weight.to(y.dtype), dweight


def _weight_gradient(dout: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dout^T x. The product of 16-bit tensors is a float32 sum, which a GPU need not round."""
    if dout.is_cuda and dout.element_size() == 2 and dtype == torch.float32:
        return torch.mm(dout.t(), x, out_dtype=dtype)
    return (dout.t() @ x).to(dtype)


def _naive_silu(x: Tensor, bias: Tensor) -> Tensor:
    """silu(x + bias) in x's dtype."""
    return F.silu(x + bias).to(x.dtype)
