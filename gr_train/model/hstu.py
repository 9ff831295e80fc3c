"""HSTU (arXiv 2402.17152), on jagged rows that may be one shard of each sequence.

- pointwise projection:   U, V, Q, K = split(silu(W1 norm(x)))           eq. 1
- spatial aggregation:    A V = sum_j silu(alpha q_i . k_j) v_j / N      eq. 2
- pointwise transform:    y = W2 (norm(A V) * U)                         eq. 3
- residual: x + y. No softmax, no feed-forward block.

The paper's bias by relative position and time is replaced by encodings added to the input
(`gr_train.model.inputs`), as its authors' later models do; attention then needs q, k, v alone.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gr_train.config import ModelConfig
from gr_train.model.inputs import init_linear
from parallel.attention import context_parallel_attention
from parallel.shard import Shard

EPS = 1e-6


class HSTULayer(nn.Module):
    def __init__(self, config: ModelConfig, max_length: int, exchange: str) -> None:
        super().__init__()
        self.heads, self.qk_dim, self.v_dim = config.num_heads, config.qk_dim, config.v_dim
        self.alpha, self.scale = config.qk_dim**-0.5, 1 / max_length
        self.exchange = exchange
        self.splits = [self.heads * d for d in (self.v_dim, self.v_dim, self.qk_dim, self.qk_dim)]
        self.input_norm = nn.LayerNorm(config.width, eps=EPS)
        self.uvqk = init_linear(nn.Linear(config.width, sum(self.splits)))
        self.output_norm = nn.LayerNorm(self.heads * self.v_dim, eps=EPS)
        self.output = init_linear(nn.Linear(self.heads * self.v_dim, config.width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, shard: Shard, intervals: Tensor) -> Tensor:
        """x: [rows, width] -> [rows, width]."""
        u, v, q, k = F.silu(self.uvqk(self.input_norm(x))).split(self.splits, dim=-1)
        attended = context_parallel_attention(
            q.unflatten(-1, (self.heads, self.qk_dim)),
            k.unflatten(-1, (self.heads, self.qk_dim)),
            v.unflatten(-1, (self.heads, self.v_dim)),
            shard=shard,
            intervals=intervals,
            alpha=self.alpha,
            scale=self.scale,
            exchange=self.exchange,
        )
        gated = self.output_norm(attended.flatten(1)) * u
        return x + self.output(self.dropout(gated))
