"""What HSTU layers keep and need in memory in training, in bytes a token, term by term: arithmetic.

For `benchmarks.memory`, which measures the same. bf16 in the layers, keys and values by the ring.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from parallel.transport import GROWTH

STEP = 64  # lengths are multiples of this
X, NORMED, HIDDEN, ACTIVATED = (
    "residual stream",
    "normed input",
    "U, V, Q, K before SiLU",
    "V, Q, K",
)
ATTENDED, GATED, STATISTICS = "attention's output", "gated output", "statistics of the norms"
FORGOTTEN = {"none": (), "projections": (NORMED, HIDDEN, ACTIVATED, GATED)}  # by policy


@dataclass(frozen=True)
class Model:
    width: int
    heads: int
    dim: int
    layers: int
    residual: torch.dtype
    cp: int = 1

    @property
    def row(self) -> int:
        """Bytes of one token's vectors of all heads in bf16."""
        return 2 * self.heads * self.dim

    @property
    def stream(self) -> int:
        return self.width * self.residual.itemsize

    @property
    def fixed(self) -> int:
        """Weights, their gradients and AdamW's two moments, all float32: bytes."""
        return 16 * self.layers * self.width * 5 * self.heads * self.dim


def kept(model: Model, policy: str) -> dict[str, int]:
    """Bytes a token that one layer keeps for its backward pass."""
    terms = {
        X: model.stream,
        NORMED: 2 * model.width,
        HIDDEN: 4 * model.row,
        ACTIVATED: 3 * model.row,
        ATTENDED: model.row,
        GATED: model.row,
        STATISTICS: 16,
    }
    return {term: n for term, n in terms.items() if term not in FORGOTTEN[policy]}


def workspace(model: Model) -> dict[str, int]:
    """Bytes a token, beside what is kept, while a layer's attention runs backward.

    That is its fullest moment: the gated output and attention's are gone by then, all else is still
    there, and the gradients are too. Over a ring, dq has a float32 sum beside it until dk and dv
    come home, which take as much.
    """
    terms = {
        "model's output": model.stream,
        "gradient of the residual stream": model.stream,
        "gradient of attention's output": model.row,
        "gradients of U, V, Q, K": 4 * model.row,
        "gradients of Q, K, V": 3 * model.row,
    }
    if model.cp > 1:
        block = 2 * model.row  # keys and values; their gradients are float32
        keys = (1 + min(2, model.cp - 1)) * block  # out- and inboxes
        gradients = (1 + 1) * 2 * block
        # So many rows that they go round head by head.
        terms["ring buffers"] = int(GROWTH * (keys + gradients)) // model.heads
    return terms


def peak(model: Model, policy: str) -> dict[str, int]:
    """Bytes a token of one rank at the fullest moment of a step: the last layer's backward."""
    terms = Counter({term: n * (model.layers - 1) for term, n in kept(model, policy).items()})
    terms.update(kept(model, "none"))  # this layer's, what was forgotten made again
    terms.subtract({GATED: model.row, ATTENDED: model.row})
    terms.update(workspace(model))
    return dict(+terms)


def longest(budget: float, model: Model, policy: str, sequences: int) -> int:
    """Predicted: the longest L for `sequences` sequences of L tokens on model.cp GPUs."""
    per_token = sum(peak(model, policy).values()) / model.cp
    return int((budget - model.fixed) / (sequences * per_token)) // STEP * STEP
