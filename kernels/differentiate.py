"""Gradients of a naive twin by PyTorch's autograd: it needs no backward written by hand.

For the autograd functions of this floor. They keep only their inputs, with either twin, and the
naive one runs again inside its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def vector_jacobian(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor
) -> tuple[Tensor, ...]:
    """dout times the Jacobian of `function`, for each input, in its dtype."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
    return torch.autograd.grad(out, leaves, dout)
