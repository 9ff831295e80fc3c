"""Losses of hidden rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gr_train.model.heads import sampled_softmax_loss
from kernels import sampled_softmax


@pytest.mark.parametrize("rows", [0, 1, 6, 7, 20])
def test_sampled_softmax_in_pieces(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients are those of a softmax written out, whatever the pieces."""
    torch.manual_seed(0)
    hidden, positive = (torch.randn(rows, 5).requires_grad_() for _ in range(2))
    embeddings = torch.randn(9, 5).requires_grad_()
    labels, negatives = torch.randint(12, (rows,)), torch.randint(12, (9,))

    def written_out() -> torch.Tensor:
        against = F.normalize(hidden, dim=1) @ F.normalize(embeddings, dim=1).T / 0.1
        against = against.masked_fill(labels[:, None] == negatives, -torch.inf)
        own = (F.normalize(hidden, dim=1) * F.normalize(positive, dim=1)).sum(1, True) / 0.1
        return -(own[:, 0] - torch.cat([own, against], 1).logsumexp(1)).sum()

    inputs = [hidden, positive, embeddings]
    want = [written_out(), *torch.autograd.grad(written_out(), inputs)]
    for most in (1, 54, 1 << 26):  # pieces of a row, of six rows of nine logits, one piece
        monkeypatch.setattr(sampled_softmax, "LOGITS", most)
        loss = sampled_softmax_loss(hidden, labels, positive, negatives, embeddings, 0.1)
        for got, expected in zip([loss, *torch.autograd.grad(loss, inputs)], want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
