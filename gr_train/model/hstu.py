"""HSTU (arXiv 2402.17152), on jagged rows that may be one shard of each sequence.

- pointwise projection:   U, V, Q, K = split(silu(W1 norm(x)))           eq. 1
- spatial aggregation:    A V = sum_j silu(alpha q_i . k_j) v_j / N      eq. 2
- pointwise transform:    y = W2 (norm(A V) * U)                         eq. 3
- residual: x + y. No softmax, no feed-forward block.

The paper's bias by relative position and time is replaced by encodings added to the input
(`gr_train.model.inputs`), as its authors' later models do; attention then needs q, k, v alone.
U's bias and SiLU are computed where U is used, in the gate. W2 goes without a bias. What a layer
keeps for its backward pass is ModelConfig.recompute's choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gr_train.config import ModelConfig
from gr_train.model.inputs import init_linear
from gr_train.model.recompute import Recomputation
from kernels.gated_norm import draw_seed, gated_norm
from kernels.norm import branch_norm
from kernels.projection import GradientBuffer, Projected, residual_linear, silu_linear
from parallel.attention import context_parallel_attention
from parallel.visibility import Visibility

EPS = 1e-6


class HSTULayer(nn.Module):
    def __init__(self, config: ModelConfig, max_length: int, exchange: str) -> None:
        super().__init__()
        self.heads, self.qk_dim, self.v_dim = config.num_heads, config.qk_dim, config.v_dim
        self.alpha, self.scale = config.qk_dim**-0.5, 1 / max_length
        self.exchange, self.dropout, self.recompute = exchange, config.dropout, config.recompute
        self.deterministic = config.deterministic
        self.splits = [self.heads * d for d in (self.v_dim, self.v_dim, self.qk_dim, self.qk_dim)]
        self.input_norm = nn.LayerNorm(config.width, eps=EPS)
        self.uvqk = init_linear(nn.Linear(config.width, sum(self.splits), bias=False))
        self.u_bias = nn.Parameter(torch.zeros(self.splits[0]))
        self.vqk_bias = nn.Parameter(torch.zeros(sum(self.splits[1:])))
        self.output_norm = nn.LayerNorm(self.heads * self.v_dim, eps=EPS)
        self.output = init_linear(nn.Linear(self.heads * self.v_dim, config.width, bias=False))

    def forward(self, x: Tensor, seen: Visibility) -> Tensor:
        """x: [rows, width] -> [rows, width]."""
        seed = draw_seed(x.device) if self.training and self.dropout else None
        if self.recompute == "none":
            return self._forward(x, seen, seed)[0]
        with Recomputation(x) as kept:
            out, attended, *forgotten = self._forward(x, seen, seed)
        x, attended = x.detach(), attended.detach()

        def rebuild() -> list[Tensor]:
            normed, _, u, v, *_ = self._project(x)
            return [normed, u, v, self._gate(attended, u, seed)]

        kept.forget(forgotten, rebuild)
        return out

    def _forward(self, x: Tensor, seen: Visibility, seed: Tensor | None) -> tuple[Tensor, ...]:
        """The result, attention's, and one tensor of each buffer that is cheap to compute again."""
        du = GradientBuffer()
        normed, x, u, v, q, k, before = self._project(x, du)
        attended = context_parallel_attention(
            q.view(-1, self.heads, self.qk_dim),
            k.view(-1, self.heads, self.qk_dim),
            v.view(-1, self.heads, self.v_dim),
            seen=seen,
            alpha=self.alpha,
            scale=self.scale,
            exchange=self.exchange,
            deterministic=self.deterministic,
            projected=Projected(before, self.vqk_bias, du),
        ).flatten(1)
        gated = self._gate(attended, u, seed, du)
        out = residual_linear(x, gated, self.output.weight)
        return out, attended, normed, u, v, gated

    def _project(self, x: Tensor, du: GradientBuffer | None = None) -> tuple[Tensor, ...]:
        """norm(x), x, U before its bias and SiLU, V, Q, K, and these before theirs."""
        norm, weight = self.input_norm, self.uvqk.weight
        normed, x = branch_norm(x, norm.weight, norm.bias, eps=norm.eps)
        return normed, x, *silu_linear(normed, weight, self.vqk_bias, self.splits, gradient=du)

    def _gate(
        self, attended: Tensor, u: Tensor, seed: Tensor | None, du: GradientBuffer | None = None
    ) -> Tensor:
        """dropout(norm(A V) * silu(U))."""
        norm = self.output_norm
        return gated_norm(
            attended,
            u,
            self.u_bias,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            dropout=0.0 if seed is None else self.dropout,
            seed=seed,
            u_gradient=du,
        )
