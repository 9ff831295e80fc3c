"""What HSTU layers keep and need in memory in training, in bytes a token, term by term: arithmetic.

For `benchmarks.memory`, which measures the same. bf16 in the layers, keys and values by the ring.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from dataclasses import dataclass

import torch

from parallel.exchange.ring import MESSAGE_BYTES
from parallel.transport import GROWTH

STEP = 64  # lengths are multiples of this
X, NORMED, HIDDEN, ACTIVATED = (
    "residual stream",
    "normed input",
    "U, V, Q, K before SiLU",
    "V, Q, K",
)
ATTENDED, GATED, STATISTICS = "attention's output", "gated output", "statistics of the norms"
CAST = "weights cast to bf16, in bytes"  # of a layer, however many its tokens
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
    def weights(self) -> int:
        """Of a layer's matrices."""
        return self.width * 5 * self.heads * self.dim

    @property
    def fixed(self) -> int:
        """Bytes, however long the sequences, if no ring's message has two heads.

        Weights, their gradients and AdamW's two moments, all float32, and `casts`; the ring's
        buffers: up to two inboxes of keys, and of queries. And attention's float32 sums of dk and
        dv in segments: at most 128 tiles.
        """
        weights = self.layers * (16 * self.weights + casts(self))
        messages = 2 * min(2, self.cp - 1)
        sums = 2 * 4 * 128 * (128 if self.dim > 64 else 64) * self.heads * self.dim
        return weights + sums + (int(GROWTH * MESSAGE_BYTES) * messages if self.cp > 1 else 0)


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


def casts(model: Model) -> int:
    """Bytes, however many tokens, that one layer keeps besides: its matrices in bf16."""
    return 2 * model.weights


def workspace(model: Model, pieces: int = 1) -> dict[str, int]:
    """Bytes a token, beside what is kept, while a layer's attention runs backward.

    That is its fullest moment: the gated output and attention's are gone by then, all else is still
    there, and the gradients are too. pieces: of a ring's rows of one head, by copy engines.
    """
    sums = 3 if model.cp > 2 or pieces > 1 else 2 * (model.cp - 1)
    return {
        "model's output": model.stream,
        "gradient of the residual stream": model.stream,
        "gradient of attention's output": model.row,
        "gradients of U, V, Q, K": 4 * model.row,
        "gradients of Q, K, V": 3 * model.row,
        "float32 sums of a head over the ring": sums * 4 * model.dim,
    }


def peak(model: Model, policy: str, pieces: int = 1) -> dict[str, int]:
    """Bytes a token of one rank at the fullest moment of a step: the last layer's backward."""
    terms = Counter({term: n * (model.layers - 1) for term, n in kept(model, policy).items()})
    terms.update(kept(model, "none"))  # this layer's, what was forgotten made again
    terms.subtract({GATED: model.row, ATTENDED: model.row})
    terms.update(workspace(model, pieces))
    return dict(+terms)


def needed(model: Model, policy: str, rows: int) -> int:
    """Bytes of one rank that holds so many rows, about as many as a ring's message or more.

    Without what a backward may take at cp = 1 to be faster, where head dims are over 128, or up to
    64 and the mean sequence is under 512 tokens: see `kernels.scratch`.
    """
    pieces = -(-rows * 4 * model.dim // MESSAGE_BYTES) if model.cp > 1 else 1
    # Of 16 bytes a row: intervals of every rank, and bounds of queries for each piece of keys, and
    # of every piece of queries, which of this rank's own are the same if there is but one.
    blocks = model.cp * (2 + pieces) - (pieces == 1) if model.cp > 1 else 1
    plans = 16 * blocks
    return model.fixed + rows * (sum(peak(model, policy, pieces).values()) + plans)


def longest(budget: float, model: Model, policy: str, sequences: int) -> int:
    """Predicted: the longest L for `sequences` sequences of L tokens on model.cp GPUs."""
    steps = range(1, 1 << 20)
    return STEP * bisect(
        steps, budget, key=lambda n: needed(model, policy, sequences * n * STEP // model.cp)
    )
