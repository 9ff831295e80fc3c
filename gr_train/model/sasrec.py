"""SASRec's block (arXiv 1808.09781), HSTU's softmax twin under the same trainer: the baseline.

Softmax attention, then a position-wise feed-forward network, each pre-normed with a residual. Not
split over GPUs: softmax needs running statistics between key blocks, which HSTU does without.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr_train.config import ModelConfig
from gr_train.model.inputs import init_linear
from kernels.naive import visible
from parallel.visibility import Visibility


class SASRecLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = init_linear(nn.Linear(config.width, 3 * config.width))
        self.output = init_linear(nn.Linear(config.width, config.width))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(config.width),
            init_linear(nn.Linear(config.width, 4 * config.width)),
            nn.GELU(),
            init_linear(nn.Linear(4 * config.width, config.width)),
            nn.Dropout(config.dropout),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, seen: Visibility) -> Tensor:
        """x: [rows, width] -> [rows, width]."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        attended = [qkv[:0, 0].flatten(1)]  # a rank without tokens takes part in the gradients too
        positions = seen.shard.device_rows.positions
        offsets = seen.shard.rows.offsets.tolist()
        for start, end in pairwise(offsets):
            if start == end:
                continue
            q, k, v = qkv[start:end].permute(1, 2, 0, 3)  # [heads, n, dim] each
            mask = visible(seen.intervals[start:end], positions[start:end])
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            attended.append(out.transpose(0, 1).flatten(1))
        x = x + self.dropout(self.output(torch.cat(attended)))
        return x + self.feed_forward(x)
