"""The SiLU that made queries, keys or values, for backward passes that go through it on their way.

Attention's backward has the gradients of q, k and v in registers: to multiply them there by the
derivative of what made q, k and v spares a pass over memory that would read and write them again.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """Rows of q, k or v are silu(before + bias).

    before: [T, H, D], each row contiguous; bias: [H, D]; dbias: float32 [H, D], which who goes
    through the activation writes the gradient of the bias into.
    """

    before: Tensor
    bias: Tensor
    dbias: Tensor

    def heads(self, heads: slice) -> Activation:
        """Of some heads."""
        return Activation(self.before[:, heads], self.bias[heads], self.dbias[heads])

    def backward(self, dout: Tensor) -> Tensor:
        """The gradient of `before`, in dout's dtype; writes dbias."""
        x = self.before.to(dout.dtype) + self.bias.to(dout.dtype)
        sigmoid = x.sigmoid()
        dx = dout * (sigmoid * (1 + x * (1 - sigmoid)))
        self.dbias.copy_(dx.sum(0))
        return dx
